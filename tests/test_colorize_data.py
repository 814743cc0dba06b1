"""Arrays and batches, old photographs, the data command; references: scikit-image, numpy."""

import gzip
import json
import itertools
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import made_photo
from PIL import Image
from skimage import color

import colorize_data
from colorize_data import (SIDE, ColorizeData, decode_lab, encode_lab, find_photos,
                           import_photos, old_photograph, prepare)
from photo import MADE, ColorizeError, Photo, rgb_to_lab, write_photo


def test_storage_loses_at_most_half_a_unit():
    rgb = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    lab = rgb_to_lab(rgb)
    stored = encode_lab(lab).reshape(-1, 3)
    assert stored.itemsize == 1
    assert np.abs(decode_lab(stored) - lab.reshape(-1, 3)).max() < 0.5001
    tensor = decode_lab(torch.from_numpy(stored)[:, :, None])
    assert np.allclose(tensor[..., 0], decode_lab(stored))


@pytest.fixture
def data(tmp_path, photos):
    """A copy of the photographs without what was made of them."""
    shutil.copytree(photos, tmp_path / "data", ignore=shutil.ignore_patterns("processed"))
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [1, 5])
def test_the_array_holds_the_photographs_as_lab(data, workers):
    manifest = prepare(data, workers=workers)["train"]
    stored = np.load(data / "processed" / "train.npy")
    assert stored.shape == (8, SIDE, SIDE, 3)
    for (name, *_), row in zip(manifest["photographs"], stored):
        square = Image.open(data / name).resize((SIDE, SIDE), Image.Resampling.LANCZOS,
                                                box=(8, 0, 88, 80))  # they are 96 x 80
        expected = color.rgb2lab(np.asarray(square)) * [2.55, 1, 1] + [0, 128, 128]
        assert np.abs(row - expected).max() <= 0.51


def test_the_arrays_are_reused_until_photographs_change_or_arrays_are_damaged(data, monkeypatch):
    train, processed = data / "train", data / "processed"
    for change in (lambda: None, lambda: made_photo(50).save(train / "new.png"),
                   lambda: (train / "new.png").rename(train / "round" / "new.png"),
                   lambda: (train / "round" / "new.png").unlink(),
                   lambda: (processed / "train.npy").write_bytes(b"\x93NUMPY\1\0"),
                   lambda: (processed / "manifests.json.gz").write_bytes(b"\xff")):
        change()
        built = prepare(data)
        names = [name for name, *_ in built["train"]["photographs"]]
        assert [data / name for name in names] == find_photos(train)
        assert len(names) == len(np.load(processed / "train.npy"))
        with monkeypatch.context() as patch:
            patch.setattr(colorize_data, "lab_square", None)
            assert prepare(data) == built


def test_what_cannot_teach_is_left_out_and_named(tmp_path, capsys):
    for name, content in (("empty", b""), ("text", b"none\n" * 99), ("eps", b"%!PS-Adobe-3.0")):
        path = tmp_path / "train" / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    for i, (kind, mode) in itertools.product(range(2), (("color", "RGB"), ("gray", "L"))):
        path = tmp_path / "train" / kind / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        made_photo(i).convert(mode).convert("RGB").save(path)
    deep = np.random.default_rng(0).integers(0, 65535, (80, 80), np.uint16)
    Image.fromarray(deep).save(tmp_path / "train" / "gray" / "deep.png")
    made_photo(60, 63, 200).save(tmp_path / "train" / "tiny.png")
    made_photo(61).save(tmp_path / "val.png")
    (tmp_path / "val").mkdir()
    (tmp_path / "val.png").rename(tmp_path / "val" / "x.png")
    train = prepare(tmp_path)["train"]
    names = [name for name, *_ in train["photographs"]]
    assert names == ["train/color/0.jpg", "train/color/1.jpg"]
    expected = {"under 64 pixels": ["tiny.png"],
                "without colour": ["gray/0.jpg", "gray/1.jpg", "gray/deep.png"],
                "unreadable": ["empty.jpg", "eps.jpg", "text.jpg"]}
    assert train["left_out"] == {why: [f"train/{name}" for name in expected[why]]
                                 for why in expected}
    assert "3 left out, unreadable: train/empty.jpg, " in capsys.readouterr().err


def test_a_share_is_set_aside_for_validation_that_added_photographs_never_move(
        tmp_path, monkeypatch):
    monkeypatch.setattr(colorize_data, "VAL_SHARE", 0.3)

    def split_of(numbers):
        for i in numbers:
            made_photo(i, 64, 64).save(tmp_path / "train" / f"{i}.png", compress_level=1)
        manifests = prepare(tmp_path)
        return {name: split for split, manifest in manifests.items()
                for name, *_ in manifest["photographs"]}
    (tmp_path / "train").mkdir()
    first = split_of(range(30))
    assert len(first) == 30 and 3 <= list(first.values()).count("val") <= 16
    for i in range(9):
        (tmp_path / "train" / f"{i}.png").rename(tmp_path / "train" / f"renamed{i}.png")
    second = split_of(range(30, 40))
    assert len(second) == 40
    for i in range(9):
        assert second.pop(f"train/renamed{i}.png") == first.pop(f"train/{i}.png")
    assert first.items() <= second.items()


def test_every_bar_of_a_build_comes_to_its_end(data, monkeypatch):
    ended = []

    def bar(items, total, label):
        yield from items
        ended.append(label)
    monkeypatch.setattr(colorize_data, "progress", bar)
    prepare(data)
    assert ended == ["reading", "train.npy", "val.npy"]


def test_nothing_to_learn_from_is_named(tmp_path):
    with pytest.raises(ColorizeError, match="--source FOLDER --data"):
        prepare(tmp_path / "none")
    with pytest.raises(ColorizeError, match=f"{tmp_path / 'train'}.* --source {tmp_path} --data"):
        prepare(tmp_path)
    (tmp_path / "train").mkdir()
    for i in (1, 2):  # one would be aside for validation
        made_photo(i).convert("L").save(tmp_path / "train" / f"gray{i}.png")
    for _ in range(2):  # the second time the arrays are there, and empty
        with pytest.raises(ColorizeError, match=f"{tmp_path / 'train'}; add .* colour"):
            prepare(tmp_path)


@pytest.mark.parametrize("dies_at", [1, 7, 8, 11])
def test_a_killed_build_leaves_nothing_that_looks_finished(data, monkeypatch, dies_at):
    """Killed at any photograph, over older arrays: the next run builds what a fresh one would."""
    prepare(data)
    (data / "train" / "round" / "1.png").unlink()
    calls, lab_square = itertools.count(1), colorize_data.lab_square

    def dying(path):
        if next(calls) == dies_at:
            raise SystemExit(137)
        return lab_square(path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(colorize_data, "lab_square", dying)
        prepare(data, workers=1)
    assert not list((data / "processed").glob(".*"))
    manifests, after = prepare(data), np.load(data / "processed" / "train.npy")
    shutil.rmtree(data / "processed")
    assert prepare(data) == manifests and len(after) == 7
    assert np.array_equal(after, np.load(data / "processed" / "train.npy"))


@pytest.fixture(scope="session")
def array(photos):
    prepare(photos)
    return photos / "processed" / "train.npy"


def samples(dataset, numbers) -> torch.Tensor:
    return torch.stack([dataset[n] for n in numbers])


@pytest.mark.parametrize("film", [False, True])
def test_batches_are_a_pure_function_of_seed_and_number(array, film):
    def data(seed):
        return ColorizeData(array, size=96, train=True, film=film, seed=seed)
    lab = samples(data(7), range(20))
    assert lab.shape == (20, 3, 96, 96) and lab.dtype == torch.uint8
    loader = torch.utils.data.DataLoader(data(7), num_workers=2,
                                         batch_sampler=[range(8), range(8, 20)])
    assert torch.equal(torch.cat(list(loader)), lab)
    late = pickle.loads(pickle.dumps(data(7)))
    assert torch.equal(late[19], lab[19]) and torch.equal(late[3], lab[3])
    assert len(pickle.dumps(late)) < 5000, "the pickle carries the array"
    assert not torch.equal(samples(data(8), range(20)), lab)


def test_each_epoch_is_another_permutation_of_all_rows_or_of_a_fixed_sample(tmp_path):
    rows = np.arange(12, dtype=np.uint8)[:, None, None, None]  # each says which it is
    np.save(tmp_path / "x.npy", np.broadcast_to(rows, (12, SIDE, SIDE, 3)))
    for limit, count in ((None, 12), (5, 5), (100, 12)):
        chosen = samples(ColorizeData(tmp_path / "x.npy", limit=limit), range(count))
        chosen = chosen[:, 0, 0, 0].tolist()
        assert chosen == sorted(set(chosen)) and len(chosen) == count
        dataset = ColorizeData(tmp_path / "x.npy", 8, train=True, limit=limit, seed=9)
        order = samples(dataset, range(4 * count))[:, 0, 0, 0].tolist()
        epochs = [order[start:start + count] for start in range(0, 4 * count, count)]
        assert len(dataset) == count and len(set(map(tuple, epochs))) == 4
        assert all(sorted(epoch) == chosen for epoch in epochs)


def test_a_crop_is_a_piece_of_the_photograph_of_35_percent_or_more_or_its_mirror_image(tmp_path):
    """On an array whose a and b are the pixel's own coordinates a crop shows where it was taken."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.uint8)
    np.save(tmp_path / "x.npy", np.stack([x * 0, y, x], axis=-1)[None])
    dataset, areas, flips = ColorizeData(tmp_path / "x.npy", train=True), [], 0
    for n in range(60):
        _, rows, columns = dataset[n].numpy().astype(int)
        assert np.ptp(rows, axis=1).max() <= 1 and np.ptp(columns, axis=0).max() <= 1
        areas.append((np.ptp(rows) + 1) * (np.ptp(columns) + 1) / SIDE ** 2)
        flips += columns[0, 0] > columns[0, -1]
    assert 0.33 < min(areas) < 0.5 and 0.85 < max(areas) <= 1 and 18 <= flips <= 42


def test_the_lightness_of_about_half_is_aged_and_no_colour_changes(array):
    plain, film, again = (
        samples(ColorizeData(array, size=64, train=True, film=film, seed=3), range(96))
        for film in (False, True, True))
    assert torch.equal(plain[:, 1:], film[:, 1:]) and torch.equal(film, again)
    assert 30 <= (plain != film).flatten(1).any(dim=1).sum() <= 66


def test_an_old_photograph_is_a_function_of_its_number_and_looks_like_the_photograph():
    y, x = np.mgrid[:96, :128]
    lab = np.stack([x * 2, 128 + 0 * x, 128 + 0 * x], axis=0).astype(np.uint8)  # a gray ramp
    old = [old_photograph(torch.from_numpy(lab), np.random.default_rng(n)) for n in range(60)]
    again = old_photograph(torch.from_numpy(lab), np.random.default_rng(7))
    assert torch.equal(old[7], again) and not torch.equal(old[7], old[8])
    assert all(np.array_equal(image[1:], lab[1:]) for image in old)
    L = np.stack([image[0].numpy().astype(float) for image in old])
    alike = [np.corrcoef(image.ravel(), lab[0].ravel())[0, 1] for image in L]
    assert min(alike) > 0.9 and np.median(alike) > 0.98
    # faded ones have no black, some are darker and some lighter than they were
    assert 0.2 < (L[:, :, 0].mean(axis=1) > 15).mean() < 0.8
    middle = L[:, :, 60:68].mean(axis=(1, 2))
    assert middle.min() < 110 < 150 < middle.max()


# ---------------------------------------------------------- whole, current, fairly split

def test_copied_photographs_give_the_same_arrays_changed_ones_do_not_and_a_start_reads_none(
        data, tmp_path, monkeypatch):
    built, copied = prepare(data), tmp_path / "copied"
    shutil.copytree(data, copied, copy_function=shutil.copyfile)  # without times
    assert prepare(copied) == built
    with monkeypatch.context() as patch:
        patch.setattr(colorize_data, "content_hash", None)
        assert prepare(data) == prepare(copied) == built
    path = data / "train" / "round" / "1.png"
    pixel = Image.open(path)
    pixel.putpixel((40, 40), (255, 0, 0))
    pixel.save(path)
    assert prepare(data)["train"]["fingerprint"] != built["train"]["fingerprint"]


@pytest.mark.parametrize("damage", [
    lambda whole: whole[:300000] + bytes(60000) + whole[360000:],
    lambda whole: whole[:999999] + bytes([whole[999999] ^ 1]) + whole[1000000:],
    lambda whole: whole.replace(b"False", b"True ", 1), lambda whole: whole[:-1],
    lambda whole: whole.replace(b"|u1", b"|i1", 1)])
def test_damaged_arrays_are_built_again(data, damage, capsys):
    prepare(data)
    array = data / "processed" / "train.npy"
    whole = array.read_bytes()
    array.write_bytes(damage(whole))
    assert array.read_bytes() != whole
    prepare(data)
    assert array.read_bytes() == whole and "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", gzip.compress(b"[3]"),
                                     gzip.compress(b"3"), gzip.compress(b"{"), None])
def test_an_odd_manifest_is_made_anew(data, content):
    built, path = prepare(data), data / "processed" / "manifests.json.gz"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole if content is None else content)
    assert prepare(data) == built


@pytest.mark.parametrize("key, value", [("photographs", 5), ("photographs", [[1]]),
                                        ("left_out", 3), ("left_out", {"odd": [4]})])
def test_a_manifest_with_an_odd_value_is_made_anew(data, key, value):
    built, path = prepare(data), data / "processed" / "manifests.json.gz"
    known = json.loads(gzip.decompress(path.read_bytes()))
    known["manifests"]["train"][key] = value
    path.write_bytes(gzip.compress(json.dumps(known).encode()))
    assert prepare(data) == built


@pytest.mark.parametrize("seed", range(3))
def test_of_few_photographs_one_is_for_validation_and_it_can_be_used(tmp_path, seed, monkeypatch):
    (tmp_path / "train").mkdir()
    for i in range(4):
        made_photo(10 * seed + i, 64, 64).save(tmp_path / "train" / f"{i}.png")
    for i in range(6):  # the smallest hash may well be one of these
        Image.new("L", (70, 70), 10 * seed + i).save(tmp_path / "train" / f"gray{i}.png")
    for share in (1e-9, 0.999999):
        monkeypatch.setattr(colorize_data, "VAL_SHARE", share)
        shutil.rmtree(tmp_path / "processed", ignore_errors=True)
        manifests = prepare(tmp_path)
        hashes = {split: [photo[1] for photo in manifests[split]["photographs"]]
                  for split in ("train", "val")}
        assert len(hashes["train"]) == 3 and hashes["val"] == [min(sum(hashes.values(), []))]


def test_one_photograph_and_its_copies_are_for_training(tmp_path):
    (tmp_path / "train").mkdir()
    for i in range(3):
        made_photo(1, 64, 64).save(tmp_path / "train" / f"{i}.png")
    used = {split: len(m["photographs"]) for split, m in prepare(tmp_path).items()}
    assert used == {"train": 3, "val": 0}


def test_arrays_of_another_program_are_not_replaced(data):
    path = data / "processed" / "train.npy"
    path.parent.mkdir()
    np.save(path, [1, 2, 3])
    with pytest.raises(ColorizeError, match="train.npy: is not of this program; move it"):
        prepare(data)
    assert np.load(path).tolist() == [1, 2, 3]


def test_results_of_this_program_among_the_photographs_teach_nothing(data):
    """As after colouring a folder of the training set into itself."""
    image = Image.open(data / "train" / "round" / "1.png")
    write_photo(data / "train" / "round" / "1_color.png", [image], Photo(image), MADE)
    train = prepare(data)["train"]
    assert train["left_out"] == {"made by this program": ["train/round/1_color.png"]}
    assert len(train["photographs"]) == 8


def test_a_photograph_gone_after_it_was_listed_is_left_out(data, monkeypatch):
    find, gone = colorize_data.find_photos, data / "train" / "round" / "1.png"
    monkeypatch.setattr(colorize_data, "find_photos",
                        lambda folder: (find(folder), gone.unlink(missing_ok=True))[0])
    train = prepare(data)["train"]
    assert len(train["photographs"]) == 7 and not train["left_out"]


# -------------------------------------------------------------------------- the data command

def test_the_data_report_counts_what_there_is(data, capsys):
    made_photo(90).convert("L").save(data / "train" / "gray.png")
    colorize_data.data(data=data)
    out, remarks = capsys.readouterr()
    assert "train: 8 photographs used" in out and "val: 4 photographs used" in out
    assert "1 left out, without colour: train/gray.png" in remarks
    assert Image.open(data / "processed" / "preview.png").size == (4 * 196 + 4, 4 * 212 + 4)


def test_the_same_photograph_in_train_and_val_is_an_error_that_names_both(data):
    shutil.copy(data / "train" / "square" / "0.png", data / "val" / "copy.png")
    with pytest.raises(ColorizeError) as error:
        colorize_data.data(data=data)
    assert "train/square/0.png" in str(error.value) and "val/copy.png" in str(error.value)


# ------------------------------------------------------------------ archives and imports

def files(folder) -> list[str]:
    paths = Path(folder).rglob("*")
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())


def make_set(root: Path, names) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        made_photo(i, 70, 66).save(root / name)
    return root


FLOWERS = [f"{flower}/{i}.png" for flower in ("rose", "tulip") for i in range(15)]


def test_an_import_splits_by_content_and_keeps_classes(tmp_path):
    source = make_set(tmp_path / "flowers", FLOWERS)
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
def test_a_set_that_is_split_stays_split_so(tmp_path, names, expected):
    source = make_set(tmp_path / "set", names)
    import_photos(source, tmp_path / "data", 0.5)
    assert files(tmp_path / "data") == expected


def test_what_macos_adds_and_what_is_no_photograph_is_not_taken(tmp_path):
    source = make_set(tmp_path / "set", ["a/1.png", "b/2.png"])
    (source / "notes.txt").write_text("notes")
    (source / "a" / "._1.png").write_text("icon")
    import_photos(source, tmp_path / "data", 1e-9)
    assert files(tmp_path / "data") == ["train/a/1.png", "train/b/2.png"]


def test_results_and_sheets_of_this_program_are_not_taken(tmp_path, capsys):
    source = make_set(tmp_path / "set", ["train/1.png", "train/2.png"])
    colorize_data.data(data=source)  # its processed/preview.png is a picture, too
    image = made_photo(5)
    write_photo(source / "train" / "1_color.png", [image], Photo(image), MADE)
    import_photos(source, tmp_path / "data", 0.1)
    assert files(tmp_path / "data") == ["train/1.png", "train/2.png"]
    said = capsys.readouterr().err
    assert "2 passed over, made by this program: " in said and "preview.png" in said


def test_where_all_photographs_are_in_val_it_is_said_to_move_some(tmp_path):
    make_set(tmp_path, ["val/1.png", "val/2.png"])
    with pytest.raises(ColorizeError, match=f"{tmp_path / 'train'}; move some there from .*val$"):
        prepare(tmp_path)


@pytest.mark.parametrize("inside", [".", "train", "new/deep", ".."])
def test_the_data_folder_is_not_imported_into_itself(tmp_path, inside):
    data = make_set(tmp_path / "data", ["train/1.png", "new/deep/2.png", "processed/preview.png"])
    before = files(tmp_path)
    with pytest.raises(ColorizeError, match="--source .*itself; name another"):
        import_photos(data / inside, data, 0.1)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["set.zip", "set.tar", "none", "pipe"])
def test_what_is_no_folder_is_refused_and_nothing_is_taken(tmp_path, name):
    source = tmp_path / name
    if name == "pipe":
        os.mkfifo(source)
    elif name != "none":
        shutil.make_archive(tmp_path / "set", source.suffix[1:], make_set(tmp_path / "a", ["1.png"]))
    with pytest.raises(ColorizeError, match=f"--source .*{name}: no such folder; .*unpack"):
        import_photos(source, tmp_path / "data", 0.1)
    assert not (tmp_path / "data").exists()


def test_a_photograph_gone_after_it_was_listed_is_counted(tmp_path, monkeypatch, capsys):
    source = make_set(tmp_path.resolve() / "flowers", FLOWERS[:3])
    listed = colorize_data.find_photos(source)
    listed[1].unlink()
    monkeypatch.setattr(colorize_data, "find_photos", lambda folder, made: listed)
    import_photos(source, tmp_path / "data", 1e-9)
    assert len(files(tmp_path / "data")) == 2
    assert "2 train, 1 unreadable" in capsys.readouterr().err


def test_a_processed_that_cannot_be_written_is_named_with_its_remedy(data):
    (data / "processed").touch()
    with pytest.raises(ColorizeError, match="processed/.*cannot be written.*; name another"):
        prepare(data)


def test_a_build_that_is_cut_leaves_no_manifest_of_older_arrays(data, monkeypatch):
    """As a kill would: nothing after the first photograph happens."""
    prepare(data)
    (data / "train" / "round" / "1.png").unlink()
    monkeypatch.setattr(colorize_data, "build_arrays", None)
    with pytest.raises(TypeError):
        prepare(data)
    assert not (data / "processed" / "manifests.json.gz").read_bytes()
