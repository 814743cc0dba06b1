"""Knowing how good it is: metrics, baselines, the report.

    python main.py evaluate --model checkpoints/pretrained.tar --image data/input/val
    python main.py evaluate --model a.tar,b.tar --image photographs

Each photograph is coloured by the code of inference and scored at a short side of at most 256.
"""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from skimage.color import deltaE_ciede2000
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from basic_model import checkpoint_hash
from colorize_data import (MIN_CHROMA, SIDE, ColorizeError, FlagError, find_photos, into_gamut,
                           lab_to_rgb, ordered_map, picture_sheet, progress, read_photo, rgb_to_lab, say,
                           to_8_bit, write_whole)
from inference import check_vividness, colorize, load_model, mean_chroma, working_copy

# columns of the table: score, heading, digits
SCORES = {"psnr": ("PSNR", 2), "ssim": ("SSIM", 3), "ciede2000": ("CIEDE2000", 2),
          "distance": ("ab dist.", 2), "auc": ("AuC", 3), "colorfulness": ("colourf.", 1),
          "ratio": ("of truth's", 3), "delta_L": ("|dL|", 3)}


# ---------------------------------------------------------------------------------- metrics

def mean_ab_distance(ab: np.ndarray, true_ab: np.ndarray) -> float:
    """Mean of sqrt(da^2 + db^2) over the pixels of ab (..., 2), in CIE units."""
    return float(np.hypot(*np.moveaxis(ab - true_ab, -1, 0)).mean())


def psnr(rgb: np.ndarray, true_rgb: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of sRGB pictures in 0..1; 100 at most."""
    with np.errstate(divide="ignore"):
        return float(min(peak_signal_noise_ratio(true_rgb, rgb, data_range=1.0), 100.0))


def colorfulness(rgb: np.ndarray) -> float:
    """Colourfulness of an sRGB picture (..., 3) in 0..1 (Hasler and Suesstrunk 2003), signed rg and yb."""
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
            "ssim": float(structural_similarity(true, made, win_size=window, channel_axis=-1, data_range=1.0)),
            "ciede2000": float(deltaE_ciede2000(true_lab, lab).mean()),
            "distance": mean_ab_distance(lab[..., 1:], true_lab[..., 1:]),
            "auc": area_under_curve(lab[..., 1:], true_lab[..., 1:]),
            "colorfulness": colorfulness(made), "true_colorfulness": colorfulness(true),
            "delta_L": float(np.abs(lab[..., 0] - true_lab[..., 0]).mean())}


def summarize(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """Mean and half width of its 95 % interval over photographs, for each of SCORES.

    The colourfulness ratio is that of the means, its interval by linearization.
    """
    summary, n = {}, len(rows)
    for name in SCORES:
        if name == "ratio":
            made, true = (np.array([row[key] for row in rows]) for key in ("colorfulness", "true_colorfulness"))
            mean = made.mean() / max(true.mean(), 1e-9)
            values = (made - mean * true) / max(true.mean(), 1e-9)
        else:
            values = np.array([row[name] for row in rows])
            mean = values.mean()
        summary[name] = float(mean), float(1.96 * values.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    return summary


# ----------------------------------------------------------------------------------- report

def mean_color_baseline(mean_ab: np.ndarray, image) -> np.ndarray:
    """Each pixel gets the training set's mean ab for its L; uint8 (H, W, 3)."""
    L = rgb_to_lab(np.asarray(image.convert("RGB")))[..., 0]
    ab = into_gamut(L, mean_ab[np.clip(np.rint(L), 0, 100).astype(int)].astype(np.float32))
    return to_8_bit(lab_to_rgb(np.concatenate([L[..., None], ab], axis=-1)))


def print_table(summaries: dict, count: int, size: int) -> None:
    """One row a method, mean and 95 % interval."""
    width = max(map(len, summaries)) + 2
    print(f"{count} photographs, network at {size} px; mean +- 95 % interval over photographs")
    print(" " * width + "".join(f"{heading:>16}" for heading, _ in SCORES.values()))
    for method, summary in summaries.items():
        cells = (f"{summary[name][0]:.{d}f} +-{summary[name][1]:.{d}f}" for name, (_, d) in SCORES.items())
        print(f"{method:<{width}}" + "".join(f"{cell:>16}" for cell in cells))


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
    loaded = [load_model(name, device) for name in (model.split(",") if model else [None])]
    methods, hashes = {"gray": lambda picture: np.asarray(picture.convert("L").convert("RGB"))}, {}
    for network, path, contents in loaded:
        check_vividness(network, vividness)
        hashes[str(path)] = checkpoint_hash(path)
        if "mean_ab" in contents and "mean ab for each L" not in methods:
            methods["mean ab for each L"] = partial(mean_color_baseline, contents["mean_ab"].numpy())
        methods[str(path)] = partial(colorize, network, size=size, vividness=vividness, saturation=saturation)
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
        return path, {name: score(np.asarray(method(picture)), true) for name, method in methods.items()}
    results = [r for r in progress(ordered_map(score_all, paths, 2), len(paths), "evaluate") if r]
    if not results:
        raise ColorizeError(f"{image}: no colour photograph to compare with; these are gray or unreadable")
    if len(results) < len(paths):
        say(f"{len(paths) - len(results)} of {len(paths)} left out: gray, tiny or unreadable")
    summaries = {name: summarize([scores[name] for _, scores in results]) for name in methods}
    print_table(summaries, len(results), size)
    settings = {"image": str(image), "size": size, "vividness": vividness, "saturation": saturation,
                "scored_short_side": SIDE}
    write_report(Path(out), settings, hashes, summaries, results)
    first = str(loaded[0][1])
    results.sort(key=lambda result: result[1][first]["ciede2000"])
    draw_evaluation(Path(out, "evaluation.png"), results, methods, first)
    print(f"{Path(out, 'evaluation.png')}: from best to worst by CIEDE2000")


def scored_copy(path: Path):
    """The photograph at a short side of at most SIDE, RGB; None where it has no colour or is tiny."""
    picture = working_copy(read_photo(path).image, SIDE).convert("RGB")
    return picture if min(picture.size) >= 32 and mean_chroma(picture) >= MIN_CHROMA else None


def write_report(out: Path, settings: dict, hashes: dict, summaries: dict, results: list) -> None:
    """evaluation.json (all of it) and scores.csv (a row a photograph and method)."""
    report = {"settings": settings, "checkpoints": hashes, "photographs": len(results),
              "summary": {m: {k: {"mean": v[0], "interval95": v[1]} for k, v in s.items()}
                          for m, s in summaries.items()},
              "scores": {str(path): scores for path, scores in results}}
    write_whole(out / "evaluation.json", lambda name: name.write_text(json.dumps(report, indent=1)))

    def write(temporary):
        with open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            names = list(next(iter(results[0][1].values())))
            writer.writerow(["photograph", "method", *names])
            writer.writerows([path, method, *(f"{scores[name]:.4f}" for name in names)]
                             for path, by_method in results for method, scores in by_method.items())
    write_whole(out / "scores.csv", write)


def draw_evaluation(path: Path, results: list, methods: dict, first: str) -> None:
    """Twelve photographs at fixed quantiles of the error: gray | each model | truth."""
    shown = [results[round(q * (len(results) - 1))] for q in np.linspace(0, 1, min(12, len(results)))]
    names = ["gray", *list(methods)[1 + ("mean ab for each L" in methods):], "truth"]
    tiles, captions = [], []
    for source, scores in shown:
        picture = scored_copy(source)
        for name in names:
            tiles.append(picture if name == "truth" else methods[name](picture))
            if name == "truth":
                captions.append(source.name[:28])
            else:
                short = "gray" if name == "gray" else Path(name).stem
                captions.append(f"{short}: dE {scores[name]['ciede2000']:.1f}")
    sheet = picture_sheet(tiles, len(names) * (2 if len(names) < 4 else 1), captions, 200)
    write_whole(path, lambda name: sheet.save(name, "PNG"))
