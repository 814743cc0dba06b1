"""Hostile and odd inputs, each through main() in a process of its own; 60 s, 3 GB at most.

    python tests/attacks.py [SEED]                # all, about 10 minutes on two cores
    python tests/attacks.py SEED KIND NUMBER      # one again; its files are kept

Done: exit 0, and the result passes a check that is not the program's own (L is taken by
scikit-image). Refused: exit 1 or 2, one printable line `error: ...`, nothing made. All
else is a finding, and ends in exit 1. Offline; the same inputs for a seed.
"""

import contextlib
import gzip
import io
import json
import math
import multiprocessing
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork has one thread

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402

from conftest import lab, made_photo, make_checkpoint  # noqa: E402
import inference  # noqa: E402
import main  # noqa: E402

torch.set_num_threads(1)
SECONDS, GIGABYTES = 60, 3
SHARED = Path(tempfile.mkdtemp(prefix="attacks-"))  # checkpoints, arrays, a folder a case
BINS, LAST = str(SHARED / "bins.tar"), SHARED / "run/last.tar"
TRAIN = ("train --data out/data --out out/run --stages 2 --loss bins --size 64 "
         "--batch_size 4 --device cpu --amp off").split()
FORMS = {"JPEG": "L RGB CMYK", "PNG": "1 L LA P RGB RGBA I;16", "WEBP": "RGB RGBA",
         "TIFF": "1 L LA P RGB RGBA CMYK I;16", "AVIF": "RGB RGBA", "GIF": "L P",
         "BMP": "1 L P RGB", "PPM": "1 L RGB I;16", "JPEG2000": "L LA RGB RGBA I;16",
         "TGA": "1 L LA P RGB RGBA"}
# given to flags, texts, names; no NUL, which no command line can hold
ODD = ["", " ", "-1", "0", "2", "1e3", "1e999", "nan", "-inf", "0x10", "1.5", "\u0661", "~",
       "9" * 5000, "2147483648", "true", "a" * 300, "\x1b[2J", "a\nb", "\r", "\u202e", "-",
       "%s{}", "\udcff", "\U0001f4a5", ",", ";", ".", "*", "/dev/null", "1,2,3", "--",
       "nan,1", "-10,20", "#c8a070", "rgb(300,0,0)", "hsl(9,9%)", "--imge", "\u2014image",
       "5,5,#c84020; 50,9,blue", "99,9,red", "-1,5,red", "5,5,", "in/x.png", "in/h.png"]
NAMES = ["a.png", "a.jpg", "a.jpg.png", "a_color.png", "\x1b[2J.png", "a\nb.png", "-x.png",
         "\udcff.png", "b/a.png", "b/c/a.PNG", "x" * 240 + ".png", "A.png", "a.tif",
         " .png", "caf\u00e9.png", "cafe\u0301.png", "a_color_color.png", "a.tiff", "%.png"]


def pick(random, choices):
    return choices[int(random.integers(len(choices)))]


def put(name: str, content: bytes) -> str:
    path = Path("in", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def damaged(random, content: bytes) -> bytes:
    """Bytes changed, cut off, zeroed, inserted, replaced by a large number, or doubled."""
    at = int(len(content) * random.random() ** 2)  # headers more often than pixels
    size = int(random.integers(1, 200))
    large = struct.pack(pick(random, ["<I", ">I"]), pick(random, [1, 0x7fff, 0xffffffff]))
    cut, instead = pick(random, [
        (1, random.bytes(1)), (4, random.bytes(4)), (len(content), b""), (4, large),
        (size, bytes(size)), (0, random.bytes(size)), (0, content[at // 2:at])])
    return content[:at] + instead + content[at + cut:]


# Each kind of attack writes files into in/ (which the run must not change) and out/. It
# returns a command line, a check (exit status -> what is wrong with the result, or "") and,
# where it is known, the only right exit status.

def photograph(random) -> tuple[str, bytes]:
    """One of any format, mode, orientation and metadata: its name and bytes."""
    kind = pick(random, list(FORMS))
    mode, options = pick(random, FORMS[kind].split()), {}
    image = made_photo(*map(int, random.integers(1, 130, 3)))
    image = image.convert(mode) if mode != "I;16" else Image.fromarray(
        np.asarray(image.convert("L")) * np.uint16(257))
    if kind == "TIFF":
        options["compression"] = pick(random, ["raw", "tiff_lzw", "tiff_adobe_deflate"])
    if kind in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF"):
        options["exif"] = Image.Exif()
        options["exif"][274] = int(random.integers(1, 9))  # the orientation
        options["exif"][270] = pick(random, ["\x1b[2J\n", ("\u00e9" * 99).encode(), '{"a": 1}'])
        options["icc_profile"] = pick(random, [None, b"junk" * 40])
    ending = next(e for e, k in Image.registered_extensions().items() if k == kind)
    return f"x{ending}", saved(image, kind, **options)


def truth(content: bytes) -> tuple[tuple | None, np.ndarray | None]:
    """Size and L (H, W) as Pillow, from memory, and scikit-image see them, if sure."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as image:
        if image.width * image.height < 1e6:
            profile = image.info.get("icc_profile", b"junk")
            image = ImageOps.exif_transpose(image)
            if not profile.startswith(b"junk") or image.mode in ("F", "I", "CMYK", "I;16B"):
                return image.size, None
            deep = np.asarray(image) if image.mode == "I;16" else image.convert("RGB")
            return image.size, lab(deep)[..., 0]
    return None, None  # it must be refused, too, or its metadata alone are damaged


def coloring(image, *more, content=b"", must=None, model=BINS) -> tuple:
    """Colour one photograph: one result, of the size and the L of its content."""
    size, L = truth(content)

    def check(status):
        made = [p for p in Path("out").rglob("*") if p.is_file()]
        if status or len(made) != 1:
            return f"{len(made)} results" if made or not status else ""
        with Image.open(made[0]) as result:
            result.load()
        caption = "\u00e9".encode() * 99  # of an undamaged one; Pillow loses those of AVIF
        lost = caption in content and caption not in made[0].read_bytes()
        if must == 0 and lost and content[4:8] != b"ftyp":
            return "the letters of its caption are others"
        if (size or result.size) != result.size or result.getexif().get(274, 1) != 1:
            return f"{result.size}, not {size}, or it is to be turned again"
        # rounding to 8 bits; JPEG is free to differ, but not to show something else
        most, mean = (40, 4) if result.format == "JPEG" else (1, 0.4)
        made_L = lab(result.convert("RGB"))[..., 0]
        off = np.abs(made_L - (made_L if L is None else L))
        bad = off.max() > most or off.mean() > mean
        return f"L is off by {off.mean():.2f}, at most {off.max():.2f}" if bad else ""
    return ["inference", "--image", image, "--output", "out", "--size", "48", "--model",
            model, *more], check, must


def photographs(random, n):
    """Sound ones of all formats, and damaged ones."""
    name, content = photograph(random)
    must = 0 if n % 5 < 2 else None
    content = content if n % 5 < 2 else damaged(random, content)
    more = pick(random, [[], ["--format", "tif"], ["--format", "jpg"], ["--format", "webp"],
                         ["--mood", "warm"], ["--saturation", "2"]])
    return coloring(put(name, content), *more, content=content, must=must,
                    model=pick(random, [BINS, str(SHARED / "ab.tar")]))


def tiff(sides: list[int], loop: int) -> bytes:
    """A gray TIFF of square pages, deflated; after the last comes number `loop` again."""
    content, starts = b"II*\0", [0]
    packed = {side: zlib.compress(bytes(min(side, 9999) ** 2)) for side in set(sides)}
    for side in sides:
        place = len(content) + 4
        tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 273: place, 278: side,
                279: len(packed[side])}
        starts.append(place + len(packed[side]))
        content += struct.pack("<I", starts[-1]) + packed[side] + struct.pack("<H", 8)
        content += b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in tags.items())
    return content + struct.pack("<I", starts[loop])


def bombs(random, n):
    """Small photographs that claim or hold very much."""
    pages = [([8, 9999, 9999, 9999, 9999], 0), ([8] + [9000] * 300, 0), ([8] * 3000, 0),
             ([8] * 5, 1), ([8] * 5, 5), ([50] * 9, 0), ([50, 0], 0), ([65535], 0)]
    sides = [(65500, 65500), (1, 65500), (10 ** 8, 2), (2 ** 31 - 1, 1), (0, 5), (65500, 9)]
    if n < 8:
        return coloring(put("x.tif", tiff(*pages[n])))
    if n < 14:
        content = saved(Image.new("L", (65500, 9)))
        header = content[12:16] + struct.pack(">II", *sides[n - 8]) + content[24:29]
        header += struct.pack(">I", zlib.crc32(header))
        return coloring(put("x.png", content[:12] + header + content[33:]))
    name, content = photograph(random)
    return coloring(put(name, content * 5000))


def folders(random, n):
    """Photographs of odd names beside links, pipes and files that are none."""
    wanted = {}
    for name in random.permutation(NAMES)[:8]:
        noise = Image.fromarray(random.integers(256, size=(8, 12), dtype=np.uint8))
        content = saved(noise.resize((60, 40), Image.Resampling.BICUBIC))
        wanted[put(name, content)] = truth(content)[1]
    put("bad.png", b"bad")
    os.mkfifo("in/p.png")
    os.symlink("/", "in/root")
    os.symlink(".", "in/circle.png")

    def check(status):  # each photograph has its result, whatever the others do
        made = [lab(Image.open(p))[..., 0] for p in Path("out").rglob("*") if p.is_file()]
        return ", ".join(name for name, L in wanted.items()
                         if not any(np.abs(other - L).max() < 1 for other in made))
    more = pick(random, [[], ["--format", "tif"], ["--suffix", "x"]])
    return coloring("in", *more)[0], check, 1  # for bad.png


def mutated(random, contents):
    """Contents in which a value at any depth is another one, its key perhaps, too."""
    node, key = {0: contents}, 0
    while isinstance(node[key], (dict, list)) and node[key] and random.random() < 0.8:
        node = node[key]
        key = pick(random, list(node) if isinstance(node, dict) else range(len(node)))
    t = node[key].float() if isinstance(node[key], torch.Tensor) else torch.ones(3)
    node[key] = pick(random, [
        None, "x", "a" * 10 ** 6, "\x1b[2J\n", -1, 0, 1.5, 10 ** 30, 1e308, math.nan, [],
        {}, {1: 2}, True, {1, 2}, [[[[[[[[[1]]]]]]]]], t * math.nan, t + 1e38, t * 1e6, -t,
        t * 0, t.flatten()[:1], t.double(), t.long(), t.bool(), t[None], torch.empty(0),
        t.expand(9, *t.shape), t.to(torch.complex64), t.to("meta"),
        torch.nested.nested_tensor([t.flatten()[:3]])])
    if random.random() < 0.2 and isinstance(node, dict):
        node[f"{key}\x1b"] = node.pop(key)
    return contents


def checkpoints(random, n):
    """Damaged and changed ones for --model, --init and --resume."""
    flag, must = ["--model", "--init", "--resume"][n % 3], None
    content, file = (LAST if n % 3 == 2 else Path(BINS)).read_bytes(), io.BytesIO()
    if random.random() < 0.4:
        content, must = damaged(random, content), 1
        with contextlib.suppress(Exception):  # some bytes are of nothing
            must = 1 if zipfile.ZipFile(io.BytesIO(content)).testzip() else None
    else:
        torch.save(mutated(random, torch.load(io.BytesIO(content))), file)
        content = file.getvalue()
    if flag == "--model":
        photo = saved(made_photo(n, 60, 50))
        return coloring(put("x.png", photo), model=put("x.tar", content), content=photo,
                        must=must)
    shutil.copytree(SHARED / "data", "out/data")
    # a training goes on in the folder of its file
    path = Path("out/run" if flag == "--resume" else "out", "last.tar")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)

    def check(status):  # of a resumed run the best epoch may have been one before
        best = [torch.load(p)["weights"] for p in Path("out/run").glob("best_model.tar")]
        good = all(w.isfinite().all() for weights in best for w in weights.values())
        made = best or status or flag == "--resume"
        return "" if good and made else "a best_model.tar that is not finite, or none"
    return [*TRAIN, "--epochs", str(n % 3), flag, str(path)], check, must


def arrays(random, n):
    """Damaged arrays and odd manifests must be made anew, the same as they were."""
    shutil.copytree(SHARED / "data", "out/data")
    path = pick(random, sorted(Path("out/data/processed").glob("*[yz]")))
    content = path.read_bytes()
    if path.suffix == ".gz" and n % 2:
        manifests = mutated(random, json.loads(gzip.decompress(content)))
        content = gzip.compress(json.dumps(manifests, default=str).encode())
    else:
        content = damaged(random, content)
    path.write_bytes(content)
    return ["data", "--data", "out/data"], lambda status: ", ".join(
        p.name for p in (SHARED / "data/processed").glob("*.npy")
        if p.read_bytes() != Path("out/data/processed", p.name).read_bytes()), 0


def imports(random, n):
    """Folders to import, with odd and equal names: all is taken, or there is no folder."""
    folder = pick(random, ["train/", "b/", "", "TEST/"])
    members = {f"{folder}{i}.png": saved(made_photo(i, 70, 70)) for i in range(5)}
    members[pick(random, NAMES)] = damaged(random, saved(made_photo(5, 70, 70)))
    for name, content in members.items():
        path = Path("in/set", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    source = pick(random, ["in/set", "in/set/", "in", "in/none", "in/set/0.png", "/dev/null"])

    def check(status):
        taken = {p.read_bytes() for split in ("train", "val")
                 for p in Path("out/data", split).rglob("*") if p.is_file()}
        # also where it ends in an error, as all are of a test set and none is for training
        odds = taken ^ ({*members.values()} if Path(source).is_dir() else set())
        return f"{len(odds)} missing or too many" if odds else ""
    return ["data", "--source", source, "--data", "out/data"], check, \
        None if Path(source).is_dir() else 1


PLACES = ["http://", "http:///x", "http://[::1", "http://127.0.0.1:99999/x", "http://a b/",
          "ftp://x/y", "file:///etc/passwd", "://", "http://\u00e4\x1b/x", "http://%/",
          "HTTP://127.0.0.1:1", "http://127.0.0.1:x", "http://" + "a" * 99, "http://\udcff"]


def addresses(random, n):
    """Odd addresses in place of photographs: none is fetched."""
    return coloring(PLACES[n], must=1)


def flags(random, n):
    """Values of any kind for some flags of any command; texts and pictures of hints."""
    put("x.png", saved(made_photo(n, 60, 50)))
    put("h.png", damaged(random, saved(made_photo(n + 1, 60, 50))))
    shutil.copytree(SHARED / "data", "out/data")
    colors = ["--image", "in/x.png", "--model", BINS, "--size", "48"]
    command, *words = pick(random, [
        ["data", "--data", "out/data"], [*TRAIN, "--init", "none", "--epochs", "1"],
        ["inference", *colors, "--output", "out"], ["evaluate", *colors, "--out", "out"]])
    values, known = dict(zip(words[::2], words[1::2])), main.read_command(command)[1]
    for name in random.permutation(list(known))[:int(random.integers(1, 4))]:
        value = str(pick(random, known[name].choices or ODD))
        if name in ("out", "output", "data"):  # written where it says
            value = pick(random, ["out/", "in/x.png/"]) + value
        if name != "epochs":  # a training may take as long as it is asked to
            values[f"--{name}"] = None if known[name].kind == "bool" else value
    words = [word for pair in values.items() for word in pair if word is not None]
    if random.random() < 0.2:
        words.insert(int(random.integers(len(words) + 1)), pick(random, ODD))
    return [command, *words], lambda status: "", None


def prepare() -> None:
    """Good checkpoints, a training and a data folder, of which the attacks take copies."""
    os.chdir(SHARED)
    for i in range(10):
        path = Path("out/data", "train" if i < 7 else "val", f"{i % 2}", f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        made_photo(i).save(path)
    models = [make_checkpoint(SHARED / f"{head}.tar", head) for head in ("ab", "bins")]
    assert main.main([*TRAIN, "--init", BINS, "--epochs", "1"]) == 0
    shutil.move("out/data", "data")
    shutil.move("out/run", "run")
    # to build a network takes most of a run: the good ones are built once for all
    read, good = inference.load_checkpoint, {}
    good |= {str(path): read(path) for path in models}
    inference.load_checkpoint = lambda path, *to: good.get(str(path)) or read(path, *to)


def contents() -> dict[str, bytes]:
    """Of all in this folder but what the program may write; a pipe or a link has none."""
    return {str(p): p.read_bytes() if p.is_file() and not p.is_symlink() else b""
            for p in Path().rglob("*") if p.parts[0] not in (
                "out", "data", "checkpoints", "stdout", "stderr", "arguments")}


def findings(status: int, must: int | None, seconds: float) -> list[str]:
    """What is wrong with a run as such, whatever it made."""
    output, errors = (Path(name).read_text() for name in ("stdout", "stderr"))
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # GB
    count, last = errors.count("error: "), errors.rstrip("\n").split("\n")[-1]
    said = last.startswith("error: ") and (count == 1 or "above" in last)
    left = [p for p in Path().rglob(".*") if p.suffix == ".part" or ".import" in p.name]
    odd = status not in (0, 1, 2) or must not in (None, status)
    wrong = {f"exit {status}, {last}": odd,
             f"{count} errors, {last}": status and not said or "memory" in errors,
             "control characters": not (output + errors).replace("\n", "").isprintable(),
             f"{size:.1f} GB, {seconds:.0f} s": size > GIGABYTES or seconds > SECONDS,
             f"left: {left}": left}
    return [text for text, true in wrong.items() if true]


def run(seed: int, attack, number: int) -> tuple[str, float]:
    """One attack, in a process of its own: done, refused or what is wrong; its seconds."""
    here = SHARED / f"{attack.__name__}-{number}"
    for name in ("in", "out", "tmp"):
        (here / name).mkdir(parents=True)
    os.chdir(here)
    tempfile.tempdir = str(here / "tmp")
    random = np.random.default_rng([seed, *attack.__name__.encode(), number])
    arguments, check, must = attack(random, number)
    Path("arguments").write_text(" ".join(map(ascii, arguments)))
    for i, name in enumerate(["stdout", "stderr"], 1):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), i)
    sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)
    before, status, start = contents(), 70, time.monotonic()
    try:
        status = main.main(arguments)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    seconds = time.monotonic() - start
    found = findings(status, must, seconds) + [check(status)]
    found += [f"changed: {before.items() ^ contents().items()}"] * (before != contents())
    os.chdir(SHARED)
    if len(sys.argv) < 4:
        shutil.rmtree(here)
    return "; ".join(filter(None, found)) or ("refused" if status else "done"), seconds


ATTACKS = {photographs: 500, bombs: 20, folders: 50, checkpoints: 300, arrays: 60,
           imports: 100, addresses: 14, flags: 350}


def attack_all(seed: int = 0, kind: str = "", number: str = "") -> bool:
    """Run one kind or all, as many at a time as there are cores: findings, a table."""
    prepare()
    table = ["| | inputs | done | refused | findings | longest |", "|---|" + "--:|" * 5]
    bad = 0
    with multiprocessing.Pool(maxtasksperchild=1) as pool:
        for attack in [a for a in ATTACKS if kind in ("", a.__name__)]:
            numbers = [int(number)] if number else range(ATTACKS[attack])
            results = [pool.apply_async(run, (int(seed), attack, n)) for n in numbers]
            words, seconds = [], []
            for n, result in zip(numbers, results):
                try:
                    word, took = result.get(2 * SECONDS)
                except Exception as error:  # it hangs, or died with its process
                    word, took = repr(error), SECONDS
                words, seconds = [*words, word], [*seconds, took]
                if word not in ("done", "refused"):
                    print(f"finding, {attack.__name__} {n}: {word}", flush=True)
            done, refused = words.count("done"), words.count("refused")
            bad += len(words) - done - refused
            table.append(f"| {attack.__name__} | {len(words)} | {done} | {refused} | "
                         f"{len(words) - done - refused} | {max(seconds):.0f} s |")
    print(*table, sep="\n")
    print(f"files: {SHARED}") if number else shutil.rmtree(SHARED)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(attack_all(*sys.argv[1:]))
