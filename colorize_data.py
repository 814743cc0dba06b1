"""A folder of photographs -> arrays of Lab -> batches; the data command.

    python main.py data --source photos.zip        # import, build the arrays, report

DATA/train and DATA/val hold photographs, in class folders or not; DATA/processed what is
made of them: train.npy and val.npy, a manifest (.json) of each, hashes.json, preview.png.
"""

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as transforms

from importing import import_photos, in_validation
from photo import (MIN_CHROMA, ColorizeError, content_hash, find_photos, lab_to_image,
                   lab_to_linear, ordered_map, picture_sheet, progress, read_photo,
                   rgb_to_lab, say, survey, write_atomically)

ARRAY_FORMAT = 2    # of DATA/processed; a change rebuilds the arrays
SIDE = 256          # stored photographs are SIDE x SIDE: 43,000 of them are 8.5 GB
MIN_SIDE = 64       # smaller photographs, enlarged over four times, teach blur
BLOCK = 4 << 20     # bytes under one checksum: 2,000 numbers for 8 GB
# The smallest crop's share of the area is our own choice: what colour a thing has its
# surroundings tell, and ImageNet's usual 8 % shows none; crops over half differ too little.
MIN_CROP = 0.35


# ------------------------------------------------------------------------------ the arrays

def prepare(data: Path, val_fraction: float | None = None,
            workers: int | None = None) -> dict:
    """Build DATA/processed from DATA/train and DATA/val, or reuse it: {split: manifest}.

    val_fraction: of train where there is no val; else as the arrays have it, or a tenth.

    A manifest's "photographs" are [name, bytes, SHA-256, class or None], one for each row;
    "left_out" holds the reason for each other name; "fingerprint" is of names and contents:
    touching or copying the photographs changes nothing, one pixel does.
    """
    data, workers = Path(data), workers or os.cpu_count() or 1
    processed = data / "processed"
    if val_fraction is None:
        val_fraction = read_json(processed / "train.json").get("val_fraction", 0.1)
    paths = {split: list_photos(data / split) for split in ("train", "val")}
    if not paths["train"]:
        raise ColorizeError(no_photographs(data))
    contents = read_contents(data, paths["train"] + paths["val"], workers)
    check_overlap(data, contents)
    # a fraction matters only where there is no val
    key = [ARRAY_FORMAT, SIDE, None if paths["val"] else val_fraction,
           [[name, digest] for name, (*_, digest) in contents.items()]]
    header = {"format": ARRAY_FORMAT, "val_fraction": val_fraction,
              "fingerprint": hashlib.sha256(json.dumps(key).encode()).hexdigest()}
    manifests = {split: read_manifest(processed / f"{split}.npy", header, workers)
                 for split in paths}
    if not all(manifests.values()):
        manifests = build_arrays(data, contents, header, workers)
    if not manifests["train"]["photographs"]:  # also where the arrays were built before
        reasons = Counter(manifests["train"]["left_out"].values()).items()
        raise ColorizeError(f"no usable colour photograph below {data / 'train'}: "
                            + ", ".join(f"{count} {reason}" for reason, count in reasons))
    return manifests


def list_photos(folder: Path) -> list[Path]:
    """Every photograph below a folder; what was passed over is said."""
    found, passed_over = survey(folder) if folder.is_dir() else ([], {})
    for reason, paths in passed_over.items():
        say(f"{len(paths)} passed over, {reason}: {some(paths)}")
    return found


def some(names: list) -> str:
    return ", ".join(map(str, names[:3])) + ", ..." * (len(names) > 3)


def no_photographs(data: Path) -> str:
    """What to say where DATA/train holds no photograph."""
    if not data.is_dir():
        return f"--data {data}: no such folder; name one that holds train/ (and val/)"
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
    """Write a dict of plain values, and a checksum of them."""
    text = json.dumps(content | {"checksum": of_json(content)})
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def of_json(content: dict) -> int:
    return zlib.crc32(json.dumps(content).encode())


def read_contents(data: Path, paths: list[Path], workers: int) -> dict:
    """{name: [bytes, time, SHA-256]} of photographs; the last is "" for what is unreadable.

    A hash in hashes.json holds as long as name, size and time do: the second start need not
    read 43,000 photographs (9 GB) again.
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
    train = {digest: name for name, (*_, digest) in contents.items()
             if digest and name.startswith("train/")}
    for name, (*_, digest) in contents.items():
        if digest in train and name.startswith("val/"):
            raise ColorizeError(f"{data / train[digest]} and {data / name} are the same "
                                "photograph, in train and in val; delete one, or scores "
                                "will flatter")


def read_manifest(array: Path, header: dict, workers: int) -> dict:
    """A split's manifest if its array is of these photographs and whole, else {}."""
    manifest = read_json(array.with_suffix(".json"))
    same = manifest.get("fingerprint") == header["fingerprint"]
    with contextlib.suppress(OSError):
        if same and checksums(array, workers) == manifest["checksums"]:
            return manifest
    if array.exists():
        reason = "it is damaged" if same else "the photographs have changed"
        say(f"{array}: {reason}; building the arrays again")
    return {}


def checksums(path: Path, workers: int) -> list[int]:
    """CRC-32 of each block of a file, header and all: 3 GB/s a core.

    So it costs what reading costs, 8 GB in about 5 s from memory; and where they come from
    a disk the time is not lost: training finds them in memory.
    """
    def checksum(start):
        with open(path, "rb") as file:
            file.seek(start)
            return zlib.crc32(file.read(BLOCK))
    return [*ordered_map(checksum, range(0, path.stat().st_size, BLOCK), workers)]


def build_arrays(data: Path, contents: dict, header: dict, workers: int) -> dict:
    """Write both arrays; part of train is set aside where there is no val: manifests."""
    processed = data / "processed"
    need, free = len(contents) * SIDE * SIDE * 3, shutil.disk_usage(data).free
    if need > free:
        raise ColorizeError(f"{processed}: the arrays need {need / 1e9:.1f} GB and "
                            f"{free / 1e9:.1f} GB are free; make room, or put --data "
                            "elsewhere")

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
    if chosen != aside.intersection(usable):  # few photographs: those aside were left out
        manifests = build(chosen)
    say(f"no photographs in {data / 'val'}: {len(manifests['val']['photographs'])} of "
        f"{data / 'train'} are set aside for validation, by a hash of their content")
    return manifests


def set_aside(digests: list[str], fraction: float) -> set[str]:
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

    files: {path: [name, bytes, time, hash]}. Rows are streamed: memory does not grow.
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
                # train/rose/1.png is of class rose, train/1.png of none
                label = name.split("/")[1] if name.count("/") > 1 else None
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
    L = aged(film_lightness(lab, random), random)
    # grain of the film and noise of the scan: up to 3 of L
    amount = np.float32(random.uniform(0, 0.03))
    L = L + amount * random.standard_normal(L.shape, np.float32)
    return torch.cat([torch.from_numpy(to_stored(L))[None], lab[1:]])


def film_lightness(lab: torch.Tensor, random: np.random.Generator) -> np.ndarray:
    """L (H, W), 0..1, that a random lens, film and paper make of stored Lab (3, H, W)."""
    # early films are blind to red, later ones stood behind filters: any mixture of light
    mixture = random.dirichlet([2.0, 2.0, 2.0]).astype(np.float32)
    lab = decode_lab(lab.permute(1, 2, 0).numpy())
    light = np.clip(lab_to_linear(lab[..., 0], lab[..., 1:]) @ mixture, 0, 1)
    # CIE L*: for white light, whatever the mixture, L is what it was
    L = np.where(light > 0.008856, 1.16 * np.cbrt(light) - np.float32(0.16), 9.033 * light)
    curve, blur, vignette = random.uniform(size=3) < [0.7, 0.4, 0.3]
    if curve:  # hard and soft papers, over- and underexposed, as often darker as lighter
        L = np.clip(L, 0, 1) ** np.float32(np.exp(random.uniform(np.log(0.6), np.log(1.6))))
    if blur:  # a radius in pixels of the sample: of a scan of 2,000 pixels 5 to 20
        blurred = ImageFilter.GaussianBlur(random.uniform(0.3, 1.2))
        L = np.asarray(Image.fromarray(to_stored(L)).filter(blurred), np.float32) / 255
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
    """L (H, W), 0..1, under one to four lines a pixel wide, of any gray."""
    drawn = Image.fromarray(to_stored(L))
    for _ in range(random.integers(1, 5)):
        x, y, x_end, y_end = random.uniform(0, drawn.size * 2)
        x_end = x + (x_end - x) * random.uniform()  # rather upright: along the film's way
        ImageDraw.Draw(drawn).line((x, y, x_end, y_end), int(random.integers(256)), 1)
    return np.asarray(drawn, np.float32) / 255


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
    print_colors(histogram)
    write_preview(processed / "preview.png", dataset, histogram)
    say(f"{processed / 'preview.png'}: samples as the network sees them (L, ab at L 60, "
        "colour) and the histogram of ab", result=True)


def print_colors(histogram: np.ndarray) -> None:
    """Mean and spread of a and b, from their counts (256, 256).

    A set whose mean is far from gray, or whose spread is under 10, teaches few colours.
    """
    axis, total = np.arange(-128, 128), histogram.sum()
    for name, marginal in (("a", histogram.sum(1)), ("b", histogram.sum(0))):
        mean = (marginal * axis).sum() / total
        spread = np.sqrt((marginal * (axis - mean) ** 2).sum() / total)
        say(f"{name}*: mean {mean:.1f}, spread {spread:.1f}", result=True)


def ab_histogram(counts: np.ndarray) -> Image.Image:
    """Counts (256, 256) of stored a and b as a picture: a right, b up."""
    # grays are a thousand times as many as any vivid colour: a logarithm shows both
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
