"""Colour for gray photographs: colorize(); one photograph, a folder, an address.

    python main.py inference --image x.png --model checkpoints/best_model.tar
    python main.py inference --image archive/ --output coloured/ --mood warm
    python main.py inference --image x.png --hints "120,80,#c03020" --compare
    python main.py inference --image x.png --sheet      # every mood, to choose from

L of the photograph is kept to rounding; the network only adds ab.
"""

import http.client
import tempfile
import time
import urllib.parse
import urllib.request
from collections import Counter
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from basic_model import PRETRAINED, ColorNet, choose_device, load_checkpoint
from controls import (MOODS, Controls, apply_controls, hint_correction, propagate_hints,
                      read_controls)
from photo import (MIN_CHROMA, VERSION, ColorizeError, FlagError, Photo, content_hash, find_photos,
                   guided_upsampler, into_gamut, lab_to_linear, lightness, linear_to_srgb,
                   ordered_map, picture_sheet, read_photo, rgb_to_lab, say, spread_of,
                   working_copy, write_photo)

STRIP = 1 << 20           # pixels of a strip: what is in memory at full resolution at a time
BATCH = 1 << 20           # pixels at working resolution that the network sees at once
BATCH_PIXELS = 50e6       # of the photographs that wait for it
MAX_DOWNLOAD = 200 << 20  # bytes
ENLARGE = 2.0             # at most, of photographs smaller than the working size
MADE = "_color.png", "_color.tif", "_sheet.png"  # endings of results


# -------------------------------------------------------------------------- one photograph

@torch.inference_mode()
def predict(model: ColorNet, L: np.ndarray, vividness: float = 1.0) -> np.ndarray:
    """L (N, h, w) to probabilities (N, Q, ceil(h/4), ceil(w/4)) of a bins head or ab (N, 2, h, w).

    The mean of the predictions for the photograph and for its mirror image, on the CPU. vividness:
    divides the temperature of a bins head. Raises FlagError, or ColorizeError without the memory.
    """
    if vividness != 1 and model.arguments["head"] != "bins":
        raise FlagError("--vividness needs a checkpoint trained with --loss bins; use --saturation")
    device = next(model.parameters()).device
    gray = torch.from_numpy(np.ascontiguousarray(L))[:, None].to(device)
    try:
        output = model(torch.cat([gray, gray.flip(-1)])).float()
    except torch.OutOfMemoryError:
        raise ColorizeError(f"the {device.type} ran out of memory: a smaller --size, "
                            "or --device cpu") from None
    if model.arguments["head"] == "bins":
        output = torch.softmax(output * (vividness / model.temperature), dim=1)
    plain, mirrored = output.chunk(2)
    return ((plain + mirrored.flip(-1)) / 2).cpu().numpy()


def render(image: Image.Image, small: np.ndarray, ab: np.ndarray, hints: tuple = (),
           deep: bool = False) -> tuple[Image.Image | np.ndarray, np.ndarray]:
    """The photograph with ab (h, w, 2) at full resolution, in gamut, strip by strip; its mean ab.

    small: L (h, w) at the resolution of ab. deep: uint16 (H, W, 3) rather than an RGB image.
    """
    width, height = image.size
    enlarge = guided_upsampler(small, ab, width, height)
    corrections = [hint_correction(image, enlarge, hint, width / small.shape[1]) for hint in hints]
    rows = max(1, STRIP // width)
    result = np.empty((height, width, 3), np.uint16) if deep else Image.new("RGB", image.size)

    def strip(top):
        L = lightness(image.crop((0, top, width, min(top + rows, height))))
        colors = enlarge(L, top)
        for correct in corrections:
            correct(L, colors, top)
        colors = into_gamut(L, colors)
        rgb = linear_to_srgb(lab_to_linear(L, colors))
        pixels = np.rint(rgb * (65535 if deep else 255)).astype(np.uint16 if deep else np.uint8)
        return top, pixels, colors.sum(axis=0).sum(axis=0, dtype=np.float64)
    total = np.zeros(2)
    for top, pixels, sums in ordered_map(strip, range(0, height, rows), 2, window=3):
        total += sums
        if deep:
            result[top:top + len(pixels)] = pixels
        else:
            result.paste(Image.fromarray(pixels), (0, top))
    return result, total / (width * height)


def add_color(model: ColorNet, image: Image.Image, small: np.ndarray, prediction: np.ndarray,
              controls: Controls, deep: bool = False) -> tuple:
    """Controls, hints, full resolution, gamut: picture, its mean ab, the mean ab asked for."""
    ab, wanted = apply_controls(model, prediction, small, controls)
    scale, hints = small.shape[1] / image.width, []
    for x, y, a, b in controls.hints:
        if not (0 <= x < image.width and 0 <= y < image.height):
            raise FlagError(f"--hints: {x},{y} is outside the photograph, which is "
                            f"{image.width}x{image.height}; the origin is the top left")
        hints.append((int(x * scale), int(y * small.shape[0] / image.height), a, b))
    if hints:
        ab = propagate_hints(small, into_gamut(small, ab), hints)
    return *render(image, small, ab, controls.hints, deep), wanted


def colorize(model: ColorNet, image: Image.Image | np.ndarray, size: int = 256,
             mood: str | None = None, mean_color: str | None = None,
             reference: str | Path | None = None, strength: float = 1.0,
             saturation: float | None = None, vividness: float | None = None,
             hints: str | None = None) -> Image.Image | np.ndarray:
    """Colour one photograph: its L stays, ab comes from the network.

    image: Pillow (mode L, RGB, I;16) or array uint8/uint16 (H, W) or uint8 (H, W, 3), sRGB. The
    other parameters are inference's flags. Returns a Pillow RGB image of the same size, or for
    16-bit gray a uint16 array (H, W, 3). Raises FlagError for controls that make no sense.
    """
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    controls = read_controls(mood, mean_color, reference, strength, saturation, vividness, hints)
    small = lightness(working_copy(image, size, ENLARGE))
    prediction = predict(model, small[None], controls.vividness)[0]
    return add_color(model, image, small, prediction, controls, image.mode == "I;16")[0]


# ----------------------------------------------------------------------------- the command

def load_model(model: str | Path | None, device: str) -> tuple[ColorNet, Path, dict]:
    """The checkpoint named, else checkpoints/best_model.tar, else the shipped one."""
    own = Path("checkpoints/best_model.tar")
    path = Path(model or (own if own.is_file() else PRETRAINED))
    network, contents = load_checkpoint(path, choose_device(device))
    return network, path, contents


def download(url: str, folder: Path) -> Path:
    """Fetch an http(s) URL into a folder, at most MAX_DOWNLOAD bytes; ColorizeError otherwise."""
    if not url.startswith(("http://", "https://")):
        raise ColorizeError(f"{url}: only http and https are fetched; download it yourself")
    try:
        name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "photograph"
        with urllib.request.urlopen(url, timeout=30) as response:
            if not response.url.startswith(("http://", "https://")):
                raise ValueError("it leads to something else than http")
            content = response.read(MAX_DOWNLOAD + 1)
        if len(content) > MAX_DOWNLOAD:
            raise ValueError(f"it is over {MAX_DOWNLOAD >> 20} MB")
        (folder / name).write_bytes(content)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ColorizeError(f"{url}: cannot be fetched ({error}); download it yourself") from None
    return folder / name


def plan_outputs(image: str, output: Path, folder: Path, kind: str) -> list[tuple]:
    """(input, output) of every photograph asked for. `folder`: where downloads go."""
    source = download(image, folder) if "://" in image else Path(image)
    if not source.is_dir():
        named = output.suffix.lower() in Image.registered_extensions() and not output.is_dir()
        return [(source, output if named else output / f"{source.stem}_{kind}.png")]
    plan, paths = {}, find_photos(source)
    alike = Counter(path.with_suffix("") for path in paths)  # a.jpg and a.png keep their endings
    for path in paths:
        stem = path.stem if alike[path.with_suffix("")] == 1 else path.name
        plan[path] = output / path.relative_to(source).with_name(f"{stem}_{kind}.png")
    results = {target.with_name(target.name.removesuffix(f"_{kind}.png") + made).resolve()
               for target in plan.values() for made in MADE}
    inside = output.resolve()
    plan = [(path, target) for path, target in plan.items() if path.resolve() not in results
            and (inside == source.resolve() or inside not in path.resolve().parents)]
    if not plan:
        raise ColorizeError(f"{source}: no photograph below it; name one, or another folder")
    return plan


class Job(NamedTuple):
    """A page of a photograph, read and reduced, on its way through the network."""
    source: Path
    target: Path
    photo: Photo
    small: np.ndarray  # L at working resolution
    start: float       # time


def inference(*, image: str = "data/input/val", model: str | None = None,
              output: Path = Path("data/output"), size: int = 256,
              device: Literal["auto", "cpu", "cuda", "mps"] = "auto", overwrite: bool = False,
              mood: Literal["warm", "cool", "golden", "moonlight", "vintage", "muted", "vivid",
                            "sepia"] | None = None,
              mean_color: str | None = None, reference: str | None = None, strength: float = 1.0,
              saturation: float | None = None, vividness: float | None = None,
              hints: str | None = None, sheet: bool = False, compare: bool = False,
              max_megapixels: float = 300.0) -> None:
    """Colour a gray photograph, a folder of them, or one at an http address.

    image: photograph, folder or URL
    model: checkpoint; else checkpoints/best_model.tar, else the shipped one
    output: file (its extension is the format), or folder for NAME_color.png
    size: short side at which the network works
    device: where to compute
    overwrite: in a folder, do again what is already there
    mood: a bundle of mean colour and saturation
    mean_color: average colour wanted: #rrggbb, or a,b in CIE units
    reference: photograph whose mean colour and colour spread are wanted
    strength: of mood, mean_color or reference, 0..1
    saturation: factor on the colours; 1 leaves them
    vividness: above 1 decides for the likeliest colours (bins checkpoints)
    hints: exact colours at pixels: x,y,#rrggbb; x,y,#rrggbb
    sheet: one picture of every mood and three vividness values, with their flags
    compare: write gray and colour side by side
    max_megapixels: refuse larger photographs
    """
    if not 32 <= size <= 2048:
        raise FlagError(f"--size {size}: must be 32..2048")
    controls = read_controls(mood, mean_color, reference, strength, saturation, vividness, hints)
    if sheet and (compare or controls != Controls()):
        raise FlagError("--sheet shows every mood: leave out --compare and the colour flags")
    network, path, contents = load_model(model, device)
    say(f"loaded {path} ({contents['model']['encoder']}, {contents['model']['head']}) "
        f"on {next(network.parameters()).device}")
    settings = {"checkpoint": content_hash(path)[:12], "size": size, **controls._asdict()}
    description = ", ".join([f"Colours added by colorize {VERSION}"] + [
        f"{name} {value}" for name, value in settings.items() if value not in (None, ())])
    write = partial(write_pages, network, controls, description, compare)
    if sheet:
        write = partial(write_sheet, network, size, description)
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_outputs(str(image), output, Path(folder), "sheet" if sheet else "color")
        if hints and len(plan) > 1:
            raise FlagError("--hints are for one photograph, not a folder")
        left = [(source, target) for source, target in plan  # several pages become a .tif
                if overwrite or not Path(image).is_dir()
                or not (target.exists() or target.with_suffix(".tif").exists())]
        errors = run_photos(network, left, size, controls.vividness, max_megapixels, write)
    if len(plan) > 1:
        there = len(plan) - len(left)
        print(f"{len(left) - len(errors)} done, {there} already there"
              + " (--overwrite does them again)" * bool(there) + f", {len(errors)} failed")
    if errors:
        raise errors[0] if len(left) == 1 else ColorizeError(
            f"{len(errors)} of {len(plan)} photographs could not be coloured; see above")


def read_pages(size: int, limit: float, pair: tuple[Path, Path]) -> list[Job]:
    """The pages of a photograph (one, but for TIFFs), ready for the network; limit: megapixels."""
    (source, target), start = pair, time.monotonic()
    first = read_photo(source, max_megapixels=limit)
    if first.pages > 1:
        if first.pages * first.image.width * first.image.height > limit * 1e6:
            raise ColorizeError(f"{source}: its {first.pages} pages together are over the limit of "
                                f"{limit:g} megapixels; raise --max_megapixels")
        if target.name.endswith(MADE):  # not the user's own choice
            target = target.with_suffix(".tif")
        if target.suffix.lower() not in (".tif", ".tiff"):
            raise ColorizeError(f"{source}: has {first.pages} pages; name a .tif as --output")
    if target.exists() and target.samefile(source):
        raise ColorizeError(f"{target}: is the photograph itself; name another --output")
    pages = [first] + [read_photo(source, n, max_megapixels=limit) for n in range(1, first.pages)]
    return [Job(source, target, page, lightness(working_copy(page.image, size, ENLARGE)), start)
            for page in pages]


def batches(jobs):
    """Consecutive jobs of equal working shape together, up to BATCH and BATCH_PIXELS."""
    for _, alike in groupby(jobs, key=lambda job: job.small.shape):
        batch, pixels = [], 0
        for job in alike:
            batch.append(job)
            pixels += job.photo.image.width * job.photo.image.height
            if len(batch) * job.small.size > BATCH - job.small.size or pixels > BATCH_PIXELS:
                yield batch
                batch, pixels = [], 0
        if batch:
            yield batch


def run_photos(model: ColorNet, plan: list, size: int, vividness: float, max_megapixels: float,
               write) -> list[ColorizeError]:
    """Read, predict in batches, write, few photographs at a time; returns what went wrong.

    plan: (input, output) each; write: [(Job, prediction)] of a photograph to the line to print.
    """
    errors = []

    def attempt(function, argument):  # None where it failed
        try:
            return function(argument)
        except ColorizeError as error:
            errors.append(error)
            if len(plan) > 1:
                say(f"error: {error}")

    def predicted():
        read = partial(attempt, partial(read_pages, size, max_megapixels))
        photographs = filter(None, ordered_map(read, plan, 2, window=2))
        for batch in batches(chain.from_iterable(photographs)):
            yield from zip(batch, predict(model, np.stack([job.small for job in batch]), vividness))
    pages = (list(group) for _, group in groupby(predicted(), key=lambda pair: pair[0].source))
    for line in filter(None, ordered_map(partial(attempt, write), pages, 2, window=2)):
        print(line, flush=True)
    return errors


def write_sheet(model: ColorNet, size: int, description: str, pages: list) -> str:
    """Write a sheet of every mood and three vividness values; returns the line to print."""
    job = pages[0][0]
    choices = [{}] + [{"mood": mood} for mood in MOODS]
    if model.arguments["head"] == "bins":
        choices += [{"vividness": v} for v in (0.5, 2.0, 4.0)]
    image = working_copy(job.photo.image, max(size, 288))
    tiles = [colorize(model, image, size, **flags) for flags in choices]
    captions = [" ".join(f"--{k} {v}" for k, v in flags.items()) or "no flag" for flags in choices]
    picture = picture_sheet(tiles, 4, captions, 288)
    write_photo(job.target, [picture], job.photo, description)
    return f"{job.source} -> {job.target} ({picture.width}x{picture.height})"


def write_pages(model: ColorNet, controls: Controls, description: str, compare: bool,
                pages: list) -> str:
    """Colour and write the pages of one photograph; returns the line to print."""
    first, pictures, remarks = pages[0][0], [], []
    tiff = first.target.suffix.lower() in (".tif", ".tiff")
    for job, prediction in pages:
        image = job.photo.image
        deep = image.mode == "I;16" and len(pages) == 1 and not compare and tiff
        picture, mean, wanted = add_color(model, image, job.small, prediction, controls, deep)
        remarks.append(job.photo.note)
        if image.mode == "I;16" and not deep:
            remarks.append("16-bit gray was written as 8-bit; a .tif of one page keeps it")
        small = working_copy(image, 128).convert("RGB")
        if spread_of(rgb_to_lab(np.asarray(small))[..., 1:]) > MIN_CHROMA:
            remarks.append("has colour already: only its lightness was used")
        if wanted is not None:
            remarks.append("mean ab {:.1f},{:.1f} asked, {:.1f},{:.1f} achieved".format(
                *wanted, *mean))
            if np.linalg.norm(wanted - mean) > 1 and not controls.hints:
                remarks[-1] += ": the target is out of reach, this is the nearest found"
        if compare:
            gray, _ = render(image, job.small, np.zeros((*job.small.shape, 2), np.float32))
            both = gray.crop((0, 0, 2 * image.width, image.height))  # room on its right
            both.paste(picture, (image.width, 0))
            picture = both
        elif job.photo.alpha is not None and not deep:
            picture.putalpha(job.photo.alpha)
        pictures.append(picture)
    write_photo(first.target, pictures, first.photo, description)
    seconds = time.monotonic() - first.start
    line = f"{first.source} -> {first.target} ({image.width}x{image.height}, {seconds:.1f} s)"
    return "; ".join([line] + [remark for remark in dict.fromkeys(remarks) if remark])
