"""A folder or an archive of photographs -> arrays of Lab -> batches; the data command.

    python main.py data --source photos.zip        # import, build the arrays, report
"""

import contextlib
import hashlib
import json
import lzma
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

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as transforms

from photo import (MIN_CHROMA, ColorizeError, FlagError, content_hash, find_photos, gray_to_L,
                   lab_to_image, lab_to_rgb, ordered_map, picture_sheet, progress, read_photo,
                   rgb_to_lab, say, write_atomically)

ARRAY_FORMAT = 1   # of DATA/processed; a change rebuilds the arrays
SIDE = 256         # stored photographs are SIDE x SIDE
MIN_SIDE = 64      # smaller photographs teach little
MAX_MEMBER = 300 << 20  # bytes of a photograph in an archive
MAX_RATIO = 200         # of an archive's contents to its own size, from 1 MB on
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}


# ------------------------------------------------------------------------------ the arrays

def prepare(data: Path, val_fraction: float | None = None, workers: int | None = None) -> dict:
    """Build DATA/processed from DATA/train and DATA/val, or reuse it; a manifest for each split.

    val_fraction: of train, where there is no val; else what the arrays were built with, or a tenth.
    """
    data, workers = Path(data), workers or os.cpu_count() or 1
    processed = data / "processed"
    if val_fraction is None:
        val_fraction = 0.1
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # none, or damaged
            val_fraction = json.loads((processed / "train.json").read_text())["val_fraction"]
    sources = {split: find_photos(data / split) for split in ("train", "val")}
    if not sources["train"]:
        raise ColorizeError(f"no photograph below {data / 'train'}; put some there, or name "
                            "another folder that holds train/ (and val/) with --data")
    files = {path: [path.relative_to(data).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
             for paths in sources.values() for path in paths}
    key = [ARRAY_FORMAT, SIDE, None if sources["val"] else val_fraction, [*files.values()]]
    fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    header = {"format": ARRAY_FORMAT, "fingerprint": fingerprint, "val_fraction": val_fraction}
    manifests = {split: read_manifest(processed, split, fingerprint) for split in sources}
    if all(manifests.values()):
        return manifests
    if (processed / "train.json").exists():
        say(f"{processed}: the photographs have changed; building the arrays again")
    need, free = len(files) * SIDE * SIDE * 3, shutil.disk_usage(data).free
    if need > free:
        raise ColorizeError(f"{processed}: the arrays need {need / 1e9:.1f} GB and "
                            f"{free / 1e9:.1f} GB are free; make room, or put --data elsewhere")
    if not sources["val"]:
        photographs, sources = sources["train"], {"train": [], "val": []}
        aside = ordered_map(lambda path: in_validation(path, val_fraction), photographs, workers)
        for path, in_val in zip(photographs, aside):
            sources["val" if in_val else "train"].append(path)
        say(f"no photographs in {data / 'val'}: {len(sources['val'])} of {data / 'train'} are "
            "set aside for validation, by a hash of their content")
    for split, paths in sources.items():
        manifests[split] = build_array(processed / f"{split}.npy", {p: files[p] for p in paths},
                                       header, workers)
    if not manifests["train"]["photographs"]:
        reasons = Counter(manifests["train"]["left_out"].values()).items()
        raise ColorizeError(f"no usable colour photograph below {data / 'train'}: "
                            + ", ".join(f"{count} {reason}" for reason, count in reasons))
    return manifests


def in_validation(path: Path, fraction: float) -> bool:
    """Whether a photograph belongs to validation: by its content, so that others never move it."""
    with contextlib.suppress(OSError):  # it will be counted among the unreadable
        return int(content_hash(path)[:8], 16) < fraction * 16 ** 8
    return False


def read_manifest(processed: Path, split: str, fingerprint: str) -> dict | None:
    """A finished split's manifest if it is of these photographs, else None."""
    with contextlib.suppress(OSError, EOFError, ValueError, TypeError, KeyError):  # or damaged
        manifest = json.loads((processed / f"{split}.json").read_text())
        rows = len(np.load(processed / f"{split}.npy", mmap_mode="r"))
        if (manifest["fingerprint"], len(manifest["photographs"])) == (fingerprint, rows):
            return manifest
    return None


def encode_lab(lab: np.ndarray) -> np.ndarray:
    """CIE Lab (..., 3) to the stored uint8: round(L*255/100), round(a)+128, round(b)+128."""
    stored = lab * np.array([2.55, 1, 1], np.float32) + np.array([0, 128, 128], np.float32)
    return np.clip(np.rint(stored), 0, 255).astype(np.uint8)


def decode_lab(stored):
    """Stored uint8 Lab, array (..., 3) or tensor (N, 3, H, W), to float32 L 0..100 and ab."""
    if isinstance(stored, torch.Tensor):
        return torch.cat([stored[:, :1] / 2.55, stored[:, 1:].float() - 128], dim=1)
    return (stored - np.array([0, 128, 128], np.float32)) / np.array([2.55, 1, 1], np.float32)


def lab_square(path: Path) -> tuple[np.ndarray | None, str]:
    """One photograph as stored Lab uint8 (SIDE, SIDE, 3), or None and the reason it is left out."""
    try:
        image = read_photo(path, at_least=2 * SIDE).image
    except ColorizeError:
        return None, "unreadable"
    if min(image.size) < MIN_SIDE:
        return None, f"under {MIN_SIDE} pixels"
    square = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS)
    lab = rgb_to_lab(np.asarray(square))
    if np.hypot(lab[..., 1], lab[..., 2]).mean() < MIN_CHROMA:
        return None, "without colour"
    return encode_lab(lab), ""


def build_array(array: Path, files: dict, header: dict, workers: int) -> dict:
    """Write one split's array and then its manifest, which begins with `header`; returns it.

    files: {path: [relative name, bytes, time]}. Rows are streamed, so that memory does not grow.
    """
    photographs, left_out, manifest_path = [], {}, array.with_suffix(".json")

    def write(temporary):
        manifest_path.unlink(missing_ok=True)  # the old one no longer holds
        with open(temporary, "wb") as file:
            file.seek(128)  # the header comes when the number of rows is known
            squares = ordered_map(lab_square, files, workers)
            squares = progress(squares, len(files), f"{array.stem} arrays")
            for (name, *status), (lab, reason) in zip(files.values(), squares):
                if lab is None:
                    left_out[name] = reason
                    continue
                file.write(lab.tobytes())
                label = name.split("/")[1] if name.count("/") > 1 else None  # its class folder
                photographs.append([name, *status, label])
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, {
                "descr": "|u1", "fortran_order": False, "shape": (len(photographs), SIDE, SIDE, 3)})
    write_atomically(array, write)
    for reason, count in Counter(left_out.values()).items():
        names = [name for name, why in left_out.items() if why == reason][:3]
        say(f"{array.stem}: {count} left out, {reason}: {', '.join(names)}" + ", ..." * (count > 3))
    manifest = header | {"photographs": photographs, "left_out": left_out}
    write_atomically(manifest_path, lambda name: name.write_text(json.dumps(manifest)))
    return manifest


def class_names(manifest: dict) -> list[str]:
    """The scene classes of the photographs used, sorted; empty where there are not at least two."""
    names = sorted({label for *_, label in manifest["photographs"] if label})
    return names if len(names) > 1 else []


# --------------------------------------------------------------------------------- batches

class ColorizeData(torch.utils.data.Dataset):
    """Batches of stored Lab, gathered from memory-mapped arrays, one after the other.

    Sample n is number n of an endless stream: epoch n // len, position n % len, shuffled and
    augmented (flip, random resized crop, film) where `train`, and every draw a function of
    (seed, n) alone. Yields Lab uint8 (N, 3, size, size) and class numbers (N,), -1 for none.
    """

    def __init__(self, arrays: list[Path], labels=None, size: int = SIDE, train: bool = False,
                 crop: bool = True, film: bool = False, seed: int = 0, limit: int | None = None):
        self.paths, self.size, self.train = [str(path) for path in arrays], size, train
        self.crop, self.film, self.seed = crop, film, seed
        self.starts = np.cumsum([0] + [len(np.load(path, mmap_mode="r")) for path in self.paths])
        count = int(self.starts[-1])
        # a limit takes a fair sample, whatever the order of the files
        self.chosen = np.sort(np.random.default_rng(0).permutation(count)[:limit or None])
        self.labels = np.full(count, -1) if labels is None else np.asarray(labels)
        self._arrays, self._order = None, (None, None)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getstate__(self):  # a pickled memory map would carry its whole array
        return self.__dict__ | {"_arrays": None, "_order": (None, None)}

    def row(self, n: int) -> int:
        """The row that sample n is made from."""
        epoch, position = divmod(n, len(self))
        if not self.train:
            return self.chosen[position]
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return self.chosen[self._order[1][position]]

    def stored(self, row: int) -> np.ndarray:
        """A copy of one row (SIDE, SIDE, 3) of the arrays, counted through all of them."""
        if self._arrays is None:
            self._arrays = [np.load(path, mmap_mode="r") for path in self.paths]
        which = int(np.searchsorted(self.starts, row, side="right")) - 1
        return np.array(self._arrays[which][row - self.starts[which]])

    def __getitem__(self, n: int) -> tuple[torch.Tensor, int]:
        row = self.row(n)
        lab = torch.from_numpy(self.stored(row)).permute(2, 0, 1)
        if self.train:
            lab = self.augment(lab, np.random.default_rng([self.seed, n, 1]))
        elif self.size != SIDE:
            lab = transforms.resize(lab, [self.size, self.size], antialias=True)
        return lab, int(self.labels[row])

    def augment(self, lab: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        """A random flip, a random resized crop (35 to 100 % of the area), on half of them film."""
        area, ratio, x, y, flip = random.uniform(size=5)
        side = SIDE * np.sqrt(0.35 + 0.65 * area) if self.crop else SIDE
        stretch = np.exp((ratio - 0.5) * np.log(4 / 3)) if self.crop else 1.0
        height, width = (min(SIDE, int(round(s))) for s in (side / stretch, side * stretch))
        top, left = int(y * (SIDE - height + 1)), int(x * (SIDE - width + 1))
        lab = transforms.resized_crop(lab, top, left, height, width, [self.size, self.size],
                                      antialias=True)
        if flip < 0.5:
            lab = lab.flip(-1)
        return film_lightness(lab, random) if self.film and random.uniform() < 0.5 else lab

    def __getitems__(self, numbers) -> tuple[torch.Tensor, torch.Tensor]:
        labs, labels = zip(*(self[n] for n in numbers))
        return torch.stack(labs), torch.tensor(labels)


def film_lightness(lab: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Replace L of stored Lab (3, H, W) by what a film of random sensitivity and grain saw."""
    mixture = random.dirichlet([2.0, 2.0, 2.0])  # old films: blind to red, or behind a filter
    rgb = lab_to_rgb(decode_lab(lab.permute(1, 2, 0).numpy()))
    L = gray_to_L((rgb @ mixture).astype(np.float32))
    L = L + random.normal(0, random.uniform(0, 2), L.shape)  # grain, in units of L
    stored = torch.from_numpy(np.clip(np.rint(L * 2.55), 0, 255).astype(np.uint8))
    return torch.cat([stored[None], lab[1:]])


def count_colors(photographs: ColorizeData) -> tuple[np.ndarray, np.ndarray]:
    """Counts (256, 256) of stored a and b, and the mean ab of each whole L (101, 2).

    Counted over every 16th pixel of the photographs.
    """
    histogram, total, count = np.zeros(65536), np.zeros((101, 2)), np.zeros(101)
    for row in photographs.chosen:
        L, a, b = photographs.stored(row)[::4, ::4].reshape(-1, 3).T.astype(np.int64)
        L = (L * 100 + 127) // 255
        histogram += np.bincount(a * 256 + b, minlength=65536)
        count += np.bincount(L, minlength=101)
        total += np.stack([np.bincount(L, c - 128.0, minlength=101) for c in (a, b)], axis=1)
    return histogram.reshape(256, 256), total / np.maximum(count, 1)[:, None]


# ------------------------------------------------------------------------------- importing

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
                write_atomically(data / split / name, partial(shutil.copyfile, path))
    taken = ", ".join(f"{n} {what}" for what, n in counts.items()) or "no photograph"
    say(f"imported {source}: {taken}")


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


# ----------------------------------------------------------------------------- the command

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
    dataset = ColorizeData([processed / "train.npy"], train=True)
    histogram, _ = count_colors(dataset)
    print_colors(histogram)
    write_preview(processed / "preview.png", dataset, histogram)
    print(f"{processed / 'preview.png'}: samples as the network sees them (L, ab at L 60, colour) "
          "and the histogram of ab")


def print_colors(histogram: np.ndarray) -> None:
    """Mean and spread of a and b, from their counts (256, 256)."""
    axis, total = np.arange(-128, 128), histogram.sum()
    for name, marginal in (("a", histogram.sum(1)), ("b", histogram.sum(0))):
        mean = (marginal * axis).sum() / total
        spread = np.sqrt((marginal * (axis - mean) ** 2).sum() / total)
        print(f"{name}*: mean {mean:.1f}, spread {spread:.1f}")


def ab_histogram(counts: np.ndarray) -> Image.Image:
    """Counts (256, 256) of stored a and b as a picture: a to the right, b up, brighter is more."""
    share = np.log1p(counts) / np.log1p(max(counts.max(), 1))
    b, a = np.meshgrid(np.arange(127, -129, -1.0), np.arange(-128, 128.0), indexing="ij")
    ab = np.stack([a, b], axis=-1).astype(np.float32)
    return lab_to_image((share.T[::-1] * 75).astype(np.float32), ab)


def write_preview(path: Path, dataset: ColorizeData, histogram: np.ndarray) -> None:
    """Eight samples as L | ab at L 60 | colour, and the histogram of ab."""
    stored, _ = dataset.__getitems__(range(min(8, len(dataset))))
    tiles = []
    for lab in decode_lab(stored.permute(0, 2, 3, 1).numpy()):
        L, ab = lab[..., 0], lab[..., 1:]
        tiles += [lab_to_image(L, 0 * ab), lab_to_image(np.full_like(L, 60), ab), lab_to_image(L, ab)]
    captions = ["L", "ab at L 60", "colour"] * (len(tiles) // 3) + ["histogram of ab"]
    sheet = picture_sheet(tiles + [ab_histogram(histogram)], 6, captions, 192)
    write_atomically(path, lambda name: sheet.save(name, "PNG"))
