"""Colour for gray photographs: colorize(); one photograph, several, a folder.

    python main.py inference --image x.png --model checkpoints/best_model.tar
    python main.py inference --image archive/ --output coloured/ --mood warm
    python main.py inference --image x.png --sheet      # moods and variants, to choose from

    from inference import colorize                 # in a notebook, the shipped colours:
    colorize(None, "x.jpg").save("x_color.png")

L of the photograph is kept to rounding; the network only adds ab.
"""

import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from basic_model import PRETRAINED, ColorNet, choose_device, load_checkpoint, upsample
from colorize_data import content_hash, find_photos, ordered_map, progress
from controls import (MOODS, Controls, agree, apply_controls, fixed_dabs, fixed_points,
                      hint_correction, likeness_of, propagate_hints, read_controls, vary)
from photo import (MADE, VERSION, ColorizeError, FlagError, Photo, check_target,
                   decode_photo, into_gamut, is_colored, lab_to_rgb, lightness, made_with,
                   photos_in, picture_sheet, read_photo, say, working_copy, write_photo)

STRIP = 1 << 19           # pixels of full resolution in memory at a time
ENLARGE = 2.0             # at most, of photographs smaller than the working size
# working sizes asked, as shares of --size, and their weights: the small one sees things
# whole, the last one small figures; mirror images and a third size gained nothing
SCALES = ((0.5, 0.5), (1.0, 0.5))
# what an array may be: its kind, dimensions, channels; a fourth is transparency
ARRAYS = ("uint8", 2), ("uint16", 2), ("uint8", 3, 3), ("uint8", 3, 4)


# --------------------------------------------------------------------------- one photograph

class Prediction(NamedTuple):
    """What the network says of a photograph, at working resolution, on the CPU."""
    L: np.ndarray             # (h, w)
    values: np.ndarray        # logits (Q, ceil(h/4), ceil(w/4)) of bins, or ab (2, h, w)
    likeness: np.ndarray      # (P, P) of the places, rows sum to one
    places: tuple[int, int]   # rows and columns of the places


@torch.inference_mode()
def predict(model: ColorNet, image: Image.Image, size: int) -> Prediction:
    """Ask the network at several working sizes, average, and let alike places agree.

    Raises ColorizeError where a value is not finite.
    """
    device, total = next(model.parameters()).device, 0
    bins = model.arguments["head"] == "bins"
    full = working_copy(image, size, ENLARGE)
    shape = full.size[::-1]  # Pillow's is (width, height)
    if bins:  # colours are classified at a quarter of the resolution
        shape = [-(-side // 4) for side in shape]
    for scale, weight in SCALES:
        copy = full if scale == 1 else working_copy(full, max(round(size * scale), 32))
        L = lightness(copy)  # (h, w)
        levels = model.encode(torch.from_numpy(L)[None, None].to(device))
        output = model.color(levels, L.shape).float().cpu()  # (1, Q or 2, ...)
        if bins:  # a product of probabilities, not their mean: both sizes must agree
            output = output.log_softmax(dim=1)
        total = total + weight * upsample(output, shape)
    likeness, places = likeness_of(L, levels)  # of the last size, the full one
    values = agree(total[0].numpy(), likeness, places)
    if not np.isfinite(values).all():
        raise ColorizeError("the checkpoint gives colours that are not finite: it is "
                            "damaged; use another --model")
    return Prediction(L, values, likeness, places)


def guide_slope(L: np.ndarray, ab: np.ndarray) -> np.ndarray:
    """The guided filter's mean coefficient (h, w, 2), in ab units a unit of L; radius 1."""
    def mean(x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    guide, colors = (torch.from_numpy(x).double() for x in (L[None], ab.transpose(2, 0, 1)))
    variance = mean(guide ** 2) - mean(guide) ** 2
    covariance = mean(guide * colors) - mean(guide) * mean(colors)
    slope = mean(covariance / (variance + 10))  # epsilon: 1e-3 for L in 0..1, here 0..100
    return slope.permute(1, 2, 0).float().numpy()


def guided_upsampler(L_small: np.ndarray, ab: np.ndarray, width: int, height: int):
    """A function that gives ab at the photograph's size, edge-aware, any rows at a time.

    bicubic(ab) + a * (L - bicubic(L_small)); a: the regression of ab (h, w, 2) on L_small
    (h, w), both at the network's resolution, of the guided filter (He and Sun 2015).
    """
    planes = np.dstack([L_small, ab, guide_slope(L_small, ab)]).transpose(2, 0, 1)
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]
    scale = len(L_small) / height

    def enlarge(L, top):
        """L (rows, W), the photograph's from row `top` on, to ab (rows, W, 2)."""
        box = (0, top * scale, planes[0].width, (top + len(L)) * scale)
        up = np.dstack([plane.resize((width, len(L)), Image.Resampling.BICUBIC, box=box)
                        for plane in planes])  # (rows, W, 5)
        return up[..., 1:3] + up[..., 3:] * (L - up[..., 0])[..., None]
    return enlarge


def render(image: Image.Image, L_small: np.ndarray, ab: np.ndarray, hints: tuple = (),
           deep: bool = False) -> tuple[Image.Image | np.ndarray, np.ndarray]:
    """The photograph with ab (h, w, 2) at full resolution, in gamut; and its mean ab.

    L_small: L (h, w) of ab's resolution. deep: uint16 (H, W, 3), else a Pillow RGB image.
    """
    width, height = image.size
    enlarge = guided_upsampler(L_small, ab, width, height)
    correct = hint_correction(image, enlarge, hints, width / L_small.shape[1])
    rows = max(1, STRIP // width)  # whole rows, as Pillow crops and pastes them fast
    white, kind = (65535, np.uint16) if deep else (255, np.uint8)
    result = np.empty((height, width, 3), kind) if deep else Image.new("RGB", image.size)

    def strip(top):
        L = lightness(image.crop((0, top, width, min(top + rows, height))))
        colors = enlarge(L, top)  # (rows, W, 2)
        correct(L, colors, top)
        colors = into_gamut(L, colors)  # last, so that no control can change lightness
        rgb = lab_to_rgb(L, colors)
        return top, np.rint(rgb * white).astype(kind), colors.sum(axis=(0, 1), dtype=float)
    total = np.zeros(2)  # of ab, for the mean
    # two threads; a window of three bounds what waits to be pasted
    for top, pixels, sums in ordered_map(strip, range(0, height, rows), 2, window=3):
        total += sums
        if deep:
            result[top:top + len(pixels)] = pixels
        else:
            result.paste(Image.fromarray(pixels), (0, top))
    return result, total / (width * height)


def add_color(model: ColorNet, image: Image.Image, prediction: Prediction,
              controls: Controls, deep: bool = False) -> tuple:
    """A prediction with its controls as picture, its mean ab, and the mean ab asked for."""
    L, values, colors = prediction.L, prediction.values, None
    if model.arguments["head"] == "bins":
        colors = model.bins.cpu().numpy()
        if controls.variant:
            values = vary(values, colors, prediction.likeness, prediction.places,
                          model.temperature, controls)
        # under 1 the temperature makes what is likely likelier: less brown
        values = torch.softmax(torch.from_numpy(values) / model.temperature, dim=0).numpy()
        colors = colors * model.saturation  # a mean is paler than what it is the mean of
    elif controls.variant:
        raise FlagError("--variant needs a checkpoint trained with --loss bins")
    ab, wanted = apply_controls(values, L, colors, controls)
    if controls.hints or controls.dabs is not None:
        fixed, target = (fixed_points(controls.hints, image, L) if controls.hints else
                         fixed_dabs(controls.dabs, image, L.shape))
        ab = propagate_hints(L, into_gamut(L, ab), fixed, target, prediction.likeness,
                             prediction.places)
    return *render(image, L, ab, controls.hints, deep), wanted


def colorize(model: ColorNet | str | Path | None,
             image: Image.Image | np.ndarray | str | Path, size: int = 256,
             controls: Controls = Controls()) -> Image.Image | np.ndarray:
    """Colour one photograph: its L stays, ab comes from the network.

    model: or its file; None: the shipped one. image: or its file, or one of ARRAYS, sRGB.
    Returns a Pillow RGB image of the same size, of 16-bit gray a uint16 array (H, W, 3).
    """
    if not isinstance(model, ColorNet):  # its file, or none
        model = load_checkpoint(model or PRETRAINED)[0]
    if isinstance(image, np.ndarray):
        kind = (image.dtype.name, image.ndim, *image.shape[2:])  # channels, if it has any
        image = Image.fromarray(image) if kind in ARRAYS else None
    if isinstance(image, (str, Path)):  # the first page of several
        image = read_photo(Path(image)).image
    elif isinstance(image, Image.Image) and min(image.size):
        image = decode_photo(image).image
    else:
        raise ColorizeError("colorize: image must be a path, a Pillow image, or an array, "
                            "uint8 (H, W) or (H, W, 3), or uint16 (H, W)")
    prediction = predict(model, image, size)
    return add_color(model, image, prediction, controls, image.mode == "I;16")[0]


# ----------------------------------------------------------------------- files and folders

def load_model(model: str | Path | None, device: str) -> tuple[ColorNet, Path, dict]:
    """The checkpoint named, else checkpoints/best_model.tar, else the shipped one."""
    own = Path("checkpoints/best_model.tar")  # where train writes, seen from here
    path = Path(model or (own if own.is_file() else PRETRAINED))
    network, contents = load_checkpoint(path, choose_device(device))
    return network, path, contents


class Job(NamedTuple):
    """What a run does to each photograph; the same for all of them."""
    model: ColorNet
    size: int
    controls: Controls
    kind: str            # color, compare, sheet or grid
    description: str     # written into each result, so that it can be told from others
    max_megapixels: float
    overwrite: bool
    invert: bool


def find_sources(images: list[str], output: Path) -> dict[Path, Path]:
    """{photograph: folder of its result} of files and folders; results are left out."""
    folders, results = {}, output.resolve()
    for image in images:
        if "://" in image:
            raise ColorizeError(f"{image}: is an address; download it and name the file")
        source = Path(image)
        if not source.is_dir():  # nor need it exist: that is said when it is read
            folders[source] = output
            continue
        inside = source.resolve() in results.parents
        for path in find_photos(source):
            below = inside and results in path.resolve().parents
            if not below and not made_with(path):  # results may lie beside originals
                folders[path] = output / path.relative_to(source).parent
    if not folders:
        raise ColorizeError(f"{' '.join(images)}: no photograph below it; name one, or "
                            "another folder")
    return folders


def plan_outputs(images: list[str], output: Path, ending: str,
                 extension: str | None) -> list[tuple[Path, Path]]:
    """(photograph, result) of each: as asked, else a TIFF for a TIFF, a PNG for others."""
    plan = {}
    for source, folder in find_sources(images, output).items():
        own = "tif" if source.suffix.lower() in (".tif", ".tiff") else "png"
        plan[source] = folder / f"{source.stem}_{ending}.{extension or own}"
    if "." in output.name and not output.is_dir():  # a file
        if extension:
            raise FlagError(f"--output {output}: its ending is the format; no --format")
        if len(plan) > 1:
            raise ColorizeError(f"--output {output}: is one file for {len(plan)} "
                                "photographs; name a folder, or make that one")
        return [(source, output) for source in plan]
    # what is alike but for case, or named as a photograph is, keeps its ending, too
    for _ in range(3):  # a.jpg and A.png; these may then meet another's a.jpg_color.png
        taken = Counter(str(p.absolute()).casefold() for p in [*plan, *plan.values()])
        plan = {path: target if taken[str(target.absolute()).casefold()] == 1 else
                target.with_stem(f"{path.name}_{ending}") for path, target in plan.items()}
    target, count = Counter(plan.values()).most_common(1)[0]
    if count > 1:
        raise ColorizeError(f"{target}: is the result of several photographs; name one "
                            "folder at a time")
    return list(plan.items())


def color_file(job: Job, pair: tuple[Path, Path]) -> str | ColorizeError:
    """Colour one photograph of a plan: the line to print, "" if it was there; an error."""
    (source, target), start = pair, time.monotonic()
    try:
        tiff = check_target(target) == "TIFF"  # first: of a long name nothing can be asked
        if target.exists() and source.exists() and target.samefile(source):
            raise ColorizeError(f"{target}: is the photograph itself; name another place")
        # by its content: two boxes of scans have photographs of the same names
        mine = f", photograph {content_hash(source)[:12]}" if source.is_file() else ""
        made, there = job.description + mine, made_with(target) if target.is_file() else ""
        if there == made and not job.overwrite:
            return ""
        if target.is_file() and not there.endswith(mine) and not job.overwrite:
            raise ColorizeError(f"{target}: is there, and no result of {source} as that is "
                                "now; name another --output, or give --overwrite")
        # the block keeps room for its pixels until they are written
        with photos_in(source, job.max_megapixels) as photos:
            modes = [photo.image.mode for photo in photos]
            if len(photos) > 1 and not tiff:
                raise ColorizeError(f"{source}: has {len(photos)} pages, which only a .tif "
                                    "can hold; name one as --output, or --format tif")
            if len(photos) > 1 and (job.controls.hints or job.controls.dabs):
                raise FlagError(f"--hints are for one photograph, {source} has "
                                f"{len(photos)} pages; export the page alone")
            width, height = photos[0].image.size
            across = 2 * width if job.kind == "compare" else width
            if job.kind != "sheet":  # which is small, whatever the photograph
                check_target(target, max(across, height))
            deep = tiff and modes == ["I;16"] and job.kind == "color"
            pictures, remarks = zip(*(make_picture(job, photo, deep) for photo in photos))
            lost = write_photo(target, list(pictures), photos[0], made)
    except ColorizeError as error:  # one bad scan does not stop the others
        return error
    # each remark once, however many pages it is true of
    remarks = [remark for page in remarks for remark in page] + [lost]
    if there != made and there.endswith(mine):
        remarks.append("in place of one made with other settings")
    line = f"{source} -> {target} ({width}x{height}, {time.monotonic() - start:.1f} s)"
    return "; ".join([line] + [remark for remark in dict.fromkeys(remarks) if remark])


def make_picture(job: Job, photo: Photo, deep: bool) -> tuple:
    """The picture of one page that a job asks for, and remarks on it."""
    image, remarks = photo.image, [photo.note]
    if job.invert:  # a negative, of 8 bits or 16
        image = Image.fromarray(~np.asarray(image))
    if job.kind == "grid":
        return draw_grid(image), remarks
    if job.kind == "sheet":
        return make_sheet(job.model, image, job.size), remarks
    prediction = predict(job.model, image, job.size)
    picture, mean, wanted = add_color(job.model, image, prediction, job.controls, deep)
    if image.mode == "I;16" and not deep and job.kind == "color":
        remarks.append("16-bit gray was written as 8-bit; a .tif of one page keeps it")
    if is_colored(image):
        remarks.append("has colour already: only its lightness was used")
    if wanted is not None:
        remarks.append("mean ab {:.1f},{:.1f} asked, {:.1f},{:.1f} achieved".format(
            *wanted, *mean))
        hinted = job.controls.hints or job.controls.dabs  # which move the mean, too
        if np.linalg.norm(wanted - mean) > 1 and not hinted:
            remarks[-1] += ": the target is out of reach, this is the nearest found"
    if job.kind == "compare":
        L = prediction.L  # its gray is that of the result, bit for bit
        gray, _ = render(image, L, np.zeros((*L.shape, 2), np.float32))
        both = gray.crop((0, 0, 2 * image.width, image.height))  # room on its right
        both.paste(picture, (image.width, 0))
        picture = both
    elif photo.alpha is not None and not deep:
        picture.putalpha(photo.alpha)
    return picture, remarks


def make_sheet(model: ColorNet, image: Image.Image, size: int) -> Image.Image:
    """Every mood and four variants of one photograph, with their flags below."""
    image = working_copy(image, max(size, 288))  # no larger than its tile
    choices = {"no flag": Controls()} | {f"--mood {name}": MOODS[name] for name in MOODS}
    if model.arguments["head"] == "bins":  # an ab head has no distribution to vary
        choices |= {f"--variant {n}": Controls(variant=n) for n in (1, 2, 3, 4)}
    prediction = predict(model, image, size)
    tiles = [add_color(model, image, prediction, controls)[0]
             for controls in choices.values()]
    return picture_sheet(tiles, 5, list(choices), 288)


def draw_grid(image: Image.Image) -> Image.Image:
    """The photograph with labelled lines of its pixel coordinates, to find hints by."""
    steps = (digit * 10 ** power for power in range(1, 6) for digit in (1, 2, 5))
    step = next(n for n in steps if max(image.size) <= 12 * n)  # 5 to 12 lines
    picture = working_copy(image, max(image.size)).convert("RGB")  # of its own size
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(10, max(image.size) // 60))
    for at in range(step, max(image.size), step):  # across, and down
        for start, end in (((at, 0), (at, image.height)), ((0, at), (image.width, at))):
            draw.line([start, end], "#e04020", max(1, max(image.size) // 1000))
            draw.text(start, str(at), "yellow", font, stroke_width=2, stroke_fill="black")
    return picture


def inference(*, image: list[str] = ("data/input/val",), model: str | None = None,
              output: Path = Path("data/output"), size: int = 256,
              device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
              overwrite: bool = False,
              format: Literal["png", "tif", "jpg", "webp"] | None = None,
              suffix: str = "color", invert: bool = False, max_megapixels: float = 250.0,
              mood: Literal["warm", "cool", "golden", "moonlight", "vintage", "muted",
                            "vivid", "sepia"] | None = None,
              mean_color: str | None = None, reference: str | None = None,
              variant: int = 0, strength: float = 1.0, saturation: float | None = None,
              hints: str | None = None, sheet: bool = False, compare: bool = False,
              grid: bool = False) -> None:
    """Colour gray photographs: files, or folders of them.

    What and where:
    image: photographs or folders
    model: checkpoint; else checkpoints/best_model.tar, else the shipped one
    output: folder for NAME_color.png, or a file (its extension is the format)
    overwrite: replace what is not a result of the same photograph, too
    format: of the results; else tif for a tif, png for all others
    suffix: the results' ending, in place of color
    size: short side at which the network works (32..2048)
    device: where to compute
    invert: the photograph is a negative
    max_megapixels: refuse larger photographs (1..10000)

    Colours:
    mood: a bundle of mean colour and saturation
    mean_color: average colour wanted: #rrggbb, or a,b in CIE units
    reference: photograph whose mean colour and colour spread are wanted
    variant: another plausible colouring, a number for each; 0 is the usual one (0..1000000)
    strength: of mood, mean_color, reference or variant (0..1)
    saturation: factor on the colours; 1 leaves them (0..4)
    hints: colours you know: x,y,#rrggbb; x,y,#rrggbb, a .txt of these, or a dabbed copy

    Instead of the coloured photograph:
    compare: gray and colour side by side
    sheet: one picture of every mood and four variants, with their flags
    grid: the photograph with its pixel coordinates, to find hints by
    """
    asked = {"sheet": sheet, "compare": compare, "grid": grid}
    kind, *others = [name for name, on in asked.items() if on] or ["color"]
    if others:
        raise FlagError(f"--{kind} and --{others[0]}: give one")
    # mistakes in flags are found before the checkpoint is read
    controls = read_controls(mood, mean_color, reference, strength, saturation, hints,
                             variant)
    if (sheet or grid) and controls != Controls():
        raise FlagError("--sheet shows moods and variants, --grid the photograph: leave "
                        "out the colour flags")
    network, path, contents = load_model(model, device)
    say(f"loaded {path} ({contents['model']['encoder']}, {contents['model']['head']}) "
        f"on {next(network.parameters()).device}")
    # in each result: what was made otherwise is made again
    settings = {"checkpoint": content_hash(path)[:12], "size": size, "kind": kind,
                "invert": invert or None, **controls._asdict(),
                "dabs": controls.dabs and content_hash(Path(hints))[:12]}
    words = [f"{name} {x}" for name, x in settings.items() if x not in (None, ())]
    description = ", ".join([f"{MADE} {VERSION}", *words])
    job = Job(network, size, controls, kind, description, max_megapixels, overwrite, invert)
    # a caller from Python may give one path
    images = [image] if isinstance(image, (str, Path)) else image
    plan = plan_outputs([str(name) for name in images], Path(output),
                        kind if suffix == "color" else suffix, format)
    if hints and len(plan) > 1:
        raise FlagError("--hints are for one photograph, not several")
    run_plan(job, plan)


def run_plan(job: Job, plan: list[tuple[Path, Path]]) -> None:
    """Colour each photograph of a plan, two at a time; a line for each, then the counts."""
    failed, there = [], 0  # names; how many were done before
    # two threads: one photograph is read or written while the network works on another
    results = ordered_map(partial(color_file, job), plan, 2, window=3)
    for line, (source, _) in zip(progress(results, len(plan), "photographs"), plan):
        if isinstance(line, ColorizeError):
            if len(plan) == 1 or isinstance(line, FlagError):  # then it is the command's
                raise line
            failed.append(str(source))
            say(f"error: {line}")
        elif line:
            say(line, result=True)
        else:
            there += 1
    if len(plan) > 1 or there:
        again = " (--overwrite does them again)" * bool(there)
        say(f"{len(plan) - there - len(failed)} done, {there} already there with these "
            f"settings{again}, {len(failed)} failed", result=True)
    if failed:
        names = ", ".join(failed[:20]) + ", ..." * (len(failed) > 20)
        raise ColorizeError(f"{len(failed)} of {len(plan)} photographs could not be "
                            f"coloured: {names}; the reasons are above")


if __name__ == "__main__":
    raise SystemExit("type: python main.py inference --help")
