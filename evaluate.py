"""How good the colours are: metrics, baselines, the report, a training's curves.

    python main.py evaluate --model a.tar,b.tar --image photos/val  # against the truth
    python main.py evaluate --image old/          # gray: what needs no truth

Copies with a short side of at most 256 are coloured as by inference and scored. One name
means one thing in scores.csv, in evaluation.json and in a training's history.csv:

    psnr, ssim      of sRGB, in dB and up to 1; ciede2000: mean difference, 1 is just seen
    distance        mean in ab, CIE units; auc: share of pixels within it, over 0..150
    colorfulness    of the result, true_...: of the photograph; color_ratio: one over other
    even_change     of ab between even neighbours; over even_chroma it is the patchiness
    delta_L         mean difference of lightness; what remains is rounding
"""

import csv
import json
import math
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage.color import deltaE_ciede2000
from skimage.metrics import structural_similarity

from colorize_data import (SIDE, ColorizeData, content_hash, decode_lab, find_photos,
                           ordered_map, progress)
from controls import Controls, read_controls
from inference import colorize, load_model
from photo import (MADE, ColorizeError, FlagError, Photo, is_colored, lab_to_image,
                   lab_to_rgb, lightness, picture_sheet, printable, read_photo, rgb_to_lab,
                   say, working_copy, write_atomically, write_photo)

# rows of the table: score, heading, digits
SCORES = {"psnr": ("PSNR, dB", 2), "ssim": ("SSIM", 3), "ciede2000": ("CIEDE2000", 2),
          "distance": ("ab distance", 2), "auc": ("AuC", 3),
          "colorfulness": ("colourfulness", 1), "color_ratio": ("... over the truth's", 3),
          "patchiness": ("patchiness", 3),
          "true_patchiness": ("... of the truth", 3), "delta_L": ("|dL|", 3)}
# of means over all photographs: one nearly without colour would rule a mean of ratios
RATIOS = {"color_ratio": ("colorfulness", "true_colorfulness"),
          "patchiness": ("even_change", "even_chroma"),
          "true_patchiness": ("true_even_change", "true_even_chroma")}
LITTLE = 0.5  # ab units: rounding to 8 bits leaves less in a gray picture
MEAN_COLOR = "mean ab for each L"
BASELINES = ("gray", MEAN_COLOR)  # their names; the others are checkpoints


# ---------------------------------------------------------------------------------- metrics

def ab_error(ab: np.ndarray, true_ab: np.ndarray) -> np.ndarray:
    """sqrt(da^2 + db^2) of each pixel of ab (..., 2), in CIE units."""
    return np.hypot(*np.moveaxis(ab - true_ab, -1, 0))


def psnr(rgb: np.ndarray, true_rgb: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of sRGB pictures in 0..1; 100 at most."""
    return float(-10 * np.log10(max(np.square(rgb - true_rgb).mean(dtype=float), 1e-10)))


def colorfulness(rgb: np.ndarray) -> float:
    """Colourfulness of sRGB (..., 3) in 0..1 (Hasler and Suesstrunk 2003)."""
    # signed, as the paper has them; widely copied code takes absolute values
    red, green, blue = np.moveaxis(rgb * 255.0, -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def area_under_curve(error: np.ndarray) -> float:
    """The AuC of Zhang et al. 2016, section 3.1, in 0..1, from ab_error."""
    # area under the share of pixels with an error within t, t = 0..150, over 150
    share = np.searchsorted(np.sort(error, axis=None), np.arange(151), "right") / error.size
    return float(np.trapezoid(share) / 150)  # 150 steps of one unit


def even_neighbors(lab: np.ndarray) -> tuple[float, float]:
    """Change of ab between neighbouring even places of lab (H, W, 3); mean chroma there.

    Change over chroma is the patchiness: 0 for a wall of one colour, about 0.1 for
    photographs, more where each place of a wall or a coat chose its own colour.
    """
    # places: squares of 1/24 of the short side; even: L deviates by under 6; neighbours,
    # side by side or one above the other: mean L differs by under 4
    side = max(min(lab.shape[:2]) // 24, 2)
    rows, columns = lab.shape[0] // side, lab.shape[1] // side
    places = lab[:rows * side, :columns * side].reshape(rows, side, columns, side, 3)
    mean, even = places.mean(axis=(1, 3)), places[..., 0].std(axis=(1, 3)) < 6
    change = chroma = pairs = 0.0
    for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        both = even[one] & even[other] & (np.abs(mean[one] - mean[other])[..., 0] < 4)
        ab, other_ab = mean[one][both][:, 1:], mean[other][both][:, 1:]  # (pairs, 2)
        change += np.linalg.norm(ab - other_ab, axis=1).sum()
        chroma += np.linalg.norm([ab, other_ab], axis=2).sum() / 2
        pairs += both.size  # over all, even or not: no wall tells little of walls
    return float(change / max(pairs, 1)), float(chroma / max(pairs, 1))


def score(rgb: np.ndarray, true_rgb: np.ndarray | None) -> dict[str, float]:
    """Scores of a uint8 picture (H, W, 3) against the truth; None: those that need none."""
    lab, made = rgb_to_lab(rgb), rgb / np.float32(255)
    change, chroma = even_neighbors(lab)
    scores = {"colorfulness": colorfulness(made), "even_change": change,
              "even_chroma": chroma}  # a summary makes the ratio of the two
    if true_rgb is None:
        return scores
    true_lab, true = rgb_to_lab(true_rgb), true_rgb / np.float32(255)
    error = ab_error(lab[..., 1:], true_lab[..., 1:])
    change, chroma = even_neighbors(true_lab)
    return scores | {
        "psnr": psnr(made, true),
        "ssim": float(structural_similarity(true, made, channel_axis=-1, data_range=1.0)),
        "ciede2000": float(deltaE_ciede2000(true_lab, lab).mean()),
        "distance": float(error.mean()), "auc": area_under_curve(error),
        "true_colorfulness": colorfulness(true), "true_even_change": change,
        "true_even_chroma": chroma,
        "delta_L": float(np.abs(lab[..., 0] - true_lab[..., 0]).mean())}


def picture_scores(lab, ab) -> dict[str, float]:
    """Some scores of tensors ab against Lab (N, C, H, W), summed over N for a mean."""
    lab, ab = (x.permute(0, 2, 3, 1).cpu().numpy() for x in (lab, ab))
    true, made = (lab_to_rgb(lab[..., 0], colors) for colors in (lab[..., 1:], ab))
    return {"distance": float(ab_error(ab, lab[..., 1:]).mean(axis=(1, 2)).sum()),
            "psnr": sum(map(psnr, made, true)),
            "colorfulness": sum(map(colorfulness, made)),
            "true_colorfulness": sum(map(colorfulness, true))}


def summarize(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """Mean over photographs, and half its 95 % interval, for each of SCORES they have."""
    summary = {}
    for name in SCORES:
        made, true = RATIOS.get(name, (name, None))
        if made not in rows[0] or true and true not in rows[0]:  # there was no truth
            continue
        values = np.array([row[made] for row in rows])  # one a photograph
        mean = values.mean()
        if true:  # a ratio of means; its interval by linearization (Cochran 1977, 2.11)
            others = np.array([row[true] for row in rows])
            below = max(others.mean(), LITTLE)  # what is gray has no ratio
            mean = mean / below
            values = (values - mean * others) / below
        width = 1.96 * values.std(ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else 0.0
        summary[name] = float(mean), float(width)
    return summary


# ----------------------------------------------------------------------------------- report

def mean_color_baseline(mean_ab: np.ndarray, image: Image.Image) -> Image.Image:
    """Each pixel gets the training set's mean ab for its L."""
    L = lightness(image)
    whole = np.clip(np.rint(L), 0, 100).astype(int)  # the row of mean_ab (101, 2)
    return lab_to_image(L, mean_ab[whole].astype(np.float32))


def print_table(title: str, summaries: dict) -> None:
    """A row a score, a column a method, mean and 95 % interval."""
    print(f"{title}; mean +- 95 % interval over photographs")
    # a checkpoint's name is a stranger's
    summaries = {printable(method): summary for method, summary in summaries.items()}
    widths = {method: max(len(method) + 2, 18) for method in summaries}
    print(" " * 20 + "".join(method.rjust(width) for method, width in widths.items()))
    for name, (heading, digits) in SCORES.items():
        if all(name in summary for summary in summaries.values()):  # else: no truth
            values = (summary[name] for summary in summaries.values())
            cells = (f"{mean:.{digits}f}" + f" +-{half:.{digits}f}" * (half > 0)
                     for mean, half in values)  # one photograph has no interval
            print(f"{heading:<20}" + "".join(map(str.rjust, cells, widths.values())))


def print_differences(by_method: dict[str, list]) -> None:
    """CIEDE2000 of each checkpoint less that of the first, photograph by photograph."""
    # intervals of each alone overlap, as photographs differ more than checkpoints do
    (first, base), *others = by_method.items()
    if "ciede2000" not in base[0] or len(base) < 2:  # there is no truth, or no interval
        return
    for method, scores in others:
        mean, half = summarize([{"ciede2000": one["ciede2000"] - two["ciede2000"]}
                                for one, two in zip(scores, base)])["ciede2000"]
        print(f"{printable(method)} less {printable(first)}: CIEDE2000 {mean:+.2f} "
              f"+-{half:.2f} (by pairs of results; 0 within: no difference seen)")


def collect_methods(names: list, device: str, size: int, controls: Controls) -> dict:
    """What makes a picture of a picture, by name: the baselines, then the checkpoints."""
    methods = {"gray": partial(mean_color_baseline, np.zeros((101, 2)))}
    for network, path, contents in [load_model(name, device) for name in names]:
        if "mean_ab" in contents:  # of the first checkpoint alone: they hardly differ
            mean_ab = contents["mean_ab"].numpy()
            methods.setdefault(MEAN_COLOR, partial(mean_color_baseline, mean_ab))
        methods[str(path)] = partial(colorize, network, size=size, controls=controls)
    return methods


def scored_copy(path: Path) -> tuple[Image.Image, bool]:
    """The photograph, RGB, its short side at most SIDE; whether its colours are a truth."""
    image = read_photo(path).image
    picture = working_copy(image, SIDE).convert("RGB")
    if min(picture.size) < 32:
        raise ColorizeError(f"{path}: too small to score; 32 pixels are the least")
    return picture, is_colored(image)  # sepia is no truth


def score_all(paths: list[Path], methods: dict) -> dict[str, dict]:
    """{kind: {photograph: {method: scores}}}, those with a truth first."""
    def score_one(path):
        try:
            picture, colored = scored_copy(path)
        except ColorizeError as error:
            if len(paths) == 1:  # the one that was asked for
                raise
            say(f"left out: {error}")  # one bad file does not stop the others
            return None
        true = np.asarray(picture) if colored else None
        return path, colored, {name: score(np.asarray(method(picture)), true)
                               for name, method in methods.items()}
    kinds = {"in colour": {}, "gray or toned": {}}
    # two at a time: one is read while the network works on another
    scored = progress(ordered_map(score_one, paths, 2), len(paths), "evaluate")
    for path, colored, scores in filter(None, scored):
        kinds["in colour" if colored else "gray or toned"][path] = scores
    return {kind: group for kind, group in kinds.items() if group}


def evaluate(*, image: list[str] | Path = ("data/input/val",), model: str | None = None,
             size: int = 256, saturation: float | None = None,
             out: Path = Path("data/output/evaluation"),
             device: Literal["auto", "cpu", "cuda", "mps"] = "auto") -> None:
    """Score checkpoints on colour photographs, or see what can be said of gray ones.

    image: photographs or folders; of gray and toned ones what needs no truth is scored
    model: checkpoint, or several: a.tar,b.tar; else the one that inference takes
    size: short side at which the network works; the copies have 256 (32..2048)
    saturation: factor on the colours, as in inference (0..4)
    out: folder for evaluation.json, scores.csv and evaluation.png
    device: where to compute
    """
    places = [image] if isinstance(image, (str, Path)) else image
    paths = [path for place in map(Path, places)
             for path in (find_photos(place, made=False) if place.is_dir() else [place])]
    names = [name.strip() for name in (model or "").split(",") if name.strip()]
    if model and not names:
        raise FlagError(f"--model '{model}': names no checkpoint; write a.tar,b.tar")
    controls = read_controls(saturation=saturation)
    methods = collect_methods(names or [None], device, size, controls)  # None: inference's
    kinds = score_all(paths, methods)
    if not kinds:
        raise ColorizeError(f"--image {' '.join(map(str, places))}: no photograph there "
                            "that can be scored; name a folder of photographs")
    settings = {"image": list(map(str, places)), "size": size, "saturation": saturation,
                "scored_short_side": SIDE, "checkpoints": {
                    name: content_hash(Path(name))[:12] for name in methods
                    if name not in BASELINES}}
    write_report(Path(out), settings, kinds)
    draw_evaluation(Path(out, "evaluation.png"), next(iter(kinds.values())), methods)


def write_report(out: Path, settings: dict, kinds: dict) -> None:
    """A table for each kind of photographs, all of them in evaluation.json; scores.csv."""
    report, rows = {"settings": settings}, []
    for kind, group in kinds.items():
        by_method = {}
        for path, scored in group.items():
            for method, scores in scored.items():
                by_method.setdefault(method, []).append(scores)
                names = {"photograph": printable(path), "method": printable(method)}
                rows.append(names | scores)
        summaries = {method: summarize(scores) for method, scores in by_method.items()}
        print_table(f"{len(group)} photographs {kind}, network at {settings['size']} px",
                    summaries)
        print_differences({m: by_method[m] for m in by_method if m not in BASELINES})
        report[kind] = {"photographs": len(group), "summary": summaries}  # mean, interval
    write_atomically(out / "evaluation.json",
                     lambda name: name.write_text(json.dumps(report, indent=1)))
    write_csv(out / "scores.csv", rows)


def write_csv(path: Path, rows: list[dict]) -> None:
    """A table with a header; a value that a row lacks is left empty."""
    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, dict.fromkeys(n for row in rows for n in row))
            writer.writeheader()
            writer.writerows(rows)
    write_atomically(path, write)


def draw_evaluation(path: Path, scored: dict, methods: dict) -> None:
    """Twelve photographs at fixed quantiles of the error: gray | checkpoints | itself."""
    names = [name for name in methods if name != MEAN_COLOR]
    first = next(iter(scored.values()))
    error = "ciede2000" if "ciede2000" in first["gray"] else "patchiness"
    errors = {source: [summarize([scores[name]])[error][0] for name in names]
              for source, scores in scored.items()}
    ranked = sorted(errors, key=lambda source: errors[source][1])  # by the first checkpoint
    tiles, captions = [], []
    for place in np.linspace(0, len(ranked) - 1, min(12, len(ranked))):
        source = ranked[round(place)]
        picture, _ = scored_copy(source)  # read again: all together would not fit
        tiles += [methods[name](picture) for name in names] + [picture]
        # the end of a name tells most; 32 letters fill a tile
        captions += [f"{printable(name).removesuffix('.tar')[-22:]} {value:.3g}"
                     for name, value in zip(names, errors[source])]
        captions.append(printable(source.name)[:32])
    columns = (len(names) + 1) * (2 if len(names) < 3 else 1)  # one or two photographs
    sheet = picture_sheet(tiles, columns, captions, 200)
    write_photo(path, [sheet], Photo(sheet), MADE)
    say(f"{path}: from best to worst by {SCORES[error][0]}", result=True)


# ------------------------------------------------------------------- pictures of a training

def draw_preview(path: Path, network, photographs: ColorizeData) -> None:
    """gray | prediction | truth of eight photographs, the same every time, of them all."""
    tiles = []
    for number in sorted({i * len(photographs) // 8 for i in range(8)}):
        lab = decode_lab(photographs[number][None])  # (1, 3, H, W)
        ab = network.predict(lab[:, :1].to(network.mean.device)).cpu()
        L, ab, true = (x[0].permute(1, 2, 0).numpy() for x in (lab[:, :1], ab, lab[:, 1:]))
        tiles += [lab_to_image(L[..., 0], colors) for colors in (0 * ab, ab, true)]
    captions = ["gray", "prediction", "truth"] * (len(tiles) // 3)
    sheet = picture_sheet(tiles, 6, captions, 160)  # two photographs a row
    write_photo(path, [sheet], Photo(sheet), MADE)


CURVES = {"loss": ["loss", "val_loss"], "PSNR, dB": ["psnr"], "learning rate": ["lr"],
          "colourfulness over the truth's": ["color_ratio"], "discriminator": ["d_loss"]}
COLORS = ["#1f5fbf", "#d06010"]
WIDTH, HEIGHT = 520, 300  # of a panel, pixels


def draw_curves(path: Path, history: list[dict]) -> None:
    """A training's history as a picture: a panel for each of CURVES that it has."""
    panels = [(title, names) for title, names in CURVES.items()
              if not set(names).isdisjoint(history[-1])]  # the last row has all columns
    picture = Image.new("RGB", (WIDTH * 2, HEIGHT * -(-len(panels) // 2)), "white")
    for i, panel in enumerate(panels):
        draw_panel(ImageDraw.Draw(picture), i % 2 * WIDTH, i // 2 * HEIGHT, history, *panel)
    write_photo(path, [picture], Photo(picture), MADE)


def draw_panel(draw, left: int, top: int, history: list, title: str, names: list) -> None:
    """One chart at (left, top): ticks and labels, a line a name, a legend."""
    curves = [[(row["epoch"], row[name]) for row in history
               if math.isfinite(row.get(name, math.nan))] for name in names]  # no gap
    points, font = np.array(sum(curves, []) or [(0, 0)]), ImageFont.load_default(12)
    start, span = points.min(axis=0), np.ptp(points, axis=0).clip(1e-9)  # epoch, value
    corner = np.array([left + 70, top + HEIGHT - 30])  # the lower left, in pixels
    size = np.array([WIDTH - 90, 60 - HEIGHT])         # from there to the upper right
    draw.text((left + 70, top + 8), f"{title}, by epoch", "black", font)
    for share in np.linspace(0, 1, 5):  # ticks of both axes
        (x, y), (epoch, value) = corner + size * share, start + span * share
        draw.line((left + 70, y, left + WIDTH - 20, y), "#d0d0d0")
        draw.text((left + 64, y), f"{value:.4g}", "black", font, "rm")
        draw.text((x, corner[1] + 6), f"{epoch:.3g}", "black", font, "ma")
    for i, (name, curve) in enumerate(zip(names, curves)):
        line = [tuple(corner + size * (point - start) / span) for point in curve]
        draw.line(line, COLORS[i], 2)  # 2 pixels wide
        for place in line[-1:]:  # where it is now; one epoch alone is no line
            draw.circle(place, 3, COLORS[i])
        draw.text((left + WIDTH - 26, top + 36 + 15 * i), name, COLORS[i], font, "ra")


if __name__ == "__main__":
    raise SystemExit("type: python main.py evaluate --help")
