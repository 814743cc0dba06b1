"""Colour for gray photographs: colorize() and its controls; one photograph, a folder, a URL.

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
from PIL import Image, ImageColor
from torch.nn import functional as F

from basic_model import (PRETRAINED, ColorNet, choose_device, load_checkpoint, predict, tilt,
                         upsample)
from colorize_data import (MIN_CHROMA, VERSION, ColorizeError, FlagError, Photo, content_hash,
                           find_photos, gray_to_L, into_gamut, lab_to_linear, linear_to_srgb,
                           ordered_map, picture_sheet, read_photo, rgb_to_lab, say, write_photo)

STRIP = 1 << 20           # pixels of a strip: what is in memory at full resolution at a time
BATCH = 1 << 20           # pixels at working resolution that the network sees at once
BATCH_PIXELS = 50e6       # of the photographs that wait for it
MAX_DOWNLOAD = 200 << 20  # bytes
ENLARGE = 2.0             # at most, of photographs smaller than the working size
GUIDE_EPSILON = 10.0      # of the guided filter: 1e-3 for L in 0..1
HINT_SIGMA, HINT_MU = 0.02, 1e-4  # of the hints' spreading: L difference in 0..1; pull to zero
MADE = "_color.png", "_color.tif", "_sheet.png"  # endings of results


class Controls(NamedTuple):
    """What is wanted of the colours, in plain numbers; the neutral ones change no bit."""
    saturation: float = 1.0
    vividness: float = 1.0
    shift: tuple[float, float] | None = None   # of the mean ab
    target: tuple[float, float] | None = None  # the mean ab itself
    spread: float | None = None                # rms of ab about its mean, of a reference
    strength: float = 1.0
    hints: tuple = ()                          # (x, y, a, b) each


MOODS = {
    "warm": Controls(1.05, shift=(3, 8)),
    "cool": Controls(0.95, shift=(-3, -8)),
    "golden": Controls(1.15, shift=(5, 14)),
    "moonlight": Controls(0.6, shift=(0, -13)),
    "vintage": Controls(0.7, shift=(4, 7)),
    "muted": Controls(0.6),
    "vivid": Controls(1.5),
    "sepia": Controls(0.15, shift=(5, 16)),
}


# -------------------------------------------------------------------------------- controls

def hex_to_ab(text: str, flag: str) -> tuple[float, float]:
    """ab of "#rrggbb"."""
    try:
        red, green, blue = ImageColor.getrgb(text.strip())[:3]
    except ValueError:
        raise FlagError(f"{flag}: '{text.strip()}' is no colour; write #rrggbb") from None
    return tuple(rgb_to_lab(np.array([red, green, blue], np.uint8))[1:].tolist())


def read_mean_color(text: str) -> tuple[float, float]:
    """--mean_color: "#rrggbb" or "a,b"."""
    if "," not in text:
        return hex_to_ab(text, "--mean_color")
    try:
        a, b = (float(part) for part in text.split(","))
        if abs(a) <= 128 and abs(b) <= 128:  # nan is not
            return a, b
    except ValueError:
        pass
    raise FlagError(f"--mean_color {text}: write #rrggbb, or a,b, both within -128..128")


def read_hints(text: str) -> tuple:
    """--hints "x,y,#rrggbb; ..." as (x, y, a, b) each."""
    hints = []
    for part in filter(str.strip, text.split(";")):
        try:
            x, y, color = part.split(",", 2)
            x, y = int(x), int(y)
        except ValueError:
            raise FlagError(f"--hints '{part.strip()}': write x,y,#rrggbb; x,y,#rrggbb") from None
        hints.append((x, y, *hex_to_ab(color, "--hints")))
    return tuple(hints)


def read_controls(mood=None, mean_color=None, reference=None, strength=1.0, saturation=None,
                  vividness=None, hints=None) -> Controls:
    """The colour flags as Controls; FlagError for contradictions and values out of range."""
    flags = {"mood": mood, "mean_color": mean_color, "reference": reference}
    given = [f"--{name}" for name, value in flags.items() if value is not None]
    if len(given) > 1:
        raise FlagError(f"{' and '.join(given)} contradict each other: give one")
    if strength != 1 and not given:
        raise FlagError("--strength is that of --mood, --mean_color or --reference: give one")
    for name, value, low, high in (("strength", strength, 0, 1), ("saturation", saturation, 0, 4),
                                   ("vividness", vividness, 0.1, 10)):
        if value is not None and not low <= value <= high:
            raise FlagError(f"--{name} {value:g}: must be {low:g}..{high:g}")
    if mood is not None and mood not in MOODS:
        raise FlagError(f"--mood {mood}: choose one of {', '.join(MOODS)}")
    bundle = MOODS[mood] if mood else Controls()
    target, spread = None if mean_color is None else read_mean_color(mean_color), None
    if reference is not None:
        small = working_copy(read_photo(Path(reference)).image, 128).convert("RGB")
        ab = rgb_to_lab(np.asarray(small))[..., 1:]
        target, spread = tuple(ab.mean(axis=(0, 1)).tolist()), spread_of(ab)
    return Controls(  # explicit flags override a mood's own, which strength scales
        1 + strength * (bundle.saturation - 1) if saturation is None else saturation,
        1.0 if vividness is None else vividness,
        bundle.shift, target, spread, strength, read_hints(hints or ""))


def spread_of(ab: np.ndarray) -> float:
    """Root mean square distance of ab (..., 2) from its mean."""
    return float(np.sqrt(ab.reshape(-1, 2).var(axis=0, dtype=np.float64).sum()))


def move_mean(prediction: np.ndarray, L: np.ndarray, colors: np.ndarray | None,
              decode, target: np.ndarray) -> np.ndarray:
    """ab (h, w, 2) whose mean, once in gamut, is the target (2,) or as near as can be.

    A bins prediction (Q, h/4, w/4) is tilted, with the colors (Q, 2) that decode knows; an ab one
    (2, h, w), colors None, shifted, fading to nothing at black and white of L (h, w). Gamut takes
    some of the mean away: up to 5 rounds add what is missing to what is asked for.
    """
    best = plain = decode(prediction)
    asked, vector, nearest = np.array(target, np.float64), None, np.inf
    fade = np.clip(4 * (L / 100) * (1 - L / 100), 0, 1)[..., None]
    for _ in range(6):
        if colors is None:
            shift = (asked - plain.mean(axis=(0, 1))) / max(fade.mean(), 1e-3)
            ab = plain + fade * shift.astype(np.float32)
        else:
            flat = prediction.reshape(len(prediction), -1).T
            moved, vector = tilt(flat, colors, asked, vector)
            ab = decode(moved.T.reshape(prediction.shape).astype(np.float32))
        missing = target - into_gamut(L, ab).mean(axis=(0, 1))
        if np.linalg.norm(missing) < nearest:
            nearest, best = np.linalg.norm(missing), ab
        if nearest < 0.1:
            break
        asked = asked + missing
    return best


def spread_hints(L: np.ndarray, ab: np.ndarray, hints: list) -> np.ndarray:
    """Spread hints (x, y, a, b), pixels of L (h, w), over what is like them around; returns ab.

    Minimizes sum w_rs (d_r - d_s)^2 + mu sum d^2 over neighbours r, s for d, the difference from
    the prediction ab (h, w, 2), fixed on what is like the hint of a 5-pixel disc there; w_rs =
    exp(-(L_r - L_s)^2 / 2 sigma^2), at least 1e-6. After Levin, Lischinski and Weiss 2004, in a
    form that is solved in time.
    """
    y, x = np.mgrid[:L.shape[0], :L.shape[1]]
    free, d = np.ones_like(L), np.zeros((2, *L.shape), np.float32)
    for hx, hy, a, b in hints:
        like = np.abs(L - L[hy, hx]) <= 200 * HINT_SIGMA  # two sigma: not across an outline
        disc = ((x - hx) ** 2 + (y - hy) ** 2 <= 2.5 ** 2) & like
        free[disc], d[:, disc] = 0, np.array([[a], [b]]) - ab[hy, hx, :, None]
    down, right = (np.exp(-np.diff(L / 100, axis=axis) ** 2 / (2 * HINT_SIGMA ** 2)).clip(min=1e-6)
                   for axis in (0, 1))
    total = HINT_MU + (np.pad(down, ((0, 1), (0, 0))) + np.pad(down, ((1, 0), (0, 0)))
                       + np.pad(right, ((0, 0), (0, 1))) + np.pad(right, ((0, 0), (1, 0))))

    def gradient(d):  # zero where d is fixed
        result = total * d
        result[:, :-1] -= down * d[:, 1:]
        result[:, 1:] -= down * d[:, :-1]
        result[..., :-1] -= right * d[..., 1:]
        result[..., 1:] -= right * d[..., :-1]
        return free * result
    residual, direction, power, enough = -gradient(d), 0, np.float32(1), None
    for _ in range(3000):  # conjugate gradients, a and b side by side, scaled by the diagonal
        scaled = residual / total
        power, last = (residual * scaled).sum(axis=(1, 2), keepdims=True), power
        enough = 1e-9 * power.max() if enough is None else enough  # 0.3 ab units from exact
        if power.max() <= enough:
            break
        direction = scaled + power / np.maximum(last, 1e-30) * direction
        product = gradient(direction)
        rate = power / np.maximum((direction * product).sum(axis=(1, 2), keepdims=True), 1e-30)
        d += rate * direction
        residual -= rate * product
    return ab + d.transpose(1, 2, 0)


# ------------------------------------------------------------------- L, network, full resolution

def lightness(image: Image.Image) -> np.ndarray:
    """L (H, W) of a Pillow image of mode L, RGB or I;16."""
    pixels = np.asarray(image)
    return gray_to_L(pixels) if pixels.ndim == 2 else rgb_to_lab(pixels)[..., 0]


def working_copy(image: Image.Image, size: int, enlarge: float = 1.0) -> Image.Image:
    """The photograph at a short side of `size`, the long one at most 4 times that.

    Enlarged at most `enlarge` times. Long enough sides are multiples of 4, as the bins head likes.
    """
    scale = min(enlarge, size / min(image.size), 4 * size / max(image.size))
    sides = [max(round(side * scale), 1) for side in image.size]
    if scale != 1:
        sides = [max(round(side / 4) * 4, 1) if side >= 32 else side for side in sides]
    if image.mode != "I;16":
        return image.resize(sides, Image.Resampling.LANCZOS, reducing_gap=3.0)
    image = image.resize(sides, Image.Resampling.LANCZOS)  # 8 bits will do for the network
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def choose_colors(model: ColorNet, prediction: np.ndarray, L: np.ndarray,
                  controls: Controls) -> tuple[np.ndarray, np.ndarray | None]:
    """ab (h, w, 2) and the mean ab wanted, or None, from predict's for one photograph L (h, w).

    The order: (vividness is in the prediction,) saturation, then reference, mean or mood.
    """
    bins = model.arguments["head"] == "bins"
    colors = model.bins.cpu().numpy() * model.saturation if bins else None

    def decode(values, factor):
        ab = torch.from_numpy(values)[None]
        if colors is not None:
            ab = upsample(torch.einsum("nqhw,qc->nchw", ab, torch.from_numpy(colors)), L.shape)
        return (ab[0].permute(1, 2, 0) * factor).numpy()
    factor = controls.saturation
    plain = decode(prediction, factor)
    if not controls.strength or controls.shift is None and controls.target is None:
        return plain, None
    present = into_gamut(L, plain)
    if controls.spread is not None:
        ratio = np.clip(controls.spread / max(spread_of(present), 1e-3), 0.25, 4)
        factor = factor * float(ratio) ** controls.strength
    mean = present.mean(axis=(0, 1))
    goal = mean + np.array(controls.shift) if controls.shift else np.array(controls.target)
    wanted = mean + controls.strength * (goal - mean)
    tilting = colors is not None and factor >= 0.3  # under that little is left to tilt: a tint
    return move_mean(prediction, L, colors * factor if tilting else None,
                     lambda values: decode(values, factor), wanted), wanted


def guide_slope(L: np.ndarray, ab: np.ndarray) -> np.ndarray:
    """The guided filter's mean coefficient (h, w, 2), ab units for a unit of L; radius 1."""
    def mean(x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    guide, colors = (torch.from_numpy(x).double() for x in (L[None], ab.transpose(2, 0, 1)))
    variance = mean(guide ** 2) - mean(guide) ** 2
    covariance = mean(guide * colors) - mean(guide) * mean(colors)
    return mean(covariance / (variance + GUIDE_EPSILON)).permute(1, 2, 0).float().numpy()


def enlarger(L_small: np.ndarray, ab: np.ndarray, width: int, height: int):
    """A function that gives ab at the photograph's size, edge-aware, any rows at a time.

    L_small is (h, w), ab (h, w, 2), at the network's resolution.

    bicubic(ab) + a * (L - bicubic(L_small)), a the local regression of ab on L: the coefficient of
    the guided filter (He and Sun 2015), radius 1.
    """
    planes = np.dstack([L_small, ab, guide_slope(L_small, ab)]).transpose(2, 0, 1)
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]
    scale = len(L_small) / height

    def enlarge(L, top):  # L (rows, W), the photograph's from row `top` on, to ab (rows, W, 2)
        box = (0, top * scale, planes[0].width, (top + len(L)) * scale)
        L_up, a, b, slope_a, slope_b = (
            np.asarray(plane.resize((width, len(L)), Image.Resampling.BICUBIC, box=box))
            for plane in planes)
        detail = L - L_up
        return np.stack([a + slope_a * detail, b + slope_b * detail], axis=-1)
    return enlarge


def finish(image: Image.Image, small: np.ndarray, ab: np.ndarray, hints: tuple = (),
           deep: bool = False) -> tuple[Image.Image | np.ndarray, np.ndarray]:
    """The photograph with ab (h, w, 2) at full resolution, in gamut, strip by strip; its mean ab.

    small: L (h, w) at the resolution of ab. deep: uint16 (H, W, 3) rather than an RGB image.
    """
    width, height = image.size
    enlarge = enlarger(small, ab, width, height)
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


def hint_correction(image: Image.Image, enlarge, hint: tuple, scale: float):
    """A function that gives the hint's own pixel exactly its colour, and what is like it around.

    scale: pixels of the photograph for one of the network's.
    """
    x, y, *wanted = hint
    row = lightness(image.crop((0, y, image.width, y + 1)))
    missing, L_hint = np.array(wanted, np.float32) - enlarge(row, y)[0, x], row[0, x]
    radius = 2.5 * max(scale, 1.0)

    def correct(L, colors, top):
        dy, dx = np.arange(top, top + len(L)) - y, np.arange(L.shape[1]) - x
        near = np.ix_(np.abs(dy) <= 3 * radius, np.abs(dx) <= 3 * radius)
        distance = (dy[near[0]] ** 2 + dx[near[1]] ** 2) / radius ** 2
        unlike = (L[near] - L_hint) ** 2 / (2 * (100 * HINT_SIGMA) ** 2)
        colors[near] += np.exp(-distance - unlike)[..., None].astype(np.float32) * missing
    return correct


def add_color(model: ColorNet, image: Image.Image, small: np.ndarray, prediction: np.ndarray,
              controls: Controls, deep: bool = False) -> tuple:
    """Controls, hints, full resolution, gamut: picture, its mean ab, the mean ab asked for."""
    ab, wanted = choose_colors(model, prediction, small, controls)
    scale, hints = small.shape[1] / image.width, []
    for x, y, a, b in controls.hints:
        if not (0 <= x < image.width and 0 <= y < image.height):
            raise FlagError(f"--hints: {x},{y} is outside the photograph, which is "
                            f"{image.width}x{image.height}; the origin is the top left")
        hints.append((int(x * scale), int(y * small.shape[0] / image.height), a, b))
    if hints:
        ab = spread_hints(small, into_gamut(small, ab), hints)
    return *finish(image, small, ab, controls.hints, deep), wanted


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


# ------------------------------------------------------------------------------- the command

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
            gray, _ = finish(image, job.small, np.zeros((*job.small.shape, 2), np.float32))
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
