"""A folder or an archive of photographs -> arrays of Lab -> batches; the data command.

    python main.py data --source photos.zip        # import, build the arrays, report

DATA/train and DATA/val hold photographs, in class folders or not; DATA/processed what is made of
them: train.npy and val.npy, a manifest (.json) beside each, hashes.json, preview.png.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import re
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
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as transforms

from photo import (MIN_CHROMA, ColorizeError, content_hash, find_photos, gray_to_L, lab_to_image,
                   lab_to_rgb, ordered_map, picture_sheet, progress, read_photo, rgb_to_lab, say,
                   write_atomically)

ARRAY_FORMAT = 2     # of DATA/processed; a change rebuilds the arrays
SIDE = 256           # stored photographs are SIDE x SIDE: 197 kB each, 43,000 of them 8.5 GB
MIN_SIDE = 64        # smaller photographs teach little: they are enlarged four times and blurred
VAL_FRACTION = 0.1
BLOCK = 4 << 20      # bytes under one checksum: 2,000 numbers for 8 GB
# the smallest crop's share of the area, our own choice: ImageNet's 8 % shows a piece of something,
# and what it is, so what colour it has, only its surroundings tell; more than half repeats itself
MIN_CROP = 0.35
MAX_MEMBERS = 300_000   # files in an archive: Places365 has 330,000 for each of its twelve parts
MAX_MEMBER = 300 << 20  # bytes of a photograph in an archive
MAX_RATIO = 200         # of an archive's contents to its own size, from 1 MB on
MAX_HEADER = 1 << 20    # bytes of a long name or attributes in a tar; macOS keeps icons there
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # first bytes of a tar.*
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}


# ------------------------------------------------------------------------------ the arrays

def prepare(data: Path, val_fraction: float | None = None, workers: int | None = None) -> dict:
    """Build DATA/processed from DATA/train and DATA/val, or reuse it; a manifest for each split.

    val_fraction: of train, where there is no val; else what the arrays were built with, or a tenth.

    A manifest's "photographs" are [name, bytes, SHA-256, class or None], one for each row of the
    array; "left_out" has a reason for each other name. Its "fingerprint" is one of names and
    contents, so that a copy, or touch, changes nothing, and another pixel does.
    """
    data, workers = Path(data), workers or os.cpu_count() or 1
    processed = data / "processed"
    if val_fraction is None:
        val_fraction = read_json(processed / "train.json").get("val_fraction", VAL_FRACTION)
    paths = {split: find_photos(data / split) for split in ("train", "val")}
    if not paths["train"]:
        raise ColorizeError(no_photographs(data))
    contents = read_contents(data, paths["train"] + paths["val"], workers)
    check_overlap(data, contents)
    # what is aside for validation depends on the fraction only where there is no val
    key = [ARRAY_FORMAT, SIDE, None if paths["val"] else val_fraction,
           [[name, digest] for name, (*_, digest) in contents.items()]]
    fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    manifests = {split: read_manifest(processed / f"{split}.npy", fingerprint, workers)
                 for split in paths}
    if not all(manifests.values()):
        header = {"format": ARRAY_FORMAT, "fingerprint": fingerprint, "val_fraction": val_fraction}
        manifests = build_arrays(data, contents, header, workers)
    if not manifests["train"]["photographs"]:
        reasons = Counter(manifests["train"]["left_out"].values()).items()
        raise ColorizeError(f"no usable colour photograph below {data / 'train'}: "
                            + ", ".join(f"{count} {reason}" for reason, count in reasons))
    return manifests


def no_photographs(data: Path) -> str:
    """What to say where DATA/train holds no photograph."""
    if not data.is_dir():
        return f"--data {data}: no such folder; name one that holds train/ (and val/)"
    elsewhere = [path for path in find_photos(data) if path.parent != data / "processed"]
    if elsewhere:
        return (f"no photograph below {data / 'train'}, but {len(elsewhere)} elsewhere in {data}: "
                f"import them into another folder, python main.py data --source {data} "
                "--data data/mine, and name that with --data")
    return (f"no photograph below {data / 'train'}; put some there, or name another folder that "
            "holds train/ (and val/) with --data")


def read_json(path: Path) -> dict:
    """What write_json wrote; {} where there is nothing, or anything else."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        # its own checksum: an odd value is found here, not where somebody trips over it
        if isinstance(content, dict) and content.pop("checksum", 0) == json_checksum(content):
            return content
    return {}


def write_json(path: Path, content: dict) -> None:
    """Write a dict of plain values, and a checksum of them."""
    text = json.dumps(content | {"checksum": json_checksum(content)})
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def json_checksum(content: dict) -> int:
    return zlib.crc32(json.dumps(content).encode())


def read_contents(data: Path, paths: list[Path], workers: int) -> dict:
    """{name: [bytes, time, SHA-256]} of photographs; the hash is "" where one cannot be read.

    What is known of a photograph of the same name, size and time is taken from hashes.json: the
    second start of 43,000 photographs need not read 9 GB again.
    """
    book = data / "processed" / "hashes.json"
    known = read_json(book)

    def content_of(path):
        name = path.relative_to(data).as_posix()
        try:
            status = path.stat()
            state = [status.st_size, status.st_mtime_ns]
            if known.get(name, [])[:2] == state:
                return name, known[name]
            return name, [*state, content_hash(path)]
        except OSError:  # gone since it was listed, or not ours to read
            return name, [0, 0, ""]
    found = ordered_map(content_of, paths, workers)
    contents = dict(progress(found, len(paths), "photographs"))
    if contents != known:
        write_json(book, contents)
    return contents


def check_overlap(data: Path, contents: dict) -> None:
    """ColorizeError if a photograph is in both train and val (equal content)."""
    train = {digest: name for name, (*_, digest) in contents.items() if name.startswith("train/")}
    for name, (*_, digest) in contents.items():
        if digest and digest in train and name.startswith("val/"):
            raise ColorizeError(f"{data / train[digest]} and {data / name} are the same photograph, "
                                "in train and in val; delete one, or scores will flatter")


def read_manifest(array: Path, fingerprint: str, workers: int) -> dict:
    """A finished split's manifest if its array is of these photographs and whole, else {}."""
    manifest = read_json(array.with_suffix(".json"))
    if manifest.get("fingerprint") == fingerprint:
        with contextlib.suppress(OSError):
            if checksums(array, workers) == manifest["checksums"]:
                return manifest
    if array.exists():
        same = manifest.get("fingerprint") == fingerprint
        reason = "it is damaged" if same else "the photographs have changed"
        say(f"{array}: {reason}; building the arrays again")
    return {}


def checksums(path: Path, workers: int) -> list[int]:
    """CRC-32 of each block of a file, header and all: 3 GB/s a core, so reading is what it costs.

    That reading is not lost: it brings the array into memory, where training wants it.
    """
    def checksum(start):
        with open(path, "rb") as file:
            file.seek(start)
            return zlib.crc32(file.read(BLOCK))
    return [*ordered_map(checksum, range(0, path.stat().st_size, BLOCK), workers)]


def build_arrays(data: Path, contents: dict, header: dict, workers: int) -> dict:
    """Write both arrays; where there is no val, part of train is set aside. The manifests."""
    processed = data / "processed"
    need, free = len(contents) * SIDE * SIDE * 3, shutil.disk_usage(data).free
    if need > free:
        raise ColorizeError(f"{processed}: the arrays need {need / 1e9:.1f} GB and "
                            f"{free / 1e9:.1f} GB are free; make room, or put --data elsewhere")
    clear_leftovers(processed)

    def build(aside):
        sides = {"train": {}, "val": {}}
        for name, content in contents.items():
            in_val = name.startswith("val/") or content[-1] in aside
            sides["val" if in_val else "train"][data / name] = [name, *content]
        return {split: build_array(processed / f"{split}.npy", files, header, workers)
                for split, files in sides.items()}
    if any(name.startswith("val/") for name in contents):
        return build(set())
    aside = set_aside([digest for *_, digest in contents.values()], header["val_fraction"])
    manifests = build(aside)
    usable = [digest for manifest in manifests.values()
              for _, _, digest, _ in manifest["photographs"]]
    chosen = set_aside(usable, header["val_fraction"])
    if chosen != aside.intersection(usable):  # few photographs, and what was aside was left out
        manifests = build(chosen)
    say(f"no photographs in {data / 'val'}: {len(manifests['val']['photographs'])} of "
        f"{data / 'train'} are set aside for validation, by a hash of their content")
    return manifests


def set_aside(digests: list[str], fraction: float) -> set[str]:
    """Which contents are for validation: a share of all, but one at least and never all."""
    digests = sorted(set(filter(None, digests)))  # the smallest hashes are the first
    count = sum(in_validation(digest, fraction) for digest in digests)
    return set(digests[:max(min(max(count, 1), len(digests) - 1), 0)])


def in_validation(digest: str, fraction: float) -> bool:
    """Whether a photograph belongs to validation: by its content, so that others never move it."""
    return int(digest[:8], 16) < fraction * 16 ** 8


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
        image = read_photo(path, at_least=2 * SIDE).image  # twice, so that no aliasing is left
    except ColorizeError:
        return None, "unreadable"
    if min(image.size) < MIN_SIDE:
        return None, f"under {MIN_SIDE} pixels"
    if image.mode != "RGB":
        return None, "without colour"
    square = ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.LANCZOS)
    lab = rgb_to_lab(np.asarray(square))
    if np.hypot(lab[..., 1], lab[..., 2]).mean() < MIN_CHROMA:
        return None, "without colour"
    return encode_lab(lab), ""


def build_array(array: Path, files: dict, header: dict, workers: int) -> dict:
    """Write one split's array and then its manifest, which begins with `header`; returns it.

    files: {path: [relative name, bytes, time, hash]}. Rows are streamed: memory does not grow.
    """
    photographs, left_out, manifest_path = [], {}, array.with_suffix(".json")

    def write(temporary):
        manifest_path.unlink(missing_ok=True)  # the old one no longer holds
        with open(temporary, "wb") as file:
            file.seek(128)  # the header comes when the number of rows is known
            squares = ordered_map(lab_square, files, workers)
            squares = progress(squares, len(files), f"{array.stem} arrays")
            for (name, size, _, digest), (lab, reason) in zip(files.values(), squares):
                if lab is None:
                    left_out[name] = reason
                    continue
                file.write(lab.tobytes())
                label = name.split("/")[1] if name.count("/") > 1 else None  # its class folder
                photographs.append([name, size, digest, label])
            file.seek(0)
            shape = (len(photographs), SIDE, SIDE, 3)
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    write_atomically(array, write)
    manifest = header | {"photographs": photographs, "left_out": left_out,
                         "checksums": checksums(array, workers)}
    for line in left_out_reasons(manifest):
        say(f"{array.stem}: {line}")
    write_json(manifest_path, manifest)  # last: a build that was killed never looks finished
    return manifest


def left_out_reasons(manifest: dict) -> list[str]:
    """A line for each reason why photographs were left out, with the names of some."""
    by_reason = {}
    for name, reason in manifest["left_out"].items():
        by_reason.setdefault(reason, []).append(name)
    return [f"{len(names)} left out, {reason}: {', '.join(names[:3])}" + ", ..." * (len(names) > 3)
            for reason, names in by_reason.items()]


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
        """A random flip, a random resized crop (MIN_CROP or more of the area), on half film.

        lab is stored Lab (3, SIDE, SIDE); returns (3, size, size).
        """
        area, ratio, x, y, flip = random.uniform(size=5)
        side, stretch = SIDE, 1.0
        if self.crop:
            side = SIDE * np.sqrt(MIN_CROP + (1 - MIN_CROP) * area)
            # sides from 3:4 to 4:3 as ImageNet's usual crop has them: a third, on a log scale
            stretch = np.exp((ratio - 0.5) * np.log(4 / 3))
        height, width = (min(SIDE, int(round(s))) for s in (side / stretch, side * stretch))
        top, left = int(y * (SIDE - height + 1)), int(x * (SIDE - width + 1))
        lab = transforms.resized_crop(lab, top, left, height, width, [self.size, self.size],
                                      antialias=True)
        if flip < 0.5:
            lab = lab.flip(-1)
        if self.film and random.uniform() < 0.5:  # the other half: photographs as good as new
            return old_photograph(lab, random)
        return lab

    def __getitems__(self, numbers) -> tuple[torch.Tensor, torch.Tensor]:
        labs, labels = zip(*(self[n] for n in numbers))
        return torch.stack(labs), torch.tensor(labels)


# ------------------------------------------------------------------- old photographs

def old_photograph(lab: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Replace L of stored Lab (3, H, W) by what an old photograph would show of it; ab stays.

    A network that has seen clean lightness alone takes grain and faded blacks for things.
    """
    L = aged(film_lightness(lab, random), random)
    # grain of the film, noise of the scan: up to 3 of L, as in the old photographs tried
    L = L + random.standard_normal(L.shape, np.float32) * np.float32(random.uniform(0, 0.03))
    return torch.cat([torch.from_numpy(to_stored(L))[None], lab[1:]])


def film_lightness(lab: torch.Tensor, random: np.random.Generator) -> np.ndarray:
    """L (H, W), 0..1, that lens, film and paper of random make give of stored Lab (3, H, W)."""
    # early films are blind to red, later ones stood behind a filter: any mixture of channels
    mixture = random.dirichlet([2.0, 2.0, 2.0]).astype(np.float32)
    L = gray_to_L(lab_to_rgb(decode_lab(lab.permute(1, 2, 0).numpy())) @ mixture) / 100
    curve, blur, vignette = random.uniform(size=3) < [0.7, 0.4, 0.3]
    if curve:  # hard and soft papers, over- and underexposed: as often darker as lighter
        L = np.clip(L, 0, 1) ** np.float32(np.exp(random.uniform(np.log(0.6), np.log(1.6))))
    if blur:  # at the network's scale, where a focus missed by far looks like a little
        radius = random.uniform(0.3, 1.2)
        blurred = Image.fromarray(to_stored(L)).filter(ImageFilter.GaussianBlur(radius))
        L = np.asarray(blurred, np.float32) / 255
    if vignette:  # light falls off with the square of the distance: corners lose 10 to 40 %
        y, x = (np.linspace(-1, 1, side, dtype=np.float32) ** 2 for side in L.shape)
        L = L * (1 - np.float32(random.uniform(0.05, 0.2)) * (y[:, None] + x))
    return L


def aged(L: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """What time does to the lightness (H, W), 0..1, of a print."""
    blotched, faded, scratched = random.uniform(size=3) < [0.3, 0.6, 0.15]
    if blotched:  # damp and uneven paper: smooth stains, a sixth of the picture wide
        coarse = random.normal(0, random.uniform(0.01, 0.05), (6, 6)).astype(np.float32)
        stains = Image.fromarray(coarse).resize(L.shape[::-1], Image.Resampling.BICUBIC)
        L = L + np.asarray(stains)
    if faded:  # blacks are lifted, whites lowered
        low, high = random.uniform(0, 0.2), random.uniform(0.8, 1)
        L = low + (high - low) * L
    return scratch(L, random) if scratched else L


def scratch(L: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """L (H, W), 0..1, under one to four lines a pixel wide, of any gray, rather upright."""
    drawn = Image.fromarray(to_stored(L))
    for _ in range(random.integers(1, 5)):
        x, y, x_end, y_end = random.uniform(0, drawn.size * 2)
        x_end = x + (x_end - x) * random.uniform()  # film is scratched along its way, mostly
        ImageDraw.Draw(drawn).line((x, y, x_end, y_end), int(random.integers(256)), 1)
    return np.asarray(drawn, np.float32) / 255


def to_stored(L: np.ndarray) -> np.ndarray:
    """L in 0..1 as it is stored, uint8."""
    return np.clip(np.rint(L * 255), 0, 255).astype(np.uint8)


def count_colors(photographs: ColorizeData) -> tuple[np.ndarray, np.ndarray]:
    """Counts (256, 256) of stored a and b, and the mean ab of each whole L (101, 2).

    Counted over every 16th pixel of the photographs: their neighbours have nearly its colour.
    """
    histogram, total, count = np.zeros(65536), np.zeros((101, 2)), np.zeros(101)
    for row in photographs.chosen:
        L, a, b = photographs.stored(row)[::4, ::4].reshape(-1, 3).T.astype(np.int64)
        L = (L * 100 + 127) // 255  # stored 0..255 to whole units
        # one number for each pair of a and b, so that one bincount counts pairs
        histogram += np.bincount(a * 256 + b, minlength=65536)
        count += np.bincount(L, minlength=101)
        total += np.stack([np.bincount(L, c - 128.0, minlength=101) for c in (a, b)], axis=1)
    return histogram.reshape(256, 256), total / np.maximum(count, 1)[:, None]


# ------------------------------------------------------------------------------- importing

def pieces(read, size: int):
    """The next `size` bytes of what `read` reads, by the megabyte; EOFError where they end early."""
    while size > 0:
        piece = read(min(size, 1 << 20))
        if not piece:
            raise EOFError("it ends in the middle of a file")
        size -= len(piece)
        yield piece


def tar_members(stream):
    """(name, bytes, kind, pieces) of each member of a tar, read as a stream.

    Our own reading, of plain files alone: tarfile takes a damaged header for the end, and reads
    headers of any size whole.
    """
    said = {}  # name and size of the next member, where they do not fit its own header
    while (block := stream.read(512)) != bytes(512):  # the mark of the end
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # checks its checksum
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE,
                         tarfile.XGLTYPE):
            if not 0 <= info.size <= MAX_HEADER:
                raise ValueError(f"a header of {info.size} bytes")
            text = b"".join(pieces(stream.read, info.size))
            stream.read(-info.size % 512)  # all is padded to 512 bytes
            if info.type == tarfile.GNUTYPE_LONGNAME:
                said[b"path"] = text.rstrip(b"\0")
            elif info.type == tarfile.XHDTYPE:  # lines of "length key=value"
                said |= re.findall(rb"^\d+ (path|size)=(.*)$", text, re.MULTILINE)
            yield "", info.size, "header", ()
            continue
        name = said[b"path"].decode("utf-8", "surrogateescape") if b"path" in said else info.name
        size = 0 if info.isdir() else int(said.get(b"size", info.size))
        plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
        content, said = pieces(stream.read, size), {}
        yield name, size, "file" if plain else "folder" if info.isdir() else "other", content
        for _ in content:  # what was not taken
            pass
        stream.read(-size % 512)
    if stream.read(16 << 20).strip(b"\0"):  # a header overwritten by zeros looks like the end
        raise ValueError("there is more after its end")


class ZipFileSource(io.BufferedReader):
    """The bytes of a zip; its list of members, which zipfile reads whole, has a bound."""

    def read(self, size=-1):
        if size > 100 * MAX_MEMBERS:  # 46 bytes and a name each
            raise ValueError("its list of members is too long")
        return super().read(size)


def zip_members(source: Path):
    """(name, bytes, kind, pieces) of each member of a zip."""
    with ZipFileSource(io.FileIO(source)) as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)  # 0: from Windows
            kind = "folder" if info.is_dir() else "file" if plain else "other"
            with archive.open(info) as member:
                yield info.filename, info.file_size, kind, pieces(member.read, info.file_size)


def members(source: Path):
    """(name, bytes, kind, pieces) of each member of a zip or a tar, packed or not."""
    with open(source, "rb") as file:
        start = file.read(6)
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        yield from zip_members(source)
        return
    unpacked = next((unpacked for magic, unpacked in PACKED.items() if start.startswith(magic)), open)
    with unpacked(source, "rb") as stream:
        yield from tar_members(stream)


def check_member(source: Path, name: str, size: int, kind: str, count: int, total: int,
                 space: tuple[int, int]) -> None:
    """ColorizeError for a member that leads out of the folder, is no file, or too much.

    count, total: members and bytes so far; space: the archive's own bytes, and those free.
    """
    packed, free = space
    nothing, shown = "nothing was taken", f"--source {source}: '{name[:100]}'"
    if kind == "other" or name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise ColorizeError(f"{shown} is a link or device, or leads out of the folder; "
                            f"{nothing}; unpack it yourself if you trust it")
    bound = MAX_RATIO * max(packed, 1 << 20)  # small archives of plain pictures pack well
    if not 0 <= size <= MAX_MEMBER or total > bound or count > MAX_MEMBERS:
        raise ColorizeError(f"{shown} unpacks to {size >> 20} MB, all {count} so far to "
                            f"{total >> 20} MB, more than photographs do; {nothing}")
    if total > free:
        raise ColorizeError(f"--source {source}: unpacks to over {free >> 20} MB, the space that is "
                            f"free; {nothing}; make room, or unpack it elsewhere")


def unpack(source: Path, folder: Path) -> None:
    """Unpack a zip or tar; ColorizeError if it is neither, hostile or damaged, at the first sign."""
    count = total = 0
    space = source.stat().st_size, shutil.disk_usage(folder).free
    try:
        for name, size, kind, content in members(source):
            count, total = count + 1, total + size
            check_member(source, name, size, kind, count, total, space)
            if kind == "file" and size:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "wb") as file:
                    file.writelines(content)
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error,
            lzma.LZMAError, tarfile.TarError) as error:  # RuntimeError: encrypted, unknown packing
        reason = getattr(error, "strerror", "") or error
        raise ColorizeError(f"--source {source}: no zip or tar, or a damaged or encrypted one "
                            f"({reason}); nothing was taken; get it again, or unpack it yourself "
                            "and name the folder") from None


def clear_leftovers(folder: Path) -> None:
    """Remove what killed runs left: .NAME.PID.part and .import-PID-..., but not of those at work."""
    for path in folder.rglob(".*"):
        number = re.fullmatch(r"\.import-(\d+)-.*|\..*\.(\d+)\.part", path.name)
        if number and not is_running(int(number[1] or number[2])):
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether a process other than this one has the number."""
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return process != os.getpid()  # in a container numbers come again: it was an earlier run


def import_photos(source: Path, data: Path, val_fraction: float) -> None:
    """Take the photographs of a zip, tar or folder into DATA/train and DATA/val, classes kept.

    A set that comes with train and val (or test) folders stays split so; else the split is by a
    hash of each content, so that adding photographs moves none.
    """
    if not (os.path.isfile(source) or os.path.isdir(source)):  # a pipe would never end
        raise ColorizeError(f"--source {source}: no such file or folder; check the path")
    inside, target = source.resolve(), data.resolve()
    if source.is_dir() and target in (inside, *inside.parents):
        raise ColorizeError(f"--source {source}: lies in --data {data}, which would be copied into "
                            "itself; name another folder with --data")
    clear_leftovers(data)
    try:
        data.mkdir(parents=True, exist_ok=True)
        unpacked = tempfile.TemporaryDirectory(dir=data, prefix=f".import-{os.getpid()}-")
    except OSError as error:
        raise ColorizeError(f"--data {data}: cannot be written ({error.strerror}); "
                            "name another folder") from None
    with unpacked:
        folder = source
        if not source.is_dir():
            say(f"unpacking {source}")
            folder = Path(unpacked.name)
            unpack(source, folder)
        paths = find_photos(folder)
        if folder == source and inside in target.parents:  # what an earlier import made of it
            paths = [path for path in paths if target not in path.resolve().parents]
        counts, top = Counter(), top_folder(folder, paths)
        for path in progress(paths, len(paths), f"import {source.name}"):
            counts[import_photo(path, path.relative_to(top), data, val_fraction)] += 1
    taken = ", ".join(f"{n} {what}" for what, n in counts.items()) or "no photograph"
    say(f"imported {source}: {taken}")


def top_folder(folder: Path, paths: list[Path]) -> Path:
    """The folder of which all below names splits and classes: the deepest that holds all paths."""
    top = Path(os.path.commonpath([path.parent for path in paths])) if paths else folder
    for parent in (top, *top.parents):  # a set of which only train or val is there
        if parent.name.lower() in SPLITS and (parent == folder or folder in parent.parents):
            top = parent.parent
    return top


def import_photo(path: Path, name: Path, data: Path, val_fraction: float) -> str:
    """Copy a photograph to DATA/train/NAME or DATA/val/NAME; returns what became of it.

    Where another photograph has that name, in either split, its hash goes into the name.
    """
    try:
        size, digest = path.stat().st_size, content_hash(path)
    except OSError:  # gone since it was listed, or not ours to read
        return "unreadable"
    split = "val" if in_validation(digest, val_fraction) else "train"
    if len(name.parts) > 1 and name.parts[0].lower() in SPLITS:
        split, name = SPLITS[name.parts[0].lower()], Path(*name.parts[1:])
    for stem in (name.stem, f"{name.stem}-{digest[:8]}", f"{name.stem[:100]}-{digest}"):
        name = name.with_stem(stem)
        others = [data / other / name for other in ("train", "val")]
        others = [other for other in others if other.exists()]
        if not others:
            write_atomically(data / split / name, partial(shutil.copyfile, path))
            return split
        # names and sizes alone are equal for different scans of one camera
        if any(other.stat().st_size == size and content_hash(other) == digest
               for other in others if other.is_file()):
            break
    return "already there"


# ----------------------------------------------------------------------------- the command

def data(*, data: Path = Path("data/input"), source: Path | None = None,
         val_fraction: float = 0.1, workers: int | None = None) -> None:
    """Import photographs, build the arrays that train reads, and say what is in them.

    data: folder that holds train/ and val/; the arrays are written to its processed/
    source: a zip, a tar or a folder to import first
    val_fraction: share set aside for validation, by a hash of the content (0.001..0.999)
    workers: threads that read photographs; else one for each core (1..1024)
    """
    if source is not None:
        import_photos(Path(source), Path(data), val_fraction)
    manifests = prepare(data, val_fraction, workers)
    processed = Path(data, "processed")
    for split, manifest in manifests.items():
        print(f"{split}: {len(manifest['photographs'])} photographs used")
        for line in left_out_reasons(manifest):
            print(f"  {line}")
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
    """Mean and spread of a and b, from their counts (256, 256).

    A set whose mean is far from gray, or whose spread is under 10, teaches few colours.
    """
    axis, total = np.arange(-128, 128), histogram.sum()
    for name, marginal in (("a", histogram.sum(1)), ("b", histogram.sum(0))):
        mean = (marginal * axis).sum() / total
        spread = np.sqrt((marginal * (axis - mean) ** 2).sum() / total)
        print(f"{name}*: mean {mean:.1f}, spread {spread:.1f}")


def ab_histogram(counts: np.ndarray) -> Image.Image:
    """Counts (256, 256) of stored a and b as a picture: a to the right, b up, brighter is more."""
    # grays are a thousand times as frequent as any vivid colour: only a logarithm shows both
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
        level = np.full_like(L, 60)  # most hues have their most vivid sRGB colour near L 60
        tiles += [lab_to_image(L, 0 * ab), lab_to_image(level, ab), lab_to_image(L, ab)]
    captions = ["L", "ab at L 60", "colour"] * (len(tiles) // 3) + ["histogram of ab"]
    sheet = picture_sheet(tiles + [ab_histogram(histogram)], 6, captions, 192)
    write_atomically(path, lambda name: sheet.save(name, "PNG"))
