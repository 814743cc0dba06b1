"""How good the colours are: metrics, baselines, the report, training's curves.

    python main.py evaluate --model a.tar,b.tar --image data/input/val

Each photograph is coloured by the code of inference and scored at a short side of at most 256.
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
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from colorize_data import SIDE
from inference import colorize, load_model
from photo import (MIN_CHROMA, ColorizeError, FlagError, content_hash, find_photos, lab_to_image,
                   lab_to_rgb, lightness, ordered_map, picture_sheet, progress, read_photo,
                   rgb_to_lab, say, working_copy, write_atomically)

# rows of the table: score, heading, digits
SCORES = {"psnr": ("PSNR, dB", 2), "ssim": ("SSIM", 3), "ciede2000": ("CIEDE2000", 2),
          "distance": ("ab distance", 2), "auc": ("AuC", 3), "colorfulness": ("colourfulness", 1),
          "ratio": ("... over the truth's", 3), "delta_L": ("|dL|", 3)}


# ---------------------------------------------------------------------------------- metrics

def mean_ab_distance(ab: np.ndarray, true_ab: np.ndarray) -> float:
    """Mean of sqrt(da^2 + db^2) over the pixels of ab (..., 2), in CIE units."""
    return float(np.hypot(*np.moveaxis(ab - true_ab, -1, 0)).mean())


def psnr(rgb: np.ndarray, true_rgb: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of sRGB pictures in 0..1; 100 at most."""
    with np.errstate(divide="ignore"):
        return float(min(peak_signal_noise_ratio(true_rgb, rgb, data_range=1.0), 100.0))


def colorfulness(rgb: np.ndarray) -> float:
    """Colourfulness of sRGB (..., 3) in 0..1 (Hasler and Suesstrunk 2003), signed rg and yb."""
    red, green, blue = np.moveaxis(rgb * 255.0, -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def area_under_curve(ab: np.ndarray, true_ab: np.ndarray) -> float:
    """Area under the share of pixels with an ab error within t, t = 0..150, normalized to 1.

    Zhang et al. 2016, section 3.1 (AuC).
    """
    error = np.hypot(*np.moveaxis(ab - true_ab, -1, 0)).ravel()
    share = np.searchsorted(np.sort(error), np.arange(151), side="right") / error.size
    return float(np.trapezoid(share) / 150)


def score(rgb: np.ndarray, true_rgb: np.ndarray) -> dict[str, float]:
    """Every score of one uint8 picture (H, W, 3) against the truth."""
    lab, true_lab = rgb_to_lab(rgb), rgb_to_lab(true_rgb)
    made, true = rgb / np.float32(255), true_rgb / np.float32(255)
    window = min(7, (min(rgb.shape[:2]) - 1) // 2 * 2 + 1)
    return {"psnr": psnr(made, true),
            "ssim": float(structural_similarity(true, made, win_size=window, channel_axis=-1,
                                                data_range=1.0)),
            "ciede2000": float(deltaE_ciede2000(true_lab, lab).mean()),
            "distance": mean_ab_distance(lab[..., 1:], true_lab[..., 1:]),
            "auc": area_under_curve(lab[..., 1:], true_lab[..., 1:]),
            "colorfulness": colorfulness(made), "true_colorfulness": colorfulness(true),
            "delta_L": float(np.abs(lab[..., 0] - true_lab[..., 0]).mean())}


def picture_scores(lab, ab) -> list[float]:
    """Sums over a batch, tensors Lab (N, 3, H, W) and ab (N, 2, H, W), of training's scores: ab
    distance, PSNR, colourfulness and the truth's."""
    lab, ab = lab.permute(0, 2, 3, 1).numpy(), ab.permute(0, 2, 3, 1).float().numpy()
    true = lab_to_rgb(lab)
    made = lab_to_rgb(np.concatenate([lab[..., :1], ab], axis=-1))
    scores = [(mean_ab_distance(c, t[..., 1:]), psnr(m, r), colorfulness(m), colorfulness(r))
              for c, t, m, r in zip(ab, lab, made, true)]
    return np.sum(scores, axis=0).tolist()


def summarize(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """Mean and half width of its 95 % interval over photographs, for each of SCORES.

    The colourfulness ratio is that of the means, its interval by linearization.
    """
    summary, n = {}, len(rows)
    for name in SCORES:
        if name == "ratio":
            made, true = (np.array([row[key] for row in rows])
                          for key in ("colorfulness", "true_colorfulness"))
            mean = made.mean() / max(true.mean(), 1e-9)
            values = (made - mean * true) / max(true.mean(), 1e-9)
        else:
            values = np.array([row[name] for row in rows])
            mean = values.mean()
        summary[name] = float(mean), float(1.96 * values.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    return summary


# ----------------------------------------------------------------------------------- report

def mean_color_baseline(mean_ab: np.ndarray, image: Image.Image) -> Image.Image:
    """Each pixel gets the training set's mean ab for its L."""
    L = lightness(image)
    return lab_to_image(L, mean_ab[np.clip(np.rint(L), 0, 100).astype(int)].astype(np.float32))


def print_table(summaries: dict, count: int, size: int) -> None:
    """A row a score, a column a method, mean and 95 % interval."""
    print(f"{count} photographs, network at {size} px; mean +- 95 % interval over photographs")
    widths = {method: max(len(method) + 2, 18) for method in summaries}
    print(" " * 20 + "".join(method.rjust(width) for method, width in widths.items()))
    for name, (heading, digits) in SCORES.items():
        cells = ("{:.{d}f} +-{:.{d}f}".format(*summaries[method][name], d=digits).rjust(width)
                 for method, width in widths.items())
        print(f"{heading:<20}" + "".join(cells))


def evaluate(*, image: Path = Path("data/input/val"), model: str | None = None, size: int = 256,
             out: Path = Path("data/output/evaluation"), vividness: float | None = None,
             saturation: float | None = None,
             device: Literal["auto", "cpu", "cuda", "mps"] = "auto") -> None:
    """Score checkpoints on colour photographs, beside plain gray and the mean colour.

    image: folder of colour photographs
    model: checkpoint, or several: a.tar,b.tar; else the one that inference takes
    size: short side at which the network works
    out: folder for evaluation.json, scores.csv and evaluation.png
    vividness: as in inference
    saturation: as in inference
    device: where to compute
    """
    if not 32 <= size <= 2048:
        raise FlagError(f"--size {size}: must be 32..2048")
    names = [name.strip() for name in model.split(",")] if model else [None]
    loaded = [load_model(name, device) for name in names]
    methods, hashes = {"gray": partial(mean_color_baseline, np.zeros((101, 2)))}, {}
    for network, path, contents in loaded:
        hashes[str(path)] = content_hash(path)[:12]
        if "mean_ab" in contents and "mean ab for each L" not in methods:
            mean_ab = contents["mean_ab"].numpy()
            methods["mean ab for each L"] = partial(mean_color_baseline, mean_ab)
        methods[str(path)] = partial(colorize, network, size=size, vividness=vividness,
                                     saturation=saturation)
    paths = find_photos(image) if Path(image).is_dir() else [Path(image)]
    if not paths:
        raise ColorizeError(f"{image}: no photograph below it; name a folder of colour photographs")

    def score_all(path):
        try:
            picture = scored_copy(path)
        except ColorizeError as error:
            say(f"left out: {error}")
            return None
        if picture is None:
            return None
        true = np.asarray(picture)
        return path, {name: score(np.asarray(method(picture)), true)
                      for name, method in methods.items()}
    results = [r for r in progress(ordered_map(score_all, paths, 2), len(paths), "evaluate") if r]
    if not results:
        raise ColorizeError(f"{image}: no colour photograph to compare with; these are gray or "
                            "unreadable")
    if len(results) < len(paths):
        say(f"{len(paths) - len(results)} of {len(paths)} left out: gray, tiny or unreadable")
    summaries = {name: summarize([scores[name] for _, scores in results]) for name in methods}
    print_table(summaries, len(results), size)
    settings = {"image": str(image), "size": size, "vividness": vividness, "saturation": saturation,
                "scored_short_side": SIDE}
    write_report(Path(out), settings, hashes, summaries, results)
    first = str(loaded[0][1])
    results.sort(key=lambda result: result[1][first]["ciede2000"])
    draw_evaluation(Path(out, "evaluation.png"), results, methods)
    print(f"{Path(out, 'evaluation.png')}: from best to worst by CIEDE2000")


def scored_copy(path: Path):
    """The photograph at a short side of at most SIDE, RGB; None where it is gray or tiny."""
    picture = working_copy(read_photo(path).image, SIDE).convert("RGB")
    chroma = np.hypot(*np.moveaxis(rgb_to_lab(np.asarray(picture))[..., 1:], -1, 0)).mean()
    return picture if min(picture.size) >= 32 and chroma >= MIN_CHROMA else None


def write_report(out: Path, settings: dict, hashes: dict, summaries: dict, results: list) -> None:
    """evaluation.json (all of it) and scores.csv (a row a photograph and method)."""
    report = {"settings": settings, "checkpoints": hashes, "photographs": len(results),
              "summary": {m: {k: {"mean": v[0], "interval95": v[1]} for k, v in s.items()}
                          for m, s in summaries.items()},
              "scores": {str(path): scores for path, scores in results}}
    write_atomically(out / "evaluation.json", lambda name: name.write_text(json.dumps(report, indent=1)))
    write_csv(out / "scores.csv", [
        {"photograph": path, "method": method} | {name: round(x, 4) for name, x in scores.items()}
        for path, by_method in results for method, scores in by_method.items()])


def write_csv(path: Path, rows: list[dict]) -> None:
    """A table with a header; a value that a row lacks is left empty."""
    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    write_atomically(path, write)


def draw_evaluation(path: Path, results: list, methods: dict) -> None:
    """Twelve photographs at fixed quantiles of the error: gray | each model | truth."""
    names = [name for name in methods if name != "mean ab for each L"]
    tiles, captions = [], []
    for q in np.linspace(0, 1, min(12, len(results))):
        source, scores = results[round(q * (len(results) - 1))]
        picture = scored_copy(source)
        tiles += [methods[name](picture) for name in names] + [picture]
        captions += [f"{Path(name).stem}: dE {scores[name]['ciede2000']:.1f}" for name in names]
        captions.append(source.name[:28])
    sheet = picture_sheet(tiles, (len(names) + 1) * (2 if len(names) < 3 else 1), captions, 200)
    write_atomically(path, lambda name: sheet.save(name, "PNG"))


# --------------------------------------------------------------------- pictures of a training

def draw_preview(path: Path, lab, ab) -> None:
    """gray | prediction | truth, of tensors Lab (N, 3, H, W) and ab (N, 2, H, W)."""
    lab, ab = (x.permute(0, 2, 3, 1).cpu().numpy() for x in (lab, ab))
    tiles = [lab_to_image(true[..., 0], colors) for true, made in zip(lab, ab)
             for colors in (0 * made, made, true[..., 1:])]
    sheet = picture_sheet(tiles, 6, ["gray", "prediction", "truth"] * len(lab), 160)
    write_atomically(path, lambda name: sheet.save(name, "PNG"))


CURVES = {  # a panel each: title, columns, logarithmic
    "loss": (["loss", "val_loss"], True),
    "PSNR, dB": (["psnr"], False),
    "colourfulness over the truth's": (["colorfulness"], False),
    "learning rate": (["lr"], False),
    "discriminator": (["d_loss", "d_real", "d_fake"], False),
}
COLORS = ["#1f5fbf", "#d06010", "#208040"]


def draw_curves(path: Path, history: list[dict]) -> None:
    """A training's history as a picture: a panel for each of CURVES that it has."""
    panels = [(title, [c for c in columns if c in history[-1]], log)
              for title, (columns, log) in CURVES.items()]
    panels = [panel for panel in panels if panel[1]]
    width, height = 520, 300
    picture = Image.new("RGB", (width * 2, height * -(-len(panels) // 2)), "white")
    for i, (title, columns, log) in enumerate(panels):
        draw_panel(ImageDraw.Draw(picture), i % 2 * width, i // 2 * height, width, height, title,
                   {c: [(row["epoch"], row[c]) for row in history if c in row] for c in columns},
                   log)
    write_atomically(path, lambda name: picture.save(name, "PNG"))


def draw_panel(draw, left: int, top: int, width: int, height: int, title: str, curves: dict,
               log: bool) -> None:
    """One chart: frame, ticks, labels, a line a curve, a legend."""
    font = ImageFont.load_default(12)
    curves = {name: [(x, y) for x, y in curve if math.isfinite(y)]
              for name, curve in curves.items()}
    points = [point for curve in curves.values() for point in curve] or [(1, 1.0)]
    scale = (lambda y: math.log10(max(y, 1e-12))) if log else float
    low, high = min(scale(y) for _, y in points), max(scale(y) for _, y in points)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    floor = 0.0 if low >= 0 and not log else -math.inf  # rates and ratios are never negative
    low, high, last = max(low - margin, floor), high + margin, max(x for x, _ in points)
    x0, y0, x1, y1 = left + 70, top + 30, left + width - 20, top + height - 40
    first = min(x for x, _ in points)  # 0 is the start, before any training
    place = lambda x, y: (x0 + (x1 - x0) * (x - first) / max(last - first, 1),
                          y1 - (y1 - y0) * (scale(y) - low) / (high - low))
    draw.rectangle((x0, y0, x1, y1), outline="black")
    draw.text((x0, top + 8), title + " (log scale)" * log, "black", ImageFont.load_default(14))
    for i in range(5):
        value = low + (high - low) * i / 4
        y = y1 - (y1 - y0) * i / 4
        draw.line((x0, y, x1, y), "#d0d0d0" if 0 < i < 4 else "black")
        label = f"{10 ** value if log else value:.4g}"
        draw.text((x0 - 6, y), label, "black", font, "rm")
        epoch = round(first + (last - first) * i / 4)
        if last >= 5 or i in (0, 4):
            x, _ = place(epoch, points[0][1])
            draw.text((x, y1 + 6), str(epoch), "black", font, "ma")
    draw.text(((x0 + x1) / 2, y1 + 20), "epoch", "black", font, "ma")
    for i, (name, curve) in enumerate(curves.items()):
        color = COLORS[i]
        line = [place(x, y) for x, y in curve]
        if len(line) > 1:
            draw.line(line, color, 2)
        elif line:
            draw.circle(line[0], 3, color)
        draw.text((x1 - 6, y0 + 6 + 15 * i), name, color, font, "ra")
