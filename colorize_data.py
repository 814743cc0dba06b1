"""A folder or archive of photographs -> arrays of Lab -> batches; the data command.

    python main.py data --source photos.zip        # import, build the arrays, report

DATA/train and DATA/val hold photographs, in class folders or not; DATA/processed what is
made of them: train.npy and val.npy, a manifest (.json) of each, hashes.json, preview.png.
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
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as transforms

from photo import (MIN_CHROMA, ColorizeError, content_hash, find_photos, lab_to_image,
                   lab_to_linear, ordered_map, picture_sheet, progress, read_photo,
                   rgb_to_lab, say, survey, write_atomically)

MAX_MEMBERS = 300_000   # files in an archive: seven times what our own network learned from
MAX_MEMBER = 300 << 20  # bytes of a photograph: 100 megapixels of 8-bit RGB, not compressed
MAX_RATIO = 200         # of all contents to the archive, from 1 MB on; photographs: 1 to 2
# by the first bytes of the file
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
# a test set's photographs are as good for choosing the best epoch as any others
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "val"}

ARRAY_FORMAT = 3    # of DATA/processed; a change rebuilds the arrays
SIDE = 256          # stored photographs are SIDE x SIDE: 43,000 of them are 8.5 GB
MIN_SIDE = 64       # smaller photographs, enlarged over four times, teach blur
# The smallest crop's share of the area is our own choice: what colour a thing has its
# surroundings tell, and ImageNet's usual 8 % shows none; crops over half differ too little.
MIN_CROP = 0.35


# ------------------------------------------------------------------------------- importing

class Bounded(io.BufferedReader):
    """A stranger's file: at most `largest` bytes at once, and none far behind `bound`."""

    def __init__(self, raw, largest: int, bound: float):
        super().__init__(raw)
        self.largest, self.bound, self.latest = largest, bound, b""

    def read(self, size=-1):
        # tarfile reads a header, and zipfile its list of members, whole, of any size
        if not -1 <= size <= self.largest or self.tell() > self.bound:
            raise ValueError("its headers are larger than those of photographs")
        self.latest = super().read(self.largest if size == -1 else size)
        return self.latest


def members(source: Path, bound: float):
    """(name, bytes, kind, file) of each member of a zip or a tar, packed or not."""
    with open(source, "rb") as file:
        start = file.read(6)
    if start.startswith((b"PK\3\4", b"PK\5\6")):  # with members, without
        largest = 100 * MAX_MEMBERS  # of the list: 46 bytes and a name each
        with Bounded(io.FileIO(source), largest, bound) as file, \
                zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                mode = stat.S_IFMT(info.external_attr >> 16)  # 0 where Windows packed it
                plain = mode in (0, stat.S_IFREG)
                kind = "folder" if info.is_dir() else "file" if plain else "other"
                with archive.open(info) as member:  # which checks the CRC at its end
                    yield info.filename, info.file_size, kind, member
        return
    openers = [opener for magic, opener in PACKED.items() if start.startswith(magic)]
    # 1 MB of a header: macOS keeps icons there
    with (openers or [io.FileIO])[0](source) as raw, Bounded(raw, 1 << 20, bound) as file, \
            tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
        while info := archive.next():
            archive.members.clear()  # or all would stay in memory
            plain = info.isfile() and not info.issparse()  # a hole costs no bytes
            kind = "folder" if info.isdir() else "file" if plain else "other"
            yield info.name, info.size, kind, archive.extractfile(info) if plain else None
        # tarfile takes a damaged header for the end, which is two blocks of zeros or more
        if file.latest != bytes(512) or file.read(1 << 20).strip(b"\0"):
            raise ValueError("it ends too early")


def unpack(source: Path, folder: Path) -> None:
    """Unpack a zip or tar; ColorizeError at the first sign that it is hostile or broken."""
    count, total, free = 0, 0, shutil.disk_usage(folder).free
    most = MAX_RATIO * max(source.stat().st_size, 1 << 20)
    bound = min(most, free)
    try:
        for name, size, kind, member in members(source, most):
            count, total, reason = count + 1, total + size, ""
            leads_out = name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)
            if kind == "other" or leads_out:
                reason = "is a link or a device or leads out of the folder"
            elif not 0 <= size <= MAX_MEMBER or count > MAX_MEMBERS or total > bound:
                reason = (f"is number {count}, at {total >> 20} MB: more than photographs "
                          "unpack to, or than is free")
            if reason:
                raise ColorizeError(f"--source {source}: '{name[:100]}' {reason}; nothing "
                                    "was taken; unpack it yourself if you trust it")
            if kind == "file" and size:  # nothing is no photograph
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "wb") as file:
                    shutil.copyfileobj(member, file, 1 << 20)
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error,
            lzma.LZMAError, tarfile.TarError) as error:  # RuntimeError: encrypted
        reason = getattr(error, "strerror", "") or error
        raise ColorizeError(f"--source {source}: no zip or tar, or it is damaged or "
                            f"encrypted ({reason}); nothing was taken; get it again, or "
                            "unpack it yourself and name the folder") from None


def clear_imports(data: Path) -> None:
    """Remove the folders that killed imports left; their process number is in the name."""
    for path in data.glob(".import-*") if os.name == "posix" else ():
        with contextlib.suppress(OSError, ValueError):  # somebody else's
            try:
                number = int(path.name.split("-")[1])
                # our own number is no other's: in a container numbers come again
                if number != os.getpid():
                    os.kill(number, 0)  # signal 0 asks: does it run?
                    continue
            except ProcessLookupError:
                pass
            shutil.rmtree(path, ignore_errors=True)


def import_photos(source: Path, data: Path, val_fraction: float) -> None:
    """Take the photographs of a zip, tar or folder into DATA/train and val, classes kept.

    A set that comes with train and val (or test) folders stays split so; else the split is
    by a hash of each content.
    """
    if not (source.is_file() or source.is_dir()):  # a pipe would never end
        raise ColorizeError(f"--source {source}: no such file or folder; check the path")
    inside, target = source.resolve(), data.resolve()
    if source.is_dir() and target in (inside, *inside.parents):
        raise ColorizeError(f"--source {source}: lies in --data {data}, which would be "
                            "copied into itself; name another folder with --data")
    clear_imports(data)
    try:
        data.mkdir(parents=True, exist_ok=True)
        unpacked = tempfile.TemporaryDirectory(dir=data, prefix=f".import-{os.getpid()}-")
    except OSError as error:
        raise ColorizeError(f"--data {data}: cannot be written ({error.strerror}); name "
                            "another folder") from None
    with unpacked:
        folder = source if source.is_dir() else Path(unpacked.name)
        if folder != source:
            say(f"unpacking {source}")
            unpack(source, folder)
        paths = find_photos(folder)
        if inside in target.parents:  # DATA lies in it
            paths = [path for path in paths if target not in path.resolve().parents]
        # splits and classes begin below the deepest folder that holds all
        top = Path(os.path.commonpath([path.parent for path in paths])) if paths else folder
        for parent in (top, *top.parents):  # a set of which only train or val is there
            if parent.name.lower() in SPLITS and folder in (parent, *parent.parents):
                top = parent.parent
        counts = Counter(import_photo(path, path.relative_to(top), data, val_fraction)
                         for path in progress(paths, len(paths), f"import {source.name}"))
    taken = ", ".join(f"{n} {what}" for what, n in counts.items()) or "no photograph"
    say(f"imported {source}: {taken}")


def import_photo(path: Path, name: Path, data: Path, val_fraction: float) -> str:
    """Copy a photograph to DATA/train/NAME or DATA/val/NAME; returns what became of it.

    Where another photograph has that name, in either split, its hash goes into the name.
    """
    try:
        digest = content_hash(path)
    except OSError:  # gone since it was listed, or not ours to read
        return "unreadable"
    split = "val" if in_validation(digest, val_fraction) else "train"
    if len(name.parts) > 1 and name.parts[0].lower() in SPLITS:
        split, name = SPLITS[name.parts[0].lower()], Path(*name.parts[1:])
    for stem in (name.stem, f"{name.stem[:200]}-{digest[:8]}", digest):
        name = name.with_stem(stem)
        others = [data / other / name for other in ("train", "val")]
        others = [other for other in others if other.exists()]
        if not others:
            write_atomically(data / split / name, partial(shutil.copyfile, path))
            return split
        # a camera gives one name, and BMP one size, to many photographs
        if any(content_hash(other) == digest for other in others if other.is_file()):
            break
    return "already there"


def in_validation(digest: str, fraction: float) -> bool:
    """Whether a photograph is for validation: by its SHA-256, whatever others."""
    return int(digest[:8], 16) < fraction * 16 ** 8


# ------------------------------------------------------------------------------ the arrays

def prepare(data: Path, val_fraction: float | None = None,
            workers: int | None = None) -> dict:
    """Build DATA/processed from DATA/train and DATA/val, or reuse it: {split: manifest}.

    val_fraction: of train where there is no val; else as the arrays have it, or a tenth.

    A manifest's "photographs" are [name, SHA-256, CRC-32 of the row, class or None], one
    for each row; "left_out" holds the reason for each other name; "fingerprint" is of names
    and contents: touching or copying the photographs changes nothing, one pixel does.
    """
    data, workers = Path(data), workers or os.cpu_count() or 1
    processed = data / "processed"
    if val_fraction is None:
        val_fraction = read_json(processed / "train.json").get("val_fraction", 0.1)
    digests = read_contents(data, workers)
    if not any(name.startswith("train/") for name in digests):
        raise ColorizeError(no_photographs(data))
    own_val = any(name.startswith("val/") for name in digests)
    # a fraction matters only where there is no val
    key = [ARRAY_FORMAT, SIDE, None if own_val else val_fraction, [*digests.items()]]
    header = {"val_fraction": val_fraction,
              "fingerprint": hashlib.sha256(json.dumps(key).encode()).hexdigest()}
    manifests = {split: read_manifest(processed / f"{split}.npy", header, workers)
                 for split in ("train", "val")}
    if not all(manifests.values()):
        manifests = build_arrays(data, digests, header, workers, own_val)
    if not manifests["train"]["photographs"]:  # also where the arrays were built before
        reasons = Counter(manifests["train"]["left_out"].values()).items()
        raise ColorizeError(f"no usable colour photograph below {data / 'train'}: "
                            + ", ".join(f"{count} {reason}" for reason, count in reasons))
    return manifests


def some(names: list) -> str:
    return ", ".join(map(str, names[:3])) + ", ..." * (len(names) > 3)


def no_photographs(data: Path) -> str:
    """What to say where DATA/train holds no photograph."""
    elsewhere = [path for path in find_photos(data) if path.parent != data / "processed"]
    if elsewhere:
        return (f"no photograph below {data / 'train'}, but {len(elsewhere)} elsewhere in "
                f"{data}: import them, python main.py data --source {data} --data "
                "data/mine, and name the new folder with --data")
    return (f"no photograph below {data / 'train'}; put some there, or name another folder "
            "that holds train/ (and val/) with --data")


def read_json(path: Path) -> dict:
    """What write_json wrote; {} where there is nothing, or anything else."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        # its own checksum: an odd value is found here, not where somebody trips over it
        if isinstance(content, dict) and content.pop("checksum", "") == of_json(content):
            return content
    return {}


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content | {"checksum": of_json(content)})
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def of_json(content: dict) -> int:
    return zlib.crc32(json.dumps(content).encode())


def read_contents(data: Path, workers: int) -> dict[str, str]:
    """{name: SHA-256} of the photographs of train and val; "" for what is unreadable.

    A hash in hashes.json holds as long as name, size and time do: the second start need not
    read 43,000 photographs (9 GB) again.
    """
    book, paths = data / "processed" / "hashes.json", []
    for folder in (data / "train", data / "val"):
        found, passed_over = survey(folder) if folder.is_dir() else ([], {})
        paths += found
        for reason, names in passed_over.items():
            say(f"{len(names)} passed over, {reason}: {some(names)}")
    known = read_json(book)

    def content_of(path):
        name = path.relative_to(data).as_posix()
        try:
            status = path.stat()
            key = f"{status.st_size} {status.st_mtime_ns} {name}"
            return name, key, known.get(key) or content_hash(path)
        except OSError:  # gone since it was listed, or not ours to read
            return name, "", ""
    found = ordered_map(content_of, paths, workers)
    found = list(progress(found, len(paths), "photographs"))
    now_known = {key: digest for _, key, digest in found}
    if now_known != known:
        write_json(book, now_known)
    digests = {name: digest for name, _, digest in found}
    train = {digest: name for name, digest in digests.items() if name.startswith("train/")}
    for name, digest in digests.items():
        if digest in train and digest and name.startswith("val/"):
            raise ColorizeError(f"{data / train[digest]} and {data / name} are the same "
                                "photograph, in train and in val; delete one, or scores "
                                "will flatter")
    return digests


def read_manifest(array: Path, header: dict, workers: int) -> dict:
    """A split's manifest if its array is of these photographs and whole, else {}."""
    manifest = read_json(array.with_suffix(".json"))
    same = manifest.get("fingerprint") == header["fingerprint"]
    with contextlib.suppress(OSError, ValueError, BufferError):
        if same:
            # reading all of it takes seconds, and training then finds it in memory
            stored = np.load(array, mmap_mode="r")
            sums = [*ordered_map(zlib.crc32, stored, workers)]
            expected = [checksum for _, _, checksum, _ in manifest["photographs"]]
            if stored.dtype == np.uint8 and sums == expected:
                return manifest
    if array.exists():
        reason = "it is damaged" if same else "the photographs have changed"
        say(f"{array}: {reason}; building the arrays again")
    return {}


def build_arrays(data: Path, digests: dict, header: dict, workers: int,
                 own_val: bool) -> dict:
    """Write both arrays; part of train is set aside where there is no val: manifests."""
    def build(aside):
        sides = {"train": {}, "val": {}}
        for name, digest in digests.items():
            in_val = name.startswith("val/") or digest in aside
            sides["val" if in_val else "train"][data / name] = name, digest
        return {split: build_array(data / "processed" / f"{split}.npy", files, header,
                                   workers) for split, files in sides.items()}
    if own_val:
        return build(set())
    aside = set_aside(digests.values(), header["val_fraction"])
    manifests = build(aside)
    usable = {photograph[1] for manifest in manifests.values()
              for photograph in manifest["photographs"]}
    chosen = set_aside(usable, header["val_fraction"])
    if chosen != aside & usable:  # few photographs: those aside were left out
        manifests = build(chosen)
    say(f"no photographs in {data / 'val'}: {len(manifests['val']['photographs'])} of "
        f"{data / 'train'} are set aside for validation, by a hash of their content")
    return manifests


def set_aside(digests, fraction: float) -> set[str]:
    """Which contents are for validation: a share of all, one at least, never all."""
    digests = sorted(set(filter(None, digests)))  # a share of them are the smallest
    count = sum(in_validation(digest, fraction) for digest in digests)
    return set(digests[:max(min(max(count, 1), len(digests) - 1), 0)])


def encode_lab(lab: np.ndarray) -> np.ndarray:
    """Lab (..., 3) to the stored uint8: round(L*255/100), round(a)+128, round(b)+128."""
    stored = lab * np.array([2.55, 1, 1], np.float32) + np.array([0, 128, 128], np.float32)
    return np.clip(np.rint(stored), 0, 255).astype(np.uint8)


def decode_lab(stored):
    """Stored Lab, array (..., 3) or tensor (N, 3, H, W), to float32 L 0..100 and ab."""
    if isinstance(stored, torch.Tensor):
        return torch.cat([stored[:, :1] / 2.55, stored[:, 1:].float() - 128], dim=1)
    lab = stored - np.array([0, 128, 128], np.float32)
    return lab / np.array([2.55, 1, 1], np.float32)


def lab_square(path: Path) -> tuple[np.ndarray | None, str]:
    """A photograph as stored Lab (SIDE, SIDE, 3), or None and why it is left out."""
    try:
        # a JPEG may come at half of its size or less; 2 * SIDE still hide the steps
        image = read_photo(path, at_least=2 * SIDE).image
    except ColorizeError:
        return None, "unreadable"
    if min(image.size) < MIN_SIDE:
        return None, f"under {MIN_SIDE} pixels"
    if image.mode != "RGB":
        return None, "without colour"
    square = ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.LANCZOS)
    lab = rgb_to_lab(np.asarray(square))
    if np.hypot(lab[..., 1], lab[..., 2]).mean() < MIN_CHROMA:  # gray, stored as colour
        return None, "without colour"
    return encode_lab(lab), ""


def build_array(array: Path, files: dict, header: dict, workers: int) -> dict:
    """Write a split's array, then its manifest, which begins with `header`; returns that.

    files: {path: (name, hash)}. Rows are streamed: memory does not grow.
    """
    photographs, left_out, manifest_path = [], {}, array.with_suffix(".json")

    def write(temporary):
        manifest_path.unlink(missing_ok=True)  # the old one no longer holds
        with open(temporary, "wb") as file:
            file.seek(128)  # the header comes when the number of rows is known
            squares = ordered_map(lab_square, files, workers)
            squares = progress(squares, len(files), f"{array.stem} arrays")
            for (name, digest), (lab, reason) in zip(files.values(), squares):
                if lab is None:
                    left_out[name] = reason
                    continue
                file.write(lab.tobytes())
                # train/rose/1.png is of class rose, train/1.png of none
                label = name.split("/")[1] if name.count("/") > 1 else None
                photographs.append([name, digest, zlib.crc32(lab.tobytes()), label])
            file.seek(0)
            shape = (len(photographs), SIDE, SIDE, 3)
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    write_atomically(array, write)
    manifest = header | {"photographs": photographs, "left_out": left_out}
    for line in left_out_reasons(manifest):
        say(f"{array.stem}: {line}")
    write_json(manifest_path, manifest)  # last: a killed build never looks finished
    return manifest


def left_out_reasons(manifest: dict) -> list[str]:
    """A line for each reason why photographs were left out, with the names of some."""
    by_reason = {}
    for name, reason in manifest["left_out"].items():
        by_reason.setdefault(reason, []).append(name)
    return [f"{len(names)} left out, {reason}: {some(names)}"
            for reason, names in by_reason.items()]


def class_names(manifest: dict) -> list[str]:
    """The scene classes of the photographs used, sorted; none where there is but one."""
    names = sorted({label for *_, label in manifest["photographs"] if label})
    return names if len(names) > 1 else []


# --------------------------------------------------------------------------------- batches

class ColorizeData(torch.utils.data.Dataset):
    """Batches of stored Lab, gathered from memory-mapped arrays, one after the other.

    Sample n is number n of an endless stream: epoch n // len, position n % len, shuffled
    and augmented (flip, crop, film) where `train`, each draw a function of (seed, n) alone.
    Yields stored Lab (N, 3, size, size) and class numbers (N,), -1 for none.
    """

    def __init__(self, arrays: list[Path], labels=None, size: int = SIDE,
                 train: bool = False, crop: bool = True, film: bool = False, seed: int = 0,
                 limit: int | None = None):
        self.paths, self.size, self.train = [str(path) for path in arrays], size, train
        self.crop, self.film, self.seed = crop, film, seed
        lengths = [len(np.load(path, mmap_mode="r")) for path in self.paths]
        self.starts = np.cumsum([0] + lengths)
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
            random = np.random.default_rng([self.seed, epoch])
            self._order = epoch, random.permutation(len(self))
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
        """A random flip, a random resized crop of MIN_CROP or more, on half of them film.

        lab is stored Lab (3, SIDE, SIDE); returns (3, size, size).
        """
        area, ratio, x, y, flip = random.uniform(size=5)
        side, stretch = SIDE, 1.0
        if self.crop:
            side = SIDE * np.sqrt(MIN_CROP + (1 - MIN_CROP) * area)
            # on a log scale, half of the way to 3:4 or 4:3, where ImageNet's crop goes
            stretch = np.exp((ratio - 0.5) * np.log(4 / 3))
        height, width = (min(SIDE, int(round(s))) for s in (side / stretch, side * stretch))
        top, left = int(y * (SIDE - height + 1)), int(x * (SIDE - width + 1))
        lab = transforms.resized_crop(lab, top, left, height, width, [self.size, self.size],
                                      antialias=True)
        if flip < 0.5:
            lab = lab.flip(-1)
        if self.film and random.uniform() < 0.5:  # the others stay as good as new
            return old_photograph(lab, random)
        return lab

    def __getitems__(self, numbers) -> tuple[torch.Tensor, torch.Tensor]:
        labs, labels = zip(*(self[n] for n in numbers))
        return torch.stack(labs), torch.tensor(labels)


# ------------------------------------------------------------------------ old photographs

def old_photograph(lab: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Replace L of stored Lab (3, H, W) by what an old photograph shows of it; ab stays.

    A network that has seen clean lightness alone takes grain and faded blacks for things.
    """
    # early films are blind to red, later ones stood behind filters: any mixture of light
    mixture = random.dirichlet([2.0, 2.0, 2.0]).astype(np.float32)
    L, ab = np.split(decode_lab(lab.permute(1, 2, 0).numpy()), [1], axis=-1)
    light = np.clip(lab_to_linear(L[..., 0], ab) @ mixture, 0, 1)
    # CIE L*, 0..1: for white light, whatever the mixture, L is what it was
    L = np.where(light > 0.008856, 1.16 * np.cbrt(light) - np.float32(0.16), 9.033 * light)
    curve, blur, vignette, faded = random.uniform(size=4) < [0.7, 0.4, 0.3, 0.6]
    if curve:  # hard and soft papers, over- and underexposed, as often darker as lighter
        L = np.clip(L, 0, 1) ** np.float32(np.exp(random.uniform(np.log(0.6), np.log(1.6))))
    if blur:  # a radius in pixels of the sample: of a scan of 2,000 pixels 5 to 20
        blurred = ImageFilter.GaussianBlur(random.uniform(0.3, 1.2))
        L = np.asarray(Image.fromarray(to_stored(L)).filter(blurred), np.float32) / 255
    if vignette:  # light falls off with the square of the distance: corners lose 10 to 40 %
        y, x = (np.linspace(-1, 1, side, dtype=np.float32) ** 2 for side in L.shape)
        L = L * (1 - np.float32(random.uniform(0.05, 0.2)) * (y[:, None] + x))
    if faded:  # blacks are lifted, whites lowered
        low, high = random.uniform(0, 0.2), random.uniform(0.8, 1)
        L = low + (high - low) * L
    # grain of the film and noise of the scan: up to 3 of L
    L = L + random.uniform(0, 0.03) * random.standard_normal(L.shape, np.float32)
    return torch.cat([torch.from_numpy(to_stored(L))[None], lab[1:]])


def to_stored(L: np.ndarray) -> np.ndarray:
    """L in 0..1 as it is stored, uint8."""
    return np.clip(np.rint(L * 255), 0, 255).astype(np.uint8)


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


# ----------------------------------------------------------------------------- the command

def data(*, data: Path = Path("data/input"), source: Path | None = None,
         val_fraction: float = 0.1, workers: int | None = None) -> None:
    """Import photographs, build the arrays that train reads, and say what is in them.

    data: folder that holds train/ and val/; the arrays are written to its processed/
    source: a zip, a tar or a folder to import first
    val_fraction: share for validation, chosen by a hash of the content (0.001..0.999)
    workers: threads that read photographs; else one for each core (1..1024)
    """
    if source is not None:
        import_photos(Path(source), Path(data), val_fraction)
    manifests = prepare(data, val_fraction, workers)
    processed = Path(data, "processed")
    for split, manifest in manifests.items():
        say(f"{split}: {len(manifest['photographs'])} photographs used", result=True)
        for line in left_out_reasons(manifest):
            say(f"  {line}", result=True)
    counts = Counter(label for *_, label in manifests["train"]["photographs"])
    names = class_names(manifests["train"])
    classes = ", ".join(f"{name} {counts[name]}" for name in names)
    say(f"classes: {classes or 'none (no class folders)'}", result=True)
    dataset = ColorizeData([processed / "train.npy"], train=True)
    histogram, _ = count_colors(dataset)
    # a set whose mean is far from gray, or whose spread is under 10, teaches few colours
    for name, marginal in (("a", histogram.sum(1)), ("b", histogram.sum(0))):
        share, axis = marginal / marginal.sum(), np.arange(-128, 128)
        mean = share @ axis
        spread = np.sqrt(share @ (axis - mean) ** 2)
        say(f"{name}*: mean {mean:.1f}, spread {spread:.1f}", result=True)
    tiles = []  # eight samples in two columns
    stored, _ = dataset.__getitems__(range(min(8, len(dataset))))
    for lab in decode_lab(stored.permute(0, 2, 3, 1).numpy()):
        L, ab = lab[..., 0], lab[..., 1:]
        level = np.full_like(L, 60)  # most hues have their most vivid sRGB colour near L 60
        tiles += [lab_to_image(L, 0 * ab), lab_to_image(level, ab), lab_to_image(L, ab)]
    captions = ["L", "ab at L 60", "colour"] * (len(tiles) // 3)
    sheet = picture_sheet(tiles, 6, captions, 192)
    write_atomically(processed / "preview.png", lambda name: sheet.save(name, "PNG"))
    say(f"{processed / 'preview.png'}: samples as the network sees them (L, ab at L 60, "
        "colour)", result=True)
