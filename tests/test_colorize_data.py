"""Photographs in and out, colour, arrays and batches; references: scikit-image, numpy, Pillow."""

import io
import itertools
import os
import pickle
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms, ImageFilter, PngImagePlugin
from skimage import color

import colorize_data
from colorize_data import (SIDE, ColorizeData, class_names, decode_lab, encode_lab,
                           prepare)
from photo import (ColorizeError, Photo, gray_to_L, find_photos, in_gamut, into_gamut,
                   lab_to_rgb, read_photo, rgb_to_lab, write_photo)
from conftest import made_photo

# what Pillow says of damaged files; the project silences it, pytest brings it back
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL",
                                        "ignore::PIL.Image.DecompressionBombWarning")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RAMP = np.linspace(0, 65535, 2000).reshape(40, 50)


def noise(dtype, *shape) -> np.ndarray:
    """Seeded samples over the whole range of an integer type."""
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def smooth(mode="RGB", width=50, height=40) -> Image.Image:
    """Smooth colours, so that lossy formats stay close."""
    return made_photo(3, width, height).filter(ImageFilter.GaussianBlur(4)).convert(mode)


def difference(image, expected, of=np.max) -> float:
    return of(np.abs(np.asarray(image).astype(int) - np.asarray(expected)))


@pytest.mark.parametrize("rgb", [
    noise(np.uint8, 40, 50, 3), noise(np.uint16, 40, 50, 3), noise(np.uint8, 999, 3) / 255,
    np.array(list(itertools.product([0, 1, 10, 11, 128, 254, 255], repeat=3)), np.uint8)])
def test_lab_is_that_of_scikit_image_and_back_and_storage_loses_at_most_half_a_unit(rgb):
    top = np.iinfo(rgb.dtype).max if rgb.dtype.kind == "u" else 1
    lab, gray = rgb_to_lab(rgb), np.repeat(rgb[..., :1], 3, axis=-1)
    assert np.abs(lab - color.rgb2lab(rgb / top)).max() < 0.01
    assert np.abs(gray_to_L(rgb[..., 0]) - color.rgb2lab(gray / top)[..., 0]).max() < 0.01
    vivid = lab * np.float32([1, 1.2, 1.2])  # some of it outside the gamut
    assert np.abs(lab_to_rgb(vivid) - color.lab2rgb(vivid.astype(float))).max() < 1e-4
    stored = encode_lab(lab).reshape(-1, 3)
    assert stored.itemsize == 1 and np.abs(decode_lab(stored) - lab.reshape(-1, 3)).max() < 0.5001
    assert np.allclose(decode_lab(torch.from_numpy(stored)[:, :, None])[..., 0], decode_lab(stored))


def linear(L, ab):
    """Linear sRGB of Lab by the textbook, in float64: the reference for the gamut."""
    fy = (L + 16) / 116
    f = np.stack([fy + ab[..., 0] / 500, fy, fy - ab[..., 1] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f ** 3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.95047, 1, 1.08883]
    return xyz @ np.linalg.inv(color.colorconv.xyz_from_rgb).T


def test_colours_outside_the_gamut_keep_lightness_and_hue_and_land_on_its_edge():
    random = np.random.default_rng(0)
    L = random.uniform(2, 98, 2000).astype(np.float32)
    ab = random.uniform(-110, 110, (2000, 2)).astype(np.float32)
    result, outside = into_gamut(L, ab), ~in_gamut(L, ab)
    assert 0.3 < outside.mean() < 1 and np.array_equal(result[~outside], ab[~outside])
    assert (linear(L, result) > -3e-4).all() and (linear(L, result) < 1 + 3e-4).all()
    scale = (result * ab).sum(axis=1) / (ab ** 2).sum(axis=1)
    assert np.abs(result - scale[:, None] * ab).max() < 1e-3, "the hue has changed"
    assert (scale[outside] < 1).all() and (scale > 0).all()
    further = linear(L[outside], scale[outside, None] * 1.02 * ab[outside])  # the edge, no nearer
    assert ((further < 0) | (further > 1)).any(axis=1).mean() > 0.98
    rgb = lab_to_rgb(np.column_stack([L, result]))
    assert np.abs(color.rgb2lab(rgb.astype(float))[:, 0] - L).max() < 0.1


# ----------------------------------------------------------------------- photographs in and out

@pytest.mark.parametrize("mode, name, options, becomes, tolerance", [
    ("1", "x.tif", {"compression": "group4"}, "L", 0), ("L", "x.tif", {}, "L", 0),
    ("LA", "x.tif", {}, "L", 0), ("P", "x.tif", {}, "RGB", 0), ("RGBA", "x.tif", {}, "RGB", 0),
    ("CMYK", "x.tif", {}, "RGB", 0), ("YCbCr", "x.tif", {"compression": "tiff_lzw"}, "RGB", 2),
    ("CMYK", "x.jpg", {"quality": 98, "subsampling": 0}, "RGB", 12),  # inverted, as Adobe does
    ("RGB", "x.tif", {"compression": "tiff_lzw"}, "RGB", 0), ("RGB", "x.png", {}, "RGB", 0),
    ("RGB", "x.jpg", {"quality": 98, "subsampling": 0}, "RGB", 8), ("RGB", "x.bmp", {}, "RGB", 0),
    ("RGB", "x.ppm", {}, "RGB", 0), ("RGB", "x.tga", {}, "RGB", 0), ("RGB", "x.gif", {}, "RGB", 40),
    ("RGB", "x.webp", {"lossless": True}, "RGB", 0), ("RGB", "x.jp2", {}, "RGB", 0),
    ("RGB", "x.avif", {"quality": 98}, "RGB", 10)])
def test_every_mode_and_format_is_read(tmp_path, mode, name, options, becomes, tolerance):
    image = smooth().convert(mode)
    image.save(tmp_path / name, **options)
    photo = read_photo(tmp_path / name)
    assert (photo.image.mode, photo.pages, photo.note) == (becomes, 1, "")
    assert difference(photo.image, image.convert(becomes)) <= tolerance


@pytest.mark.parametrize("values, expected, options", [
    (noise(np.uint16, 40, 50), noise(np.uint16, 40, 50), {"tile": (16, 16), "byteorder": ">"}),
    ((RAMP / 2).astype(np.int32), RAMP / 2, {}), ((RAMP * 100).astype(np.int32), RAMP, {}),
    (np.where(RAMP == 0, np.nan, RAMP * 15).astype(np.float32), RAMP, {}),
    (noise(np.uint16, 40, 50, 3), noise(np.uint16, 40, 50, 3) / 257, {"photometric": "rgb"})])
def test_16_bits_of_gray_are_kept_and_of_colour_noted(tmp_path, values, expected, options):
    tifffile.imwrite(tmp_path / "x.tif", values, **options)
    photo, colour = read_photo(tmp_path / "x.tif"), values.ndim == 3
    assert photo.image.mode == ("RGB" if colour else "I;16")
    assert ("16-bit" in photo.note) == colour
    assert difference(photo.image, expected) <= (options == {} or colour)


@pytest.mark.parametrize("orientation, turn", list(enumerate([None, 0, 3, 1, 5, 4, 6, 2], 1)))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "xmp.png"])
def test_the_orientation_is_applied_once(tmp_path, name, orientation, turn):
    # Image.Transpose: what turns the stored picture upright
    expected = smooth() if turn is None else smooth().transpose(Image.Transpose(turn))
    exif, info = Image.Exif(), PngImagePlugin.PngInfo()
    exif[ExifTags.Base.Orientation] = orientation
    info.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{orientation}"/>')
    smooth().save(tmp_path / name, **{"pnginfo": info} if name == "xmp.png" else {"exif": exif})
    photo = read_photo(tmp_path / name)
    write_photo(tmp_path / f"out_{name}", [photo.image], photo)
    for image in (photo.image, read_photo(tmp_path / f"out_{name}").image):
        assert image.size == expected.size and difference(image, expected, np.mean) < 5


def gamma_profile(gamma: float, space: bytes) -> bytes:
    """The ICC profile of sRGB with one gamma for its curve; of GRAY, or RGB."""
    curve, start = b"para" + bytes(8) + struct.pack(">i", round(gamma * 65536)), SRGB.index(b"para")
    icc = SRGB[:start] + curve + SRGB[start + len(curve):]
    return icc.replace(b"RGB ", space, 1).replace(b"rTRC", b"kTRC" if space == b"GRAY" else b"rTRC")


@pytest.mark.parametrize("mode, space, tolerance", [("L", b"GRAY", 1.01), ("I;16", b"GRAY", 400),
                                                    ("RGB", b"RGB ", 3)])
@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.2])
def test_colour_profiles_are_converted_to_srgb(tmp_path, mode, space, tolerance, gamma):
    image = Image.fromarray(RAMP.astype(np.uint16)) if mode == "I;16" else smooth(mode)
    image.save(tmp_path / "x.tif", icc_profile=gamma_profile(gamma, space))
    photo, top = read_photo(tmp_path / "x.tif"), 65535 if mode == "I;16" else 255
    light = (np.asarray(image) / top) ** gamma
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert (photo.image.mode, photo.note) == (mode, "")
    assert difference(photo.image, expected * top) <= tolerance


@pytest.mark.parametrize("name", ["y.png", "y.jpg", "y.tif", "y.webp", "y.avif"])
@pytest.mark.parametrize("source", ["x.png", "x.jpg", "x.tif", "x.webp"])
def test_metadata_and_alpha_go_from_any_format_to_any_other(tmp_path, source, name):
    image, alpha = smooth("RGBA"), noise(np.uint8, 40, 50)
    image.putalpha(Image.fromarray(alpha))
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[ExifTags.Base.Artist], exif[ExifTags.Base.DateTime] = "A. Person", "1931:05:04 10:00:00"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] = 400
    smooth().save(tmp_path / "camera.jpg", exif=exif)
    text.add_itxt("Title", "写真 фото")
    image.convert("RGB" if source == "x.jpg" else "RGBA").save(
        tmp_path / source, exif=Image.open(tmp_path / "camera.jpg").getexif(), dpi=(300, 300),
        pnginfo=text, lossless=True)
    photo = read_photo(tmp_path / source)
    assert source == "x.jpg" or difference(photo.alpha, alpha) == 0
    write_photo(tmp_path / name, [image], photo, "Colours by a test")
    written = Image.open(tmp_path / name)
    written.load()
    exif = written.getexif()
    assert [exif[ExifTags.Base[tag]] for tag in ("Artist", "DateTime", "ImageDescription")] \
        == ["A. Person", "1931:05:04 10:00:00", "Colours by a test"]
    assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] == 400
    assert "sRGB" in ImageCms.getProfileName(io.BytesIO(written.info["icc_profile"]))
    if name in ("y.png", "y.tif", "y.webp"):  # AVIF is lossy, JPEG has no alpha
        assert difference(written.getchannel("A"), alpha) == 0
    if source != "x.webp" and name in ("y.png", "y.jpg", "y.tif"):  # the others hold no DPI
        assert [round(x) for x in written.info["dpi"]] == [300, 300]
    assert (source, name) != ("x.png", "y.png") or written.text["Title"] == "写真 фото"


@pytest.mark.parametrize("place", ["y.txt", "y", "y.psd", "y.gif", "file.png/y.png", "folder.png",
                                   "y.webp", "x" * 300 + ".png"])
def test_a_place_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path, place):
    (tmp_path / "file.png").write_bytes(b"precious")
    (tmp_path / "folder.png").mkdir()
    wide = Image.new("RGB", (17000 if place == "y.webp" else 8, 2))  # too wide for a WebP
    photo = Photo(wide, None, {"exif": Image.Exif(), "dpi": None, "text": {}}, 1, "")
    with pytest.raises(ColorizeError, match=f"{place}: .*(no picture format|cannot be written)"):
        write_photo(tmp_path / place, [wide], photo)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.png", "folder.png"]
    assert (tmp_path / "file.png").read_bytes() == b"precious"


@pytest.mark.parametrize("damage", [
    {"exif": b"Exif\0\0garbage......."}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\xff\xff\1"},
    {"dpi": (1e7, 1e7)}, {"icc_profile": b"nonsense"}, {"icc_profile": gamma_profile(2, b"GRAY")}])
def test_damaged_metadata_cost_nothing_but_themselves(tmp_path, damage):
    smooth().save(tmp_path / "x.png", **damage)
    photo = read_photo(tmp_path / "x.png")
    assert difference(photo.image, smooth()) == 0 and photo.info["dpi"] is None
    assert ("profile" in photo.note) == ("icc_profile" in damage)
    if "dpi" in damage:  # more than a JPEG can hold
        photo.info["exif"][ExifTags.Base.Copyright] = "x" * 70000
    write_photo(tmp_path / "y.jpg", [photo.image], photo)
    smooth().save(tmp_path / "expected.jpg", quality=95, subsampling=0)
    assert difference(Image.open(tmp_path / "y.jpg"), Image.open(tmp_path / "expected.jpg")) == 0


def test_a_mutated_file_is_read_or_refused(tmp_path):
    """COLORIZE_FUZZ=2000 for a longer run."""
    names, outcomes = ["L.png", "P.png", "RGB.jpg", "L.tif", "RGB.webp", "RGB.bmp", "P.gif"], []
    for name in names:
        smooth(name.split(".")[0]).save(tmp_path / name)
    for seed in range(int(os.environ.get("COLORIZE_FUZZ", 100))):
        random = np.random.default_rng(seed)
        data = bytearray((tmp_path / names[seed % len(names)]).read_bytes())
        for place in random.integers(0, len(data), random.integers(1, 12)):
            data[place] = random.integers(256)
        if random.uniform() < 0.3:
            del data[random.integers(len(data)):]
        (tmp_path / "x.png").write_bytes(data)
        try:
            photo = read_photo(tmp_path / "x.png")
            assert photo.image.mode in ("L", "RGB", "I;16") and photo.image.width > 0, seed
            write_photo(tmp_path / "y.png", [photo.image.convert("RGB")], photo)
            outcomes.append(True)
        except ColorizeError as error:
            assert "\n" not in str(error), seed
            outcomes.append(False)
    assert 0.1 < np.mean(outcomes) < 0.9, "the mutations test nothing"


NO_PHOTOGRAPH = {
    "truncated": lambda path: [smooth("RGB", 400, 300).save(path), os.truncate(path, 2000)],
    "text": lambda path: path.write_text("no photograph\n" * 100),
    "postscript": lambda path: path.write_text(  # Pillow would run Ghostscript on it
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "empty": Path.touch, "folder": Path.mkdir, "pipe": os.mkfifo, "absent": Path.exists}


def test_more_megapixels_than_allowed_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    big = Image.new("1", (2000, 1000))
    Image.new("1", (8, 1)).save(tmp_path / "x.tif", save_all=True, append_images=[big])
    big.save(tmp_path / "x.png")
    assert read_photo(tmp_path / "x.tif", 0, max_megapixels=1).image.size == (8, 1)
    assert read_photo(tmp_path / "x.png", max_megapixels=2).image.size == (2000, 1000)
    monkeypatch.setattr(Image.Image, "load", None)
    for name, page in (("x.png", 0), ("x.tif", 1)):
        with pytest.raises(ColorizeError, match="1.9 megapixels.*--max_megapixels"):
            read_photo(tmp_path / name, page, max_megapixels=1.9)


# --------------------------------------------------------------------------- arrays and batches

def test_photographs_are_found_once_at_any_depth_in_any_case_and_script(tmp_path):
    names = ["b.JPG", "a.png", "deep/er/c.TiFf", "写真/сад é.webp", "with space/d.jpeg"]
    others = ["notes.txt", "h.eps", "noextension", ".hidden.png", ".folder/i.png", "movie.mpg"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for link, target in (("broken.png", "nothing"), ("linked.png", "a.png"),
                         ("deep/up", tmp_path), ("z", tmp_path / "deep")):
        (tmp_path / link).symlink_to(target)
    assert find_photos(tmp_path) == sorted(tmp_path / name for name in [*names, "linked.png"])


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


def test_what_cannot_teach_is_refused_left_out_and_named(tmp_path, capsys):
    for kind, make in NO_PHOTOGRAPH.items():
        path = tmp_path / "train" / f"{kind}.jpg"
        path.parent.mkdir(exist_ok=True)
        make(path)
        with pytest.raises(ColorizeError, match=rf"^{path}: .*\Z"):
            read_photo(path)
    for i, (kind, mode) in itertools.product(range(2), (("color", "RGB"), ("gray", "L"))):
        (tmp_path / "train" / kind).mkdir(exist_ok=True)  # as in sets with gray copies: no classes
        made_photo(i).convert(mode).convert("RGB").save(tmp_path / "train" / kind / f"{i}.jpg")
    made_photo(60, 63, 200).save(tmp_path / "train" / "tiny.png")
    train = prepare(tmp_path, val_fraction=1e-9)["train"]
    assert [name for name, *_ in train["photographs"]] == ["train/color/0.jpg", "train/color/1.jpg"]
    assert class_names(train) == []
    expected = {"under 64 pixels": ["tiny.png"], "without colour": ["gray/0.jpg", "gray/1.jpg"],
                "unreadable": ["empty.jpg", "postscript.jpg", "text.jpg", "truncated.jpg"]}
    assert train["left_out"] == {f"train/{name}": why for why in expected for name in expected[why]}
    assert "train: 4 left out, unreadable: train/empty.jpg, " in capsys.readouterr().err


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
    made_photo(1).convert("L").save(tmp_path / "train" / "gray.png")
    (tmp_path / "train" / "x.png").touch()
    with pytest.raises(ColorizeError, match=f"{tmp_path / 'train'}.*1 without col.*1 unreadable"):
        prepare(tmp_path, val_fraction=1e-9)
    made_photo(1).save(tmp_path / "train" / "y.png")
    free = SimpleNamespace(free=3 * SIDE * SIDE * 3 - 1)
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


def test_film_changes_the_lightness_alone_of_about_half(arrays):
    plain, film = (ColorizeData(arrays, train=True, film=film).__getitems__(range(24))[0]
                   for film in (False, True))
    assert torch.equal(plain[:, 1:], film[:, 1:])
    assert 5 <= (plain != film).flatten(1).any(dim=1).sum() <= 19
