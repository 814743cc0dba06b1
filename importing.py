"""Photographs from an archive or a folder into DATA/train and DATA/val.

    python main.py data --source photos.zip        # or .tar, .tar.gz, .tar.xz, a folder

An archive is a stranger's: it is read as a stream into a hidden folder, every bound is
checked before memory or disk is taken, and of one that is damaged nothing is kept.
"""

import bz2
import contextlib
import gzip
import io
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

from photo import ColorizeError, content_hash, find_photos, progress, say, write_atomically

MAX_MEMBERS = 300_000   # files in an archive: seven times what our own network learned from
MAX_MEMBER = 300 << 20  # bytes of a photograph: 100 megapixels of 8-bit RGB, not compressed
MAX_RATIO = 200         # of all contents to the archive, from 1 MB on; photographs: 1 to 2
MAX_HEADER = 1 << 20    # bytes of a name or of attributes in a tar: macOS keeps icons there
# by the first bytes of the file
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
# a test set's photographs are as good for choosing the best epoch as any others
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "val"}


def in_validation(digest: str, fraction: float) -> bool:
    """Whether a photograph is for validation: by its SHA-256, whatever others."""
    return int(digest[:8], 16) < fraction * 16 ** 8


# -------------------------------------------------------------------------------- archives

def pieces(read, size: int):
    """The next `size` bytes that `read` gives, by the megabyte; EOFError where they end."""
    while size > 0:
        piece = read(min(size, 1 << 20))
        if not piece:
            raise EOFError("it ends in the middle of a file")
        size -= len(piece)
        yield piece


def tar_members(stream):
    """(name, bytes, kind, pieces) of each member of a tar, headers for others among them.

    Read here, not by tarfile, which takes a damaged header for the end of the archive, and
    reads headers of any size whole.
    """
    said = {}  # path and size of the next member, where they do not fit its own header
    while (block := stream.read(512)) != bytes(512):  # zeros mark the end
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # checks its sum
        if info.type in (b"L", b"K", b"x", b"g"):  # long name, long link, pax, pax for all
            said |= said_by_header(info, stream)
            yield "", info.size, "header", ()
            continue
        name = said.get(b"path", os.fsencode(info.name)).decode("utf-8", "surrogateescape")
        size = 0 if info.isdir() else int(said.get(b"size", info.size))
        plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
        kind = "folder" if info.isdir() else "file" if plain else "other"
        content, said = pieces(stream.read, size), {}
        yield name, size, kind, content
        for _ in content:  # what was not taken
            pass
        stream.read(-size % 512)  # all is filled up to 512 bytes
    # a header overwritten by zeros looks like the end, but files follow
    if stream.read(16 << 20).strip(b"\0"):
        raise ValueError("there is more behind its end")


def said_by_header(info: tarfile.TarInfo, stream) -> dict[bytes, bytes]:
    """What an extended header says of the member after it: b"path", b"size", or nothing."""
    if not 0 <= info.size <= MAX_HEADER:
        raise ValueError(f"a header of {info.size} bytes")
    text = b"".join(pieces(stream.read, info.size))
    stream.read(-info.size % 512)
    if info.type == b"L":
        return {b"path": text.rstrip(b"\0")}
    # pax: lines of "length key=value"
    said = re.findall(rb"^\d+ (path|size)=(.*)$", text, re.MULTILINE)
    return dict(said) if info.type == b"x" else {}


class ZipFileSource(io.BufferedReader):
    """The bytes of a zip, whose list of members, read whole by zipfile, has a bound."""

    def read(self, size=-1):
        if size > 100 * MAX_MEMBERS:  # 46 bytes and a name each
            raise ValueError("its list of members is too long")
        return super().read(size)


def zip_members(source: Path):
    """(name, bytes, kind, pieces) of each member of a zip."""
    with ZipFileSource(io.FileIO(source)) as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            mode = stat.S_IFMT(info.external_attr >> 16)  # 0 where Windows packed it
            plain = mode in (0, stat.S_IFREG)
            kind = "folder" if info.is_dir() else "file" if plain else "other"
            with archive.open(info) as member:  # which checks the CRC at its end
                content = pieces(member.read, info.file_size)
                yield info.filename, info.file_size, kind, content


def members(source: Path):
    """(name, bytes, kind, pieces) of each member of a zip or a tar, packed or not."""
    with open(source, "rb") as file:
        start = file.read(6)
    if start.startswith((b"PK\3\4", b"PK\5\6")):  # with members, without
        yield from zip_members(source)
        return
    openers = [opener for magic, opener in PACKED.items() if start.startswith(magic)]
    with (openers or [open])[0](source, "rb") as stream:
        yield from tar_members(stream)


def check_member(name: str, size: int, kind: str) -> str:
    """Why a member must not be unpacked, or ""."""
    leads_out = name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)
    if kind == "other" or leads_out:
        return "is a link or a device or leads out of the folder"
    if not 0 <= size <= MAX_MEMBER:
        return f"unpacks to {size >> 20} MB, more than photographs do"
    return ""


def unpack(source: Path, folder: Path) -> None:
    """Unpack a zip or tar; ColorizeError at the first sign that it is hostile or broken."""
    count, total, free = 0, 0, shutil.disk_usage(folder).free
    bound = MAX_RATIO * max(source.stat().st_size, 1 << 20)
    try:
        for name, size, kind, content in members(source):
            count, total = count + 1, total + size
            reason = check_member(name, size, kind)
            if count > MAX_MEMBERS or total > bound:
                reason = f"is number {count}, at {total >> 20} MB: more than photographs"
            if reason:
                raise ColorizeError(f"--source {source}: '{name[:100]}' {reason}; nothing "
                                    "was taken; unpack it yourself if you trust it")
            if total > free:
                raise ColorizeError(f"--source {source}: unpacks to over {free >> 20} MB, "
                                    "the space that is free; make room, or unpack it "
                                    "elsewhere")
            if kind == "file" and size:  # nothing is no photograph
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "wb") as file:
                    file.writelines(content)
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error,
            lzma.LZMAError, tarfile.TarError) as error:  # RuntimeError: encrypted
        reason = getattr(error, "strerror", "") or error
        raise ColorizeError(f"--source {source}: no zip or tar, or it is damaged or "
                            f"encrypted ({reason}); nothing was taken; get it again, or "
                            "unpack it yourself and name the folder") from None


# ------------------------------------------------------------------------------- importing

def clear_imports(data: Path) -> None:
    """Remove the folders that killed imports left; their process number is in the name."""
    for path in data.glob(".import-*"):
        number = re.match(r"\.import-(\d{1,9})-", path.name)
        # our own number is no other's: in a container numbers come again
        if number and (int(number[1]) == os.getpid() or not is_running(int(number[1]))):
            shutil.rmtree(path, ignore_errors=True)


def is_running(process: int) -> bool:
    """Whether a process of this machine has the number; where that cannot be asked, yes."""
    if os.name == "posix":  # elsewhere this would end it
        with contextlib.suppress(PermissionError):  # somebody else's
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                return False
    return True


def check_places(source: Path, data: Path) -> None:
    """ColorizeError where there is nothing to import, or it lies in DATA."""
    if not (os.path.isfile(source) or os.path.isdir(source)):  # a pipe would never end
        raise ColorizeError(f"--source {source}: no such file or folder; check the path")
    inside, target = source.resolve(), data.resolve()
    if source.is_dir() and target in (inside, *inside.parents):
        raise ColorizeError(f"--source {source}: lies in --data {data}, which would be "
                            "copied into itself; name another folder with --data")


def import_photos(source: Path, data: Path, val_fraction: float) -> None:
    """Take the photographs of a zip, tar or folder into DATA/train and val, classes kept.

    A set that comes with train and val (or test) folders stays split so; else the split is
    by a hash of each content.
    """
    check_places(source, data)
    clear_imports(data)
    try:
        data.mkdir(parents=True, exist_ok=True)
        unpacked = tempfile.TemporaryDirectory(dir=data, prefix=f".import-{os.getpid()}-")
    except OSError as error:
        raise ColorizeError(f"--data {data}: cannot be written ({error.strerror}); name "
                            "another folder") from None
    with unpacked:
        folder = source
        if not source.is_dir():
            say(f"unpacking {source}")
            folder = Path(unpacked.name)
            unpack(source, folder)
        paths, target = find_photos(folder), data.resolve()
        if source.is_dir() and source.resolve() in target.parents:  # DATA lies in it
            paths = [path for path in paths if target not in path.resolve().parents]
        counts, top = Counter(), top_folder(folder, paths)
        for path in progress(paths, len(paths), f"import {source.name}"):
            counts[import_photo(path, path.relative_to(top), data, val_fraction)] += 1
    taken = ", ".join(f"{n} {what}" for what, n in counts.items()) or "no photograph"
    say(f"imported {source}: {taken}")


def top_folder(folder: Path, paths: list[Path]) -> Path:
    """The folder below which names are splits and classes: the deepest that holds all."""
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
    for stem in (name.stem, f"{name.stem[:200]}-{digest[:8]}", digest):
        name = name.with_stem(stem)
        others = [data / other / name for other in ("train", "val")]
        others = [other for other in others if other.exists()]
        if not others:
            write_atomically(data / split / name, partial(shutil.copyfile, path))
            return split
        # a camera gives one name, and BMP one size, to many photographs
        if any(other.stat().st_size == size and content_hash(other) == digest
               for other in others if other.is_file()):
            break
    return "already there"
