"""Arrays and batches, old photographs, the data command; references: scikit-image, numpy."""

import itertools
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import made_photo
from PIL import Image
from skimage import color

import colorize_data
from colorize_data import (SIDE, ColorizeData, class_names, decode_lab, encode_lab,
                           old_photograph, prepare)
from photo import ColorizeError, find_photos, rgb_to_lab


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
    assert stored.shape == (8, SIDE, SIDE, 3) and class_names(manifest) == ["round", "square"]
    for (name, *_, label), row in zip(manifest["photographs"], stored):
        square = Image.open(data / name).resize((SIDE, SIDE), Image.Resampling.LANCZOS,
                                                box=(8, 0, 88, 80))  # they are 96 x 80
        expected = color.rgb2lab(np.asarray(square)) * [2.55, 1, 1] + [0, 128, 128]
        assert np.abs(row - expected).max() <= 0.51 and label == name.split("/")[1]


def test_the_arrays_are_reused_until_photographs_change_or_arrays_are_damaged(data, monkeypatch):
    train, processed = data / "train", data / "processed"
    for change in (lambda: None, lambda: made_photo(50).save(train / "new.png"),
                   lambda: (train / "new.png").rename(train / "round" / "new.png"),
                   lambda: (train / "round" / "new.png").unlink(),
                   lambda: (processed / "train.npy").write_bytes(b"\x93NUMPY\1\0"),
                   lambda: (processed / "val.json").write_bytes(b"\xff")):
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
        path = tmp_path / "train" / kind / f"{i}.jpg"  # a set with gray copies has no classes
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
    assert class_names(train) == []
    expected = {"under 64 pixels": ["tiny.png"],
                "without colour": ["gray/0.jpg", "gray/1.jpg", "gray/deep.png"],
                "unreadable": ["empty.jpg", "eps.jpg", "text.jpg"]}
    assert train["left_out"] == {f"train/{name}": why
                                 for why in expected for name in expected[why]}
    assert "train: 3 left out, unreadable: train/empty.jpg, " in capsys.readouterr().err


def test_a_share_is_set_aside_for_validation_that_added_photographs_never_move(tmp_path):
    def split_of(numbers):
        for i in numbers:
            made_photo(i, 64, 64).save(tmp_path / "train" / f"{i}.png", compress_level=1)
        manifests = prepare(tmp_path, val_fraction=0.3)
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
    assert prepare(tmp_path)["val"] == prepare(tmp_path, 0.3)["val"]  # what was asked for is kept


def test_nothing_to_learn_from_and_a_disk_too_small_are_named(tmp_path, monkeypatch):
    with pytest.raises(ColorizeError, match=f"{tmp_path / 'train'}.*--data"):
        prepare(tmp_path)
    (tmp_path / "train").mkdir()
    for i in (1, 2):  # one would be aside for validation
        made_photo(i).convert("L").save(tmp_path / "train" / f"gray{i}.png")
    for _ in range(2):  # the second time the arrays are there, and empty
        with pytest.raises(ColorizeError, match=f"{tmp_path / 'train'}: 1 without colour"):
            prepare(tmp_path)
    made_photo(1).save(tmp_path / "train" / "y.png")
    free = SimpleNamespace(free=3 * SIDE * SIDE * 3 - 1)  # for three photographs
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(ColorizeError, match="make room"):
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
def arrays(photos):
    prepare(photos)
    return [photos / "processed" / f"{split}.npy" for split in ("train", "val")]


@pytest.mark.parametrize("film", [False, True])
def test_batches_are_a_pure_function_of_seed_and_number(arrays, film):
    def data(seed):
        return ColorizeData(arrays, np.arange(12), size=96, train=True, film=film, seed=seed)
    lab, labels = data(7).__getitems__(range(20))
    assert lab.shape == (20, 3, 96, 96) and lab.dtype == torch.uint8
    loader = torch.utils.data.DataLoader(data(7), collate_fn=tuple, num_workers=2,
                                         batch_sampler=[range(8), range(8, 20)])
    assert all(map(torch.equal, map(torch.cat, zip(*loader)), [lab, labels]))
    late = pickle.loads(pickle.dumps(data(7)))
    assert torch.equal(late[19][0], lab[19]) and torch.equal(late[3][0], lab[3])
    assert len(pickle.dumps(late)) < 5000, "the pickle carries the array"
    assert not torch.equal(data(8).__getitems__(range(20))[0], lab)


def test_each_epoch_is_another_permutation_of_all_rows_or_of_a_fixed_sample(arrays):
    whole = np.concatenate([np.load(path) for path in arrays])
    for limit, count in ((None, 12), (5, 5), (100, 12)):
        lab, chosen = ColorizeData(arrays, np.arange(12), limit=limit).__getitems__(range(count))
        assert np.array_equal(lab.permute(0, 2, 3, 1).numpy(), whole[chosen])
        dataset = ColorizeData(arrays, np.arange(12), 8, train=True, limit=limit, seed=9)
        epochs = [dataset.__getitems__(range(start, start + count))[1].tolist()
                  for start in range(0, 4 * count, count)]
        assert len(dataset) == count and len(set(map(tuple, epochs))) == 4
        assert all(sorted(epoch) == chosen.tolist() for epoch in epochs)


def test_a_crop_is_a_piece_of_the_photograph_of_35_percent_or_more_or_its_mirror_image(tmp_path):
    """On an array whose a and b are the pixel's own coordinates a crop shows where it was taken."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.uint8)
    np.save(tmp_path / "x.npy", np.stack([x * 0, y, x], axis=-1)[None])
    dataset, areas, flips = ColorizeData([tmp_path / "x.npy"], train=True), [], 0
    for n in range(60):
        _, rows, columns = dataset[n][0].numpy().astype(int)
        assert np.ptp(rows, axis=1).max() <= 1 and np.ptp(columns, axis=0).max() <= 1
        areas.append((np.ptp(rows) + 1) * (np.ptp(columns) + 1) / SIDE ** 2)
        flips += columns[0, 0] > columns[0, -1]
    assert 0.33 < min(areas) < 0.5 and 0.85 < max(areas) <= 1 and 18 <= flips <= 42


def test_the_lightness_of_about_half_is_aged_and_no_colour_changes(arrays):
    def samples(film):
        dataset = ColorizeData(arrays, size=64, train=True, film=film, seed=3)
        return dataset.__getitems__(range(96))[0]
    plain, film = samples(False), samples(True)
    assert torch.equal(plain[:, 1:], film[:, 1:]) and torch.equal(film, samples(True))
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

def test_touched_and_copied_photographs_need_no_new_arrays_and_changed_ones_do(
        data, tmp_path, monkeypatch):
    built = prepare(data)
    for path in find_photos(data):
        os.utime(path, (1, 1))
    copied = tmp_path / "copied"
    shutil.copytree(data, copied, copy_function=shutil.copyfile)  # without times
    with monkeypatch.context() as patch:
        patch.setattr(colorize_data, "lab_square", None)
        assert prepare(data) == prepare(copied) == built
        patch.setattr(colorize_data, "content_hash", None)  # the second start reads nothing
        assert prepare(data) == prepare(copied) == built
    path = data / "train" / "round" / "1.png"
    content, pixel = path.read_bytes(), Image.open(path)
    pixel.putpixel((40, 40), (255, 0, 0))
    pixel.save(path)
    assert path.read_bytes() != content
    assert prepare(data)["train"]["fingerprint"] != built["train"]["fingerprint"]


@pytest.mark.parametrize("damage", [
    lambda whole: whole[:300000] + bytes(60000) + whole[360000:],
    lambda whole: whole[:999999] + bytes([whole[999999] ^ 1]) + whole[1000000:],
    lambda whole: whole.replace(b"False", b"True ", 1), lambda whole: whole[:-1],
    lambda whole: whole.replace(b"|u1", b"|i1", 1), lambda whole: whole + b"x"])
def test_damaged_arrays_are_built_again(data, damage, capsys):
    prepare(data)
    array = data / "processed" / "train.npy"
    whole = array.read_bytes()
    array.write_bytes(damage(whole))
    assert array.read_bytes() != whole
    prepare(data)
    assert array.read_bytes() == whole and "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("content", [
    "[]", "3", "null", "{}", "[" * 99999, '{"val_fraction": "x"}', "{", "\ud800",
    {"val_fraction": []}, {"photographs": [[1]]}, {"left_out": 3}, {"checksums": None}])
def test_an_odd_manifest_is_made_anew(data, content):
    built, path = prepare(data), data / "processed" / "train.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    (data / "processed" / "hashes.json").write_bytes(path.read_bytes())
    assert prepare(data) == built


@pytest.mark.parametrize("seed", range(3))
def test_of_few_photographs_one_is_for_validation_and_it_can_be_used(tmp_path, seed):
    (tmp_path / "train").mkdir()
    for i in range(4):
        made_photo(10 * seed + i, 64, 64).save(tmp_path / "train" / f"{i}.png")
    for i in range(6):  # the smallest hash may well be one of these
        Image.new("L", (70, 70), 10 * seed + i).save(tmp_path / "train" / f"gray{i}.png")
    manifests = prepare(tmp_path, val_fraction=1e-9)
    assert [len(manifests[split]["photographs"]) for split in ("train", "val")] == [3, 1]
    hashes = [photo[2] for split in ("val", "train") for photo in manifests[split]["photographs"]]
    assert hashes[0] == min(hashes)
    manifests = prepare(tmp_path, val_fraction=0.999999)
    assert [len(manifests[split]["photographs"]) for split in ("train", "val")] == [1, 3]


def test_a_photograph_gone_after_it_was_listed_is_left_out(data, monkeypatch):
    survey, gone = colorize_data.survey, data / "train" / "round" / "1.png"
    monkeypatch.setattr(colorize_data, "survey",
                        lambda folder: (survey(folder), gone.unlink(missing_ok=True))[0])
    train = prepare(data)["train"]
    assert train["left_out"] == {"train/round/1.png": "unreadable"}
    assert len(train["photographs"]) == 7


def test_photographs_directly_in_the_folder_are_told_how_they_get_in(tmp_path):
    for i in range(3):
        made_photo(i).save(tmp_path / f"{i}.png")
    with pytest.raises(ColorizeError, match=f"3 elsewhere.*data --source {tmp_path} --data"):
        prepare(tmp_path)
    with pytest.raises(ColorizeError, match="no such folder"):
        prepare(tmp_path / "none")


# -------------------------------------------------------------------------- the data command

def test_the_data_report_counts_what_there_is(data, capsys):
    made_photo(90).convert("L").save(data / "train" / "gray.png")
    colorize_data.data(data=data)
    out = capsys.readouterr().out
    assert "train: 8 photographs used" in out and "val: 4 photographs used" in out
    assert "1 left out, without colour: train/gray.png" in out
    assert "round 4" in out and "square 4" in out
    ab = np.concatenate([color.rgb2lab(np.asarray(Image.open(path)))[..., 1:].reshape(-1, 2)
                         for path in (data / "train").rglob("[0-9]*.png")])
    means = [float(line.split()[2].rstrip(",")) for line in out.splitlines() if line[1:2] == "*"]
    assert means == pytest.approx(ab.mean(axis=0), abs=2)  # the arrays hold a centre crop
    assert Image.open(data / "processed" / "preview.png").size == (6 * 196 + 4, 5 * 212 + 4)


def test_the_histogram_is_bright_where_colours_are():
    counts = np.zeros((256, 256))
    counts[128 + 60, 128 + 40] = 100  # a 60, b 40: right of and above the middle
    picture = np.asarray(colorize_data.ab_histogram(counts)).max(axis=2)
    assert np.unravel_index(picture.argmax(), picture.shape) == (127 - 40, 128 + 60)


def test_the_same_photograph_in_train_and_val_is_an_error_that_names_both(data):
    shutil.copy(data / "train" / "square" / "0.png", data / "val" / "copy.png")
    with pytest.raises(ColorizeError) as error:
        colorize_data.data(data=data)
    assert "train/square/0.png" in str(error.value) and "val/copy.png" in str(error.value)
