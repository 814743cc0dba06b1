"""A folder of photographs -> arrays of Lab -> batches; the data command.

    python main.py data --source my_photos --data mine    # import, build the arrays, report

DATA/train and DATA/val hold photographs, in folders or not; DATA/processed what is made of
them: train.npy, val.npy, manifests.json.gz with the names of rows, preview.png.
"""

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as transforms

from photo import (FORMATS, MADE, MIN_CHROMA, TERMINAL, ColorizeError, Photo, lab_to_image,
                   lab_to_linear, made_with, photos_in, picture_sheet, rgb_to_lab, say,
                   write_atomically, write_photo)

# a test set's photographs are as good for choosing the best epoch as any others
SPLITS = {"train": "train"} | dict.fromkeys(["val", "valid", "validation", "test"], "val")
VAL_SHARE = 0.1     # of train, for validation, where there is no val
ARRAY_FORMAT = 3    # of DATA/processed; a change rebuilds the arrays
SIDE = 256          # stored photographs are SIDE x SIDE: 43,000 of them are 8.5 GB
MIN_SIDE = 64       # smaller photographs, enlarged over four times, teach blur
# The smallest crop's share of the area, our own choice: in less the surroundings, which
# tell a thing's colour, are gone (ImageNet's begin at 8 %); over a half all are alike.
MIN_CROP = 0.35


# --------------------------------------------------------- many photographs, and importing

def say_names(what: str, names_of: dict[str, list]) -> None:
    """A line for each reason, with the names of three."""
    for reason, names in names_of.items():
        more = ", ..." * (len(names) > 3)
        say(f"{len(names)} {what}, {reason}: {', '.join(map(str, names[:3]))}{more}")


def progress(items, total: int, label: str):
    """Pass items through; one line redrawn on a terminal, one in 10 seconds elsewhere."""
    start = drawn = time.monotonic()
    line, pause = ("\r\x1b[K{}", 0.2) if sys.stderr.isatty() else ("{}\n", 10)
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - drawn >= pause or (done == total and drawn > start):
            drawn = now
            # of all so far: photographs differ too much for the latest few to tell
            left = timedelta(seconds=round((now - start) / done * (total - done)))
            with TERMINAL:
                print(line.format(f"{label}: {done}/{total}, {left} left"), file=sys.stderr,
                      end="\n" * (pause < 1 and done == total), flush=True)


def ordered_map(function, items, workers: int, window: int = 64):
    """Like map, in threads, in order, with at most `window` results waiting to be taken."""
    items = iter(items)
    pool = ThreadPoolExecutor(max(workers, 1))  # Pillow and numpy release the lock
    waiting = deque(pool.submit(function, item) for item in islice(items, window))
    try:
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(items, 1))
    finally:
        pool.shutdown(cancel_futures=True)  # an error cancels what has not begun


def content_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; "" where it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def find_photos(folder: Path, made: bool = True) -> list[Path]:
    """Photographs below a folder, sorted, also what is `made` here; others are said."""
    readable = {suffix for suffix, kind in Image.EXTENSION.items() if kind in FORMATS}
    found, passed_over, waiting = [], defaultdict(list), [Path(folder)]
    for here in waiting:  # it grows; os.walk calls itself, too deep for 1,000 folders
        try:
            names = [name for name in sorted(os.listdir(here)) if name[0] != "."]
        except OSError as error:
            names, reason = [], f"cannot be read: {error.strerror}"
            passed_over[reason].append(here)
        for path in (here / name for name in names):
            # os.path never raises, where a folder may be listed and not entered
            if os.path.islink(path):  # it may lead to all of the machine, or in a circle
                passed_over["link"].append(path)
            elif os.path.isdir(path):
                waiting.append(path)
            elif path.suffix.lower() not in readable or not os.path.isfile(path):
                passed_over["no format that can be read"].append(path)  # HEIC, notes, pipes
            elif made or not made_with(path):  # the colours of a result are no truth
                found.append(path)
            else:
                passed_over["made by this program"].append(path)
    say_names("passed over", passed_over)
    return sorted(found)


def import_photos(source: Path, data: Path, val_fraction: float) -> None:
    """Copy the photographs of a folder into DATA/train and val, its folders kept.

    A set that comes with train and val (or test) stays split so; others by hash of content.
    """
    if not source.is_dir():
        raise ColorizeError(f"--source {source}: no such folder; a zip or another archive "
                            "unpack yourself, and name its folder")
    source, target = source.resolve(), data.resolve()
    if source in (target, *target.parents) or target in source.parents:
        raise ColorizeError(f"--source {source}: lies in --data {data}, or that in it, and "
                            "would be copied into itself; name another folder with --data")
    root = source.parent  # the folder's own name may be that of a split
    names = [path.relative_to(root) for path in find_photos(source, made=False)]
    top = Path(os.path.commonpath([name.parent for name in names] or [""]))
    counts = Counter(import_photo(root, name, top, data, val_fraction)
                     for name in progress(names, len(names), "import"))
    taken = ", ".join(f"{n} {what}" for what, n in counts.items()) or "no photograph"
    say(f"imported {source}: {taken}")


def import_photo(root: Path, name: Path, top: Path, data: Path, val_fraction: float) -> str:
    """Copy root / name to DATA/train/NAME or DATA/val/NAME; returns what became of it."""
    path, digest = root / name, content_hash(root / name)
    if not digest:  # gone since it was listed, or not ours to read
        return "unreadable"
    split = "val" if in_validation(digest, val_fraction) else "train"
    # above what holds all, or right below: elsewhere it may be a class of that name
    folders = [folder.lower() for folder in name.parts[:-1][:len(top.parts) + 1]]
    start = next((n for n, folder in enumerate(folders) if folder in SPLITS), None)
    if start is None:
        name = name.relative_to(top)
    else:
        split, name = SPLITS[folders[start]], Path(*name.parts[start + 1:])
    for place in (name, name.with_stem(digest)):  # the hash where another has the name
        others = [*filter(os.path.isfile, (data / "train" / place, data / "val" / place))]
        if not others:
            write_atomically(data / split / place, partial(shutil.copyfile, path))
            return split
        # a camera gives one name, and BMP one size, to many photographs
        if digest in map(content_hash, others):
            break
    return "already there"


def in_validation(digest: str, fraction: float) -> bool:
    # by the photograph's own SHA-256, so that others do not move it; "" if it is unreadable
    return int(digest[:8] or "0", 16) < fraction * 16 ** 8


# ------------------------------------------------------------------------------ the arrays

def prepare(data: Path, workers: int | None = None) -> dict:
    """Build DATA/processed from DATA/train and DATA/val, or reuse it: {split: manifest}.

    A manifest's "photographs" are [name, SHA-256, CRC-32 of the row], one for each row;
    "left_out" is {reason: names}; "fingerprint" is of all names and contents: touching or
    copying the photographs does not change it, one pixel does.
    """
    data, workers = Path(data), workers or os.cpu_count() or 1
    seen = {}  # sizes and times, to know at a start without reading 9 GB if these are new
    for folder in filter(Path.is_dir, (data / "train", data / "val")):
        for path in find_photos(folder):
            with contextlib.suppress(OSError):  # gone since it was listed
                file = path.stat()
                seen[path.relative_to(data).as_posix()] = [file.st_size, file.st_mtime_ns]
    if not any(name.startswith("train/") for name in seen):
        source = data if os.path.isdir(data) else "FOLDER"
        raise ColorizeError(f"no photograph below {data / 'train'}; " + (
            f"move some there from {data / 'val'}" if seen else "if they are elsewhere: "
            f"python main.py data --source {source} --data {data}_2"))
    manifest_path, known = data / "processed" / "manifests.json.gz", {}  # has a checksum
    with contextlib.suppress(OSError, EOFError, ValueError, TypeError, zlib.error):
        known = dict(json.loads(gzip.decompress(manifest_path.read_bytes())))
    if os.path.exists(data / "processed" / "train.npy") and not manifest_path.exists():
        raise ColorizeError(f"{data}/processed/train.npy: is not of this program; move it")
    made_of = [ARRAY_FORMAT, SIDE, seen]  # which the arrays must be
    if known.get("made_of") != made_of or not is_whole(
            manifest_path.parent, known.get("manifests"), workers):
        why = "of others, or damaged" if manifest_path.exists() else "not built yet"
        say(f"{manifest_path.parent}: {why}; building the arrays")
        write_atomically(manifest_path, Path.touch)  # a killed build never looks finished
        known = {"made_of": made_of, "manifests": build_arrays(data, [*seen], workers)}
        packed = gzip.compress(json.dumps(known).encode())
        write_atomically(manifest_path, lambda temporary: temporary.write_bytes(packed))
    for manifest in known["manifests"].values():
        say_names("left out", manifest["left_out"])
    if not known["manifests"]["train"]["photographs"]:
        raise ColorizeError(f"no usable photograph below {data / 'train'}; add some with "
                            f"colour, of at least {MIN_SIDE} pixels a side")
    return known["manifests"]


def is_whole(processed: Path, manifests: dict, workers: int) -> bool:
    """Whether the arrays are as their manifests say."""
    with contextlib.suppress(Exception):  # an odd manifest ends in many kinds
        for split in ("train", "val"):
            manifest = manifests[split]
            ", ".join(sum(manifest["left_out"].values(), []))  # lists of names
            stored = np.load(processed / f"{split}.npy", mmap_mode="r")
            expected = [checksum for _, _, checksum, *_ in manifest["photographs"]]
            # reading 8.5 GB takes 6 seconds, and training then finds them in memory
            sums = [*ordered_map(zlib.crc32, stored, workers)]
            if sums != expected or stored.dtype != np.uint8:
                return False
        return True
    return False


def encode_lab(lab: np.ndarray) -> np.ndarray:
    """Lab (..., 3) to the stored uint8: round(L*255/100), round(a)+128, round(b)+128."""
    stored = lab * np.array([2.55, 1, 1], np.float32) + np.array([0, 128, 128], np.float32)
    return np.clip(np.rint(stored), 0, 255).astype(np.uint8)


def decode_lab(stored):
    """Stored Lab, array (..., 3) or tensor (N, 3, H, W), to float32 L 0..100 and ab."""
    if isinstance(stored, torch.Tensor):
        return torch.cat([stored[:, :1] / 2.55, stored[:, 1:].float() - 128], dim=1)
    return (stored - np.float32([0, 128, 128])) / np.float32([2.55, 1, 1])


def lab_square(path: Path) -> tuple[np.ndarray | None, str]:
    """A photograph as stored Lab (SIDE, SIDE, 3); or None, and why it is left out."""
    try:
        # a JPEG is decoded at 1/2, 1/4 or 1/8: from 2 * SIDE on the result shows nothing
        with photos_in(path, first=True, at_least=2 * SIDE) as (photo,):
            image = photo.image
            if min(image.size) < MIN_SIDE:
                return None, f"under {MIN_SIDE} pixels"
            if image.mode != "RGB":
                return None, "without colour"
            if made_with(path):  # its colours are no truth
                return None, "made by this program"
            square = ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.LANCZOS)
    except ColorizeError:  # also where it is gone since it was listed
        return None, "unreadable"
    lab = rgb_to_lab(np.asarray(square))
    if np.hypot(lab[..., 1], lab[..., 2]).mean() < MIN_CHROMA:  # gray, stored as colour
        return None, "without colour"
    return encode_lab(lab), ""


def build_arrays(data: Path, names: list, workers: int) -> dict:
    """Write train.npy and val.npy in DATA/processed; returns {split: manifest}.

    Where there is no val, a share of train is, by hash: whatever is added, none moves.
    """
    digests = ordered_map(content_hash, [data / name for name in names], workers)
    hashes = dict(zip(names, [*progress(digests, len(names), "reading")]))
    train, given = ({digest for name, digest in hashes.items() if name.startswith(split)}
                    - {""} for split in ("train/", "val/"))  # "" is of an unreadable one
    same = [name for name, digest in hashes.items() if digest in train & given]
    if same:  # before hours of work
        raise ColorizeError(f"{data}: in train and in val is the same photograph; delete "
                            f"one, or scores will flatter: {', '.join(same[:8])}")

    def write(val):  # val: the hashes of its photographs
        parts = {"train": {}, "val": {}}  # {name: SHA-256} of each split
        for name, digest in hashes.items():
            parts["val" if digest in val else "train"][name] = digest
        return {split: write_array(data, split, parts[split], workers) for split in parts}
    share = None if given else VAL_SHARE
    manifests = write(given or {d for d in hashes.values() if in_validation(d, share)})
    if share:
        say(f"no photograph in {data / 'val'}: a tenth of train is set aside, by content")
        used = [[digest for _, digest, _ in manifest["photographs"]]
                for manifest in manifests.values()]
        if not all(used):  # of few the share may be none, or all
            manifests = write(set(sorted(set(sum(used, [])))[:-1][:1]))  # of one none
    key = [ARRAY_FORMAT, SIDE, share, [*hashes.items()]]
    fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return {split: manifest | {"fingerprint": fingerprint}
            for split, manifest in manifests.items()}


def write_array(data: Path, split: str, hashes: dict, workers: int) -> dict:
    """Write DATA/processed/SPLIT.npy of {name: SHA-256}; returns its manifest."""
    rows, left_out = [], {}
    squares = ordered_map(lab_square, [data / name for name in hashes], workers)
    squares = progress(squares, len(hashes), f"{split}.npy")

    def write(temporary):
        with open(temporary, "wb") as file:
            file.seek(128)  # the header comes when the number of rows is known
            for (lab, reason), (name, digest) in zip(squares, hashes.items()):
                if lab is None:
                    left_out.setdefault(reason, []).append(name)
                    continue
                file.write(lab.tobytes())
                rows.append([name, digest, zlib.crc32(lab.tobytes())])
            file.seek(0)
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False,
                       "shape": (len(rows), SIDE, SIDE, 3)})
    write_atomically(data / "processed" / f"{split}.npy", write)
    return {"photographs": rows, "left_out": left_out}


# --------------------------------------------------------------------------------- batches

class ColorizeData(torch.utils.data.Dataset):
    """Photographs of a memory-mapped array as stored Lab (3, size, size), uint8.

    Sample n is number n of an endless stream: epoch n // len, position n % len, shuffled
    and augmented (flip, crop, film) where `train`, each draw a function of (seed, n) alone.
    """

    def __init__(self, path: Path, size: int = SIDE, train: bool = False,
                 film: bool = False, seed: int = 0, limit: int | None = None):
        self.path, self.array = path, np.load(path, mmap_mode="r")
        self.size, self.train, self.film, self.seed = size, train, film, seed
        # a limit takes a fair sample, whatever the order of the files
        random = np.random.default_rng(0)
        self.chosen = np.sort(random.permutation(len(self.array))[:limit])
        self.epoch, self.order = None, np.arange(len(self.chosen))  # of validation

    def __len__(self) -> int:
        return len(self.chosen)

    def __getstate__(self):  # a pickled memory map would carry its whole array
        return self.__dict__ | {"array": None}

    def row(self, n: int) -> int:  # the one that sample n is made from
        epoch, position = divmod(n, len(self))
        if self.train and epoch != self.epoch:
            random = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, random.permutation(len(self))
        return self.chosen[self.order[position]]

    def stored(self, row: int) -> np.ndarray:
        """A copy of one row (SIDE, SIDE, 3) of the array."""
        if self.array is None:  # in a worker
            self.array = np.load(self.path, mmap_mode="r")
        return np.array(self.array[row])

    def __getitem__(self, n: int) -> torch.Tensor:
        lab = torch.from_numpy(self.stored(self.row(n))).permute(2, 0, 1)
        if self.train:
            lab = self.augment(lab, np.random.default_rng([self.seed, n, 1]))
        elif self.size != SIDE:
            lab = transforms.resize(lab, [self.size, self.size], antialias=True)
        return lab

    def augment(self, lab: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        """A random flip, a random resized crop of MIN_CROP or more, on half of them film.

        lab is stored Lab (3, SIDE, SIDE); returns (3, size, size).
        """
        area, ratio, x, y, flip = random.uniform(size=5)
        side = SIDE * np.sqrt(MIN_CROP + (1 - MIN_CROP) * area)
        # each side by the root of the shape, 3:4 to 4:3 on a log scale, as ImageNet's
        stretch = np.exp((ratio - 0.5) * np.log(4 / 3))
        height, width = (min(SIDE, int(round(s))) for s in (side / stretch, side * stretch))
        top, left = int(y * (SIDE - height + 1)), int(x * (SIDE - width + 1))
        lab = transforms.resized_crop(lab, top, left, height, width, [self.size, self.size],
                                      antialias=True)
        lab = lab.flip(-1) if flip < 0.5 else lab
        old = self.film and random.uniform() < 0.5  # the others stay as good as new
        return old_photograph(lab, random) if old else lab


def old_photograph(lab: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Replace L of stored Lab (3, H, W) by what an old photograph shows of it; ab stays.

    A network that has seen clean lightness alone takes grain and faded blacks for things.
    """
    # early films are blind to red, later ones stood behind filters: any mixture of light
    mixture = random.dirichlet([2.0, 2.0, 2.0]).astype(np.float32)
    L, ab = np.split(decode_lab(lab.permute(1, 2, 0).numpy()), [1], axis=-1)
    light = np.clip(lab_to_linear(L[..., 0], ab) @ mixture, 0, 1)
    # CIE L*, 0..1: for white light, whatever the mixture, L is what it was
    L = np.where(light > 0.008856, 1.16 * np.cbrt(light) - 0.16, 9.033 * light)
    curve, blur, vignette, faded = random.uniform(size=4) < [0.7, 0.4, 0.3, 0.6]
    if curve:  # hard and soft papers, over- and underexposed, as often darker as lighter
        L = np.clip(L, 0, 1) ** np.float32(np.exp(random.uniform(np.log(0.6), np.log(1.6))))
    if blur:  # a radius in pixels of the sample: of a scan of 2,000 pixels 5 to 20
        image = Image.fromarray(np.rint(np.clip(L, 0, 1) * 255).astype(np.uint8))
        blurred = image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 1.2)))
        L = np.asarray(blurred, np.float32) / 255
    if vignette:  # light falls off with the square of the distance: corners lose 10 to 40 %
        y, x = (np.linspace(-1, 1, side, dtype=np.float32) ** 2 for side in L.shape)
        L = L * (1 - np.float32(random.uniform(0.05, 0.2)) * (y[:, None] + x))
    if faded:  # blacks are lifted, whites lowered
        low, high = random.uniform(0, 0.2), random.uniform(0.8, 1)
        L = low + (high - low) * L
    # grain of the film and noise of the scan: up to 3 of L
    L = L + random.uniform(0, 0.03) * random.standard_normal(L.shape, np.float32)
    stored = np.rint(np.clip(L, 0, 1) * 255).astype(np.uint8)
    return torch.cat([torch.from_numpy(stored)[None], lab[1:]])


def count_colors(photographs: ColorizeData) -> tuple[np.ndarray, np.ndarray]:
    """Counts (256, 256) of stored a and b, and the mean ab of each whole L (101, 2).

    Counted over every 16th pixel of the photographs: neighbours are nearly alike.
    """
    histogram, total, count = np.zeros(65536), np.zeros((101, 2)), np.zeros(101)
    for row in photographs.chosen:
        L, a, b = photographs.stored(row)[::4, ::4].reshape(-1, 3).T.astype(np.int64)
        L = (L * 100 + 127) // 255  # stored 0..255 to whole units
        # one number for each pair of a and b, so that one bincount counts pairs
        histogram += np.bincount(a * 256 + b, minlength=65536)
        count += np.bincount(L, minlength=101)
        sums = [np.bincount(L, c - 128.0, minlength=101) for c in (a, b)]
        total += np.stack(sums, axis=1)
    return histogram.reshape(256, 256), total / np.maximum(count, 1)[:, None]


def data(*, data: Path = Path("data/input"), source: Path | None = None,
         val_fraction: float = 0.1, workers: int | None = None) -> None:
    """Import photographs, build the arrays that train reads, and say what is in them.

    data: folder that holds train/ and val/; the arrays are written to its processed/
    source: a folder of photographs to copy there first
    val_fraction: of source, share for validation, by a hash of the content (0.001..0.999)
    workers: threads that read photographs; else one for each core (1..1024)
    """
    if source is not None:
        import_photos(Path(source), Path(data), val_fraction)
    manifests, processed = prepare(data, workers), Path(data, "processed")
    for split, manifest in manifests.items():
        say(f"{split}: {len(manifest['photographs'])} photographs used", result=True)
    dataset = ColorizeData(processed / "train.npy", train=True)
    tiles = []  # L and colour of eight samples, two in a row
    stored = torch.stack([dataset[n] for n in range(min(8, len(dataset)))])
    for lab in decode_lab(stored.permute(0, 2, 3, 1).numpy()):
        tiles += [lab_to_image(lab[..., 0], lab[..., 1:] * factor) for factor in (0, 1)]
    sheet = picture_sheet(tiles, 4, ["L", "colour"] * (len(tiles) // 2), 192)
    write_photo(processed / "preview.png", [sheet], Photo(sheet), MADE)
    say(f"{processed / 'preview.png'}: samples as the network sees them", result=True)


if __name__ == "__main__":
    raise SystemExit("type: python main.py data --help")
