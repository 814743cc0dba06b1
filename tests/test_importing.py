"""Archives and folders of photographs imported: whole, once, and nothing of the hostile."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import made_photo

import importing
from importing import import_photos
from photo import ColorizeError


def files(folder) -> list[str]:
    paths = Path(folder).rglob("*")
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())


def make_set(root: Path, names) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        made_photo(i, 70, 66).save(root / name)
    return root


def pack(root: Path, kind: str) -> Path:
    """The folder as it is, or packed."""
    if kind == "folder":
        return root
    return Path(shutil.make_archive(str(root), kind, root.parent, root.name))


FLOWERS = [f"{flower}/{i}.png" for flower in ("rose", "tulip") for i in range(15)]


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "xztar", "folder"])
def test_an_import_splits_by_content_and_keeps_classes(tmp_path, kind):
    source = pack(make_set(tmp_path / "flowers", FLOWERS), kind)
    import_photos(source, tmp_path / "data", 0.3)
    made = files(tmp_path / "data")
    assert sorted(name.split("/", 1)[1] for name in made) == sorted(FLOWERS)
    assert 2 <= sum(name.startswith("val/") for name in made) <= 18
    assert (tmp_path / "data" / made[0]).read_bytes() == (
        tmp_path / "flowers" / made[0].split("/", 1)[1]).read_bytes()


def test_the_split_is_the_same_again_and_added_files_move_none(tmp_path):
    source = make_set(tmp_path / "flowers", FLOWERS)
    import_photos(source, tmp_path / "data", 0.3)
    first = files(tmp_path / "data")
    import_photos(source, tmp_path / "again", 0.3)
    assert files(tmp_path / "again") == first
    make_set(source, FLOWERS + [f"lily/{i}.png" for i in range(10)])
    import_photos(source, tmp_path / "data", 0.3)
    assert set(first) < set(files(tmp_path / "data")) and len(files(tmp_path / "data")) == 40


@pytest.mark.parametrize("ending", ["png", "bmp"])  # of one size are the BMPs
def test_other_photographs_of_the_same_names_are_taken_too_and_once(tmp_path, ending):
    for folder in ("one", "two", "three", "one", "two", "three"):
        path = tmp_path / folder / f"1.{ending}"
        path.parent.mkdir(exist_ok=True)
        made_photo(len(folder), 64, 64).save(path)
        if folder == "two":  # three letters as well
            made_photo(9, 64, 64).save(path)
        import_photos(path.parent, tmp_path / "data", 1e-9)
    made = files(tmp_path / "data")
    assert len(made) == 3 and f"train/1.{ending}" in made
    assert len({(tmp_path / "data" / name).read_bytes() for name in made}) == 3


def test_a_set_with_equal_names_in_train_val_and_test_is_taken_whole(tmp_path):
    for i, split in enumerate(("train", "val", "test")):
        path = tmp_path / "set" / split / "1.bmp"
        path.parent.mkdir(parents=True)
        made_photo(i, 64, 64).save(path)
    import_photos(tmp_path / "set", tmp_path / "data", 0.5)
    assert [name.split("/")[0] for name in files(tmp_path / "data")] == ["train", "val", "val"]


def test_another_fraction_puts_no_photograph_into_both(tmp_path):
    source = make_set(tmp_path / "flowers", FLOWERS)
    for fraction in (0.1, 0.6):
        import_photos(source, tmp_path / "data", fraction)
    assert len(files(tmp_path / "data")) == len(FLOWERS)


@pytest.mark.parametrize("names, expected", [
    (["set/Train/cat/0.png", "set/valid/cat/1.png", "set/Train/dog/2.png"],
     ["train/cat/0.png", "train/dog/2.png", "val/cat/1.png"]),
    (["train/0.png", "test/1.png"], ["train/0.png", "val/1.png"]),
    (["train/cat/0.png", "train/dog/1.png"], ["train/cat/0.png", "train/dog/1.png"]),
    (["val/cat/0.png", "val/cat/1.png"], ["val/cat/0.png", "val/cat/1.png"])])
@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_a_set_that_is_split_stays_split_so(tmp_path, kind, names, expected):
    source = pack(make_set(tmp_path / "set", names), kind)
    import_photos(source, tmp_path / "data", 0.5)
    assert files(tmp_path / "data") == expected


def hostile_zip(path: Path, kind: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.txt", "text")
        if kind == "link":
            info = zipfile.ZipInfo("link.png")
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/hostname")
        elif kind == "bomb":
            with archive.open("bomb.png", "w") as file:
                for _ in range(240):
                    file.write(bytes(1 << 20))
        else:
            archive.writestr({"up": "a/../../escaped.png", "absolute": "/tmp/escaped.png",
                              "backslash": "..\\escaped.png"}[kind], "text")


def hostile_tar(path: Path, kind: str) -> None:
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo({"up": "a/../../escaped.png", "absolute": "/tmp/escaped.png",
                                "backslash": "..\\escaped.png"}.get(kind, "strange.png"))
        if kind == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
        if kind == "bomb":
            info.size = 240 << 20
        archive.addfile(info, io.BytesIO(bytes(info.size)))


@pytest.mark.parametrize("kind", ["up", "absolute", "backslash", "link", "bomb"])
@pytest.mark.parametrize("make, ending", [(hostile_zip, "zip"), (hostile_tar, "tar.gz")])
def test_a_hostile_archive_is_refused_and_nothing_is_written(tmp_path, make, ending, kind):
    source = tmp_path / f"set.{ending}"
    make(source, kind)
    with pytest.raises(ColorizeError) as error:
        import_photos(source, tmp_path / "deep" / "data", 0.1)
    assert "\n" not in str(error.value) and "nothing was taken" in str(error.value)
    assert files(tmp_path) == [source.name] and not Path("/tmp/escaped.png").exists()


def damaged(path: Path, kind: str) -> Path:
    if kind == "absent":
        return path
    if kind == "text":
        path.write_text("no archive")
        return path
    packed = "zip" if kind == "encrypted" else kind
    source = pack(make_set(path.parent / "flowers", FLOWERS), packed)
    content = bytearray(source.read_bytes())
    if kind == "encrypted":  # the flag bit of every file, in both places
        for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            at = content.find(mark)
            while at >= 0:
                content[at + offset] |= 1
                at = content.find(mark, at + 4)
    elif kind == "zip":
        content[len(content) // 2:len(content) // 2 + 200] = bytes(200)
    else:
        del content[len(content) // 2:]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["absent", "text", "zip", "tar", "gztar", "xztar", "encrypted"])
def test_a_damaged_archive_is_one_line(tmp_path, kind):
    source = damaged(tmp_path / "set.bin", kind)
    with pytest.raises(ColorizeError, match="--source") as error:
        import_photos(source, tmp_path / "data", 0.1)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists() or files(tmp_path / "data") == []


def test_an_archive_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    source = pack(make_set(tmp_path / "flowers", FLOWERS), "zip")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ColorizeError, match="free"):
        import_photos(source, tmp_path / "data", 0.1)
    assert files(tmp_path / "data") == []


def test_a_set_that_holds_the_data_folder_is_not_imported_from_that_again(tmp_path, capsys):
    source = make_set(tmp_path / "flowers", FLOWERS[:6])
    for _ in range(3):
        import_photos(source, source / "mine", 0.3)
    assert len(files(source / "mine")) == 6
    assert "6 already there" in capsys.readouterr().err


@pytest.mark.parametrize("inside", [".", "train", "new/deep"])
def test_the_data_folder_is_not_imported_into_itself(tmp_path, inside):
    make_set(tmp_path, ["train/1.png", "new/deep/2.png", "processed/preview.png"])
    before = files(tmp_path)
    with pytest.raises(ColorizeError, match="--source .*itself; name another"):
        import_photos(tmp_path / inside, tmp_path, 0.1)
    assert files(tmp_path) == before


def packed_tar(path: Path, names) -> Path:
    """A tar of photographs and a long name; names: of its members."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for i, name in enumerate(names):
            picture = io.BytesIO()
            made_photo(i, 70, 66).save(picture, "PNG")
            info = tarfile.TarInfo(name)
            info.size = picture.tell()
            picture.seek(0)
            archive.addfile(info, picture)
    return path


@pytest.mark.parametrize("make", [
    lambda tar, start: tar[:start] + b"x" * 512 + tar[start + 512:],     # a header overwritten
    lambda tar, start: tar[:start] + bytes(2000) + tar[start + 2000:],  # and by zeros
    lambda tar, start: tar[:start], lambda tar, start: tar[:start + 200],  # cut off
    lambda tar, start: tar[:start + 512]])
def test_nothing_is_taken_of_a_tar_that_is_damaged_anywhere(tmp_path, make):
    source = packed_tar(tmp_path / "set.tar", [f"{i}.png" for i in range(20)])
    with tarfile.open(source) as archive:
        start = archive.getmembers()[9].offset
    source.write_bytes(make(source.read_bytes(), start))
    with pytest.raises(ColorizeError, match="damaged .*nothing was taken") as error:
        import_photos(source, tmp_path / "data", 0.1)
    assert "\n" not in str(error.value) and files(tmp_path / "data") == []


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_every_format_and_long_names_in_any_script_are_read(tmp_path, form):
    name = "写真" * 5 + "/" + "long" * (20 if form == tarfile.USTAR_FORMAT else 40) + ".png"
    make_set(tmp_path / "set", [name, "b.png"])
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz", format=form) as archive:
        archive.add(tmp_path / "set", "set")
    import_photos(tmp_path / "set.tar.gz", tmp_path / "data", 1e-9)
    assert files(tmp_path / "data") == sorted([f"train/{name}", "train/b.png"])


def header_bomb(path: Path) -> None:
    """600 kB that unpack to a name of 600 MB."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 600 << 20
    with importing.gzip.open(path, "wb", compresslevel=1) as file:
        file.write(info.tobuf())
        for _ in range(600):
            file.write(bytes(1 << 20))


def many_members(path: Path) -> None:
    block = tarfile.TarInfo("x.png").tobuf()
    with importing.gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(50):
            file.write(block * 10000)


def many_in_a_zip(path: Path) -> None:
    entry = b"PK\1\2" + bytes(24) + b"\1" + bytes(17) + b"x"  # 46 bytes and a name of one
    size = 31 << 20
    end = b"PK\5\6" + bytes(4) + b"\xff\xff" * 2 + size.to_bytes(4, "little") + bytes(6)
    path.write_bytes(b"PK\3\4" + bytes(26) + (entry * (size // len(entry) + 1))[:size] + end)


def devices(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("x.png")
        info.type = tarfile.CHRTYPE
        archive.addfile(info)


@pytest.mark.parametrize("make", [header_bomb, many_members, many_in_a_zip, devices])
def test_an_archive_cannot_take_the_machine(tmp_path, make):
    """In a process of its own, with 600 MB above what it has when the modules are loaded."""
    make(tmp_path / "x.bin")
    program = (
        "import resource, sys, pathlib, importing\n"
        "have = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (have + (600 << 20),) * 2)\n"
        "try: importing.import_photos(*map(pathlib.Path, sys.argv[1:]), 0.1)\n"
        "except importing.ColorizeError as error: print(error)")
    run = subprocess.run([sys.executable, "-c", program, tmp_path / "x.bin", tmp_path / "data"],
                         cwd=Path(importing.__file__).parent, capture_output=True, text=True,
                         timeout=120)
    assert "nothing was taken" in run.stdout, run.stderr[-500:]
    assert files(tmp_path / "data") == []


def test_a_pipe_is_no_archive(tmp_path):
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(ColorizeError, match="no such file or folder"):
        import_photos(tmp_path / "pipe.zip", tmp_path / "data", 0.1)


def test_what_killed_imports_left_is_cleared_and_what_others_do_is_not(tmp_path):
    source, data = make_set(tmp_path / "flowers", FLOWERS[:2]), tmp_path / "data"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for number in (ended.pid, os.getpid(), os.getppid()):
        (data / f".import-{number}-x" / "deep").mkdir(parents=True)
    import_photos(source, data, 0.1)
    assert [path.name for path in data.glob(".*")] == [f".import-{os.getppid()}-x"]


def test_a_photograph_gone_after_it_was_listed_is_counted(tmp_path, monkeypatch, capsys):
    source = make_set(tmp_path / "flowers", FLOWERS[:3])
    listed = importing.find_photos(source)
    listed[1].unlink()
    monkeypatch.setattr(importing, "find_photos", lambda folder: listed)
    import_photos(source, tmp_path / "data", 1e-9)
    assert len(files(tmp_path / "data")) == 2
    assert "2 train, 1 unreadable" in capsys.readouterr().err
