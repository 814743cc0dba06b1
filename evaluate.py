"""Knowing what goes in and how good it is that comes out: data report, metrics, baselines, curves.

    python main.py data --source photos.zip        # import, build the arrays, report

    python main.py evaluate --model a.tar,b.tar --image data/input/val

Each photograph is coloured by the code of inference and scored at a short side of at most 256.
"""

import csv
import json
import lzma
import math
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage.color import deltaE_ciede2000
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from colorize_data import (MIN_CHROMA, SIDE, ColorizeData, ColorizeError, FlagError, class_names,
                           content_hash, decode_lab, find_photos, in_validation, into_gamut,
                           lab_to_rgb, ordered_map, picture_sheet, prepare, progress, read_photo,
                           rgb_to_lab, say, to_8_bit, write_whole)
from inference import colorize, lightness, load_model, working_copy

MAX_MEMBER = 300 << 20  # bytes of a photograph in an archive
MAX_RATIO = 200         # of an archive's contents to its own size, from 1 MB on
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}
# rows of the table: score, heading, digits
SCORES = {"psnr": ("PSNR, dB", 2), "ssim": ("SSIM", 3), "ciede2000": ("CIEDE2000", 2),
          "distance": ("ab distance", 2), "auc": ("AuC", 3), "colorfulness": ("colourfulness", 1),
          "ratio": ("... over the truth's", 3), "delta_L": ("|dL|", 3)}


# ------------------------------------------------------------------------- the photographs

def check_members(source: Path, members) -> None:
    """ColorizeError for an archive that reaches outside its folder, holds links, or is a bomb.

    members: (name, bytes, is it a link or a device) each, read one by one: a bomb is not read to
    its end.
    """
    total, free, packed = 0, shutil.disk_usage(source.parent).free, source.stat().st_size
    for name, size, is_link in members:
        if is_link or name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
            raise ColorizeError(f"--source {source}: '{name}' is a link or leads out of the "
                                "folder; nothing was taken; unpack it yourself if you trust it")
        total += size
        if size > MAX_MEMBER or total > MAX_RATIO * max(packed, 1 << 20):
            raise ColorizeError(f"--source {source}: '{name}' unpacks to {size >> 20} MB, "
                                f"all so far to {total >> 20} MB, more than photographs do; "
                                "nothing was taken")
        if total > free:
            raise ColorizeError(f"--source {source}: unpacks to over {free >> 20} MB, the space "
                                "that is free; make room, or unpack it elsewhere")


def unpack(source: Path, folder: Path) -> None:
    """Unpack a zip or tar, checked first; ColorizeError if it is neither, hostile or damaged."""
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                check_members(source, (
                    (i.filename, i.file_size, stat.S_ISLNK(i.external_attr >> 16))
                    for i in archive.infolist()))
                archive.extractall(folder)
        elif tarfile.is_tarfile(source):
            with tarfile.open(source) as archive:
                check_members(source, ((i.name, i.size, not (i.isfile() or i.isdir()))
                                       for i in archive))
                archive.extractall(folder, filter="data")
        else:
            raise ColorizeError(f"--source {source}: neither a zip, a tar nor a folder; "
                                "check the path")
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error,
            lzma.LZMAError, tarfile.TarError) as error:  # RuntimeError: encrypted, unknown packing
        raise ColorizeError(f"--source {source}: damaged or encrypted ({error}); get it again, or "
                            "unpack it yourself and name the folder") from None


def import_photos(source: Path, data: Path, val_fraction: float) -> None:
    """Take the photographs of a zip, tar or folder into DATA/train and DATA/val, classes kept.

    A set that comes with train and val (or test) folders stays split so; else the split is by a
    hash of each content, so that adding photographs moves none. Those already there, by name and
    size, are passed over; another of the same name gets a part of its hash into its own.
    """
    if not source.exists():
        raise ColorizeError(f"--source {source}: no such file or folder; check the path")
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data, prefix=".import-") as unpacked:
        folder = source
        if not source.is_dir():
            say(f"unpacking {source}")
            folder = Path(unpacked)
            unpack(source, folder)
        counts, paths = Counter(), find_photos(folder)
        top = Path(os.path.commonpath([path.parent for path in paths])) if paths else folder
        for parent in (top, *top.parents):  # a set of which only train or val is there
            if parent.name.lower() in SPLITS and (parent == folder or folder in parent.parents):
                top = parent.parent
        for path in progress(paths, len(paths), f"import {source.name}"):
            name = path.relative_to(top)
            if len(name.parts) > 1 and name.parts[0].lower() in SPLITS:
                split, name = SPLITS[name.parts[0].lower()], Path(*name.parts[1:])
            else:
                split = "val" if in_validation(path, val_fraction) else "train"
            of_this_name = [data / other / name for other in ("train", "val")]
            if any(other.exists() and other.stat().st_size != path.stat().st_size
                   for other in of_this_name):
                name = name.with_stem(f"{name.stem}-{content_hash(path)[:8]}")
            there = any((data / other / name).exists() for other in ("train", "val"))
            counts["already there" if there else split] += 1
            if not there:
                write_whole(data / split / name, partial(shutil.copyfile, path))
    taken = ", ".join(f"{n} {what}" for what, n in counts.items()) or "no photograph"
    say(f"imported {source}: {taken}")


def data(*, data: Path = Path("data/input"), source: Path | None = None, val_fraction: float = 0.1,
         workers: int | None = None) -> None:
    """Import photographs, build the arrays that train reads, and say what is in them.

    data: folder that holds train/ and val/; the arrays are written to its processed/
    source: a zip, a tar or a folder to import first
    val_fraction: share set aside for validation, by a hash of the content
    workers: threads that read photographs; else one for each core
    """
    if not 0 < val_fraction < 1:
        raise FlagError(f"--val_fraction {val_fraction}: must be between 0 and 1")
    if source is not None:
        import_photos(Path(source), Path(data), val_fraction)
    check_overlap(data)
    manifests = prepare(data, val_fraction, workers)
    processed = Path(data, "processed")
    for split, manifest in manifests.items():
        print(f"{split}: {len(manifest['photographs'])} photographs used")
        for reason, count in Counter(manifest["left_out"].values()).items():
            names = [name for name, why in manifest["left_out"].items() if why == reason]
            print(f"  {count} left out, {reason}: {', '.join(names[:3])}" + ", ..." * (count > 3))
    counts = Counter(label for *_, label in manifests["train"]["photographs"])
    classes = ", ".join(f"{name} {counts[name]}" for name in class_names(manifests["train"]))
    print(f"classes: {classes or 'none (no class folders)'}")
    histogram = print_colors(np.load(processed / "train.npy", mmap_mode="r"))
    dataset = ColorizeData([processed / "train.npy"], train=True)
    write_preview(processed / "preview.png", dataset, histogram)
    print(f"{processed / 'preview.png'}: samples as the network sees them (L, ab at L 60, colour) "
          "and the histogram of ab")


def print_colors(stored: np.ndarray) -> np.ndarray:
    """Mean and spread of stored ab, share near gray; returns counts (256, 256) of a and b."""
    histogram, near_gray = np.zeros(65536), 0
    for row in stored:
        ab = row[::4, ::4, 1:].reshape(-1, 2).astype(np.int64)
        histogram += np.bincount(ab[:, 0] * 256 + ab[:, 1], minlength=65536)
        near_gray += np.hypot(*(ab.T - 128.0)).mean() < 2.5 * MIN_CHROMA
    histogram = histogram.reshape(256, 256)
    axis, total = np.arange(-128, 128), histogram.sum()
    for name, marginal in (("a", histogram.sum(1)), ("b", histogram.sum(0))):
        mean = (marginal * axis).sum() / total
        spread = np.sqrt((marginal * (axis - mean) ** 2).sum() / total)
        print(f"{name}*: mean {mean:.1f}, spread {spread:.1f}")
    print(f"near gray (mean chroma under {2.5 * MIN_CHROMA:g}): {near_gray / len(stored):.1%}")
    return histogram


def ab_histogram(counts: np.ndarray) -> Image.Image:
    """Counts (256, 256) of stored a and b as a picture: a to the right, b up, brighter is more."""
    share = np.log1p(counts) / np.log1p(max(counts.max(), 1))
    b, a = np.meshgrid(np.arange(127, -129, -1.0), np.arange(-128, 128.0), indexing="ij")
    ab = np.stack([a, b], axis=-1).astype(np.float32)
    return picture_of((share.T[::-1] * 75).astype(np.float32), ab)


def picture_of(L: np.ndarray, ab: np.ndarray) -> Image.Image:
    """L (H, W) and ab (H, W, 2), brought into gamut, as a picture."""
    lab = np.concatenate([L[..., None], into_gamut(L, ab)], axis=-1)
    return Image.fromarray(to_8_bit(lab_to_rgb(lab)))


def check_overlap(data: Path) -> None:
    """ColorizeError if a photograph is in both train and val (equal content)."""
    sizes, splits = {}, {split: find_photos(Path(data) / split) for split in ("train", "val")}
    for path in splits["val"]:
        sizes.setdefault(path.stat().st_size, []).append(path)
    for path in splits["train"]:
        for other in sizes.get(path.stat().st_size, []):
            if content_hash(path) == content_hash(other):
                raise ColorizeError(f"{path} and {other} are the same photograph, in train and "
                                    "in val; delete one, or scores will flatter")


def write_preview(path: Path, dataset: ColorizeData, histogram: np.ndarray) -> None:
    """Eight samples as L | ab at L 60 | colour, and the histogram of ab."""
    stored, _ = dataset.__getitems__(range(min(8, len(dataset))))
    tiles = []
    for lab in decode_lab(stored.permute(0, 2, 3, 1).numpy()):
        L, ab = lab[..., 0], lab[..., 1:]
        tiles += [picture_of(L, 0 * ab), picture_of(np.full_like(L, 60), ab), picture_of(L, ab)]
    captions = ["L", "ab at L 60", "colour"] * (len(tiles) // 3) + ["histogram of ab"]
    sheet = picture_sheet(tiles + [ab_histogram(histogram)], 6, captions, 192)
    write_whole(path, lambda name: sheet.save(name, "PNG"))


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
    return picture_of(L, mean_ab[np.clip(np.rint(L), 0, 100).astype(int)].astype(np.float32))


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
    write_whole(out / "evaluation.json", lambda name: name.write_text(json.dumps(report, indent=1)))
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
    write_whole(path, write)


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
    write_whole(path, lambda name: sheet.save(name, "PNG"))


# --------------------------------------------------------------------- pictures of a training

def draw_preview(path: Path, lab, ab) -> None:
    """gray | prediction | truth, of tensors Lab (N, 3, H, W) and ab (N, 2, H, W)."""
    lab, ab = (x.permute(0, 2, 3, 1).cpu().numpy() for x in (lab, ab))
    tiles = [picture_of(true[..., 0], colors) for true, made in zip(lab, ab)
             for colors in (0 * made, made, true[..., 1:])]
    sheet = picture_sheet(tiles, 6, ["gray", "prediction", "truth"] * len(lab), 160)
    write_whole(path, lambda name: sheet.save(name, "PNG"))


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
    write_whole(path, lambda name: picture.save(name, "PNG"))


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
    place = lambda x, y: (x0 + (x1 - x0) * (x - 1) / max(last - 1, 1),
                          y1 - (y1 - y0) * (scale(y) - low) / (high - low))
    draw.rectangle((x0, y0, x1, y1), outline="black")
    draw.text((x0, top + 8), title + " (log scale)" * log, "black", ImageFont.load_default(14))
    for i in range(5):
        value = low + (high - low) * i / 4
        y = y1 - (y1 - y0) * i / 4
        draw.line((x0, y, x1, y), "#d0d0d0" if 0 < i < 4 else "black")
        label = f"{10 ** value if log else value:.4g}"
        draw.text((x0 - 6, y), label, "black", font, "rm")
        epoch = round(1 + (last - 1) * i / 4)
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
