"""Photographs in and out, colour, the terminal; references: scikit-image, numpy, tifffile."""

import contextlib
import errno
import functools
import inspect
import io
import itertools
import os
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import (EpsImagePlugin, ExifTags, Image, ImageCms, ImageFile, ImageFilter, ImageOps,
                 PngImagePlugin, TiffImagePlugin)
from skimage import color

import photo as photo_module
from colorize_data import find_photos, ordered_map, progress
from conftest import made_photo
from photo import (FORMATS, ColorizeError, Photo, check_target, decode_photo, in_gamut,
                  into_gamut, is_colored, lab_to_rgb, lightness, made_with, photos_in,
                  picture_sheet, printable, read_photo, rgb_to_lab, say, write_atomically,
                  write_photo)


# what Pillow says of damaged files; the project silences it, pytest brings it back
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL",
                                        "ignore::PIL.Image.DecompressionBombWarning")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RAMP = np.linspace(0, 65535, 2000).reshape(40, 50)
TAG = ExifTags.Base
MADE = f"{photo_module.MADE} by a test"
EMPTY = Photo(Image.new("L", (8, 2)), None, b"", None, "")


def noise(dtype, *shape) -> np.ndarray:
    """Seeded samples over the whole range of an integer type."""
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def smooth(mode="RGB", width=50, height=40) -> Image.Image:
    """Smooth colours, so that lossy formats stay close."""
    return made_photo(3, width, height).filter(ImageFilter.GaussianBlur(4)).convert(mode)


def difference(image, expected, of=np.max) -> float:
    return of(np.abs(np.asarray(image).astype(int) - np.asarray(expected)))


@pytest.mark.parametrize("rgb", [
    noise(np.uint8, 40, 50, 3), noise(np.uint16, 40, 50, 3),
    np.array(list(itertools.product([0, 1, 10, 11, 128, 254, 255], repeat=3)), np.uint8)])
def test_lab_is_that_of_scikit_image_and_back(rgb):
    lab = rgb_to_lab(rgb)
    assert np.abs(lab - color.rgb2lab(rgb / np.iinfo(rgb.dtype).max)).max() < 0.01
    vivid = lab * np.float32([1, 1.2, 1.2])  # some of it outside the gamut
    made = lab_to_rgb(vivid[..., 0], vivid[..., 1:])
    assert np.abs(made - color.lab2rgb(vivid.astype(float))).max() < 1e-4


@pytest.mark.parametrize("pixels", [noise(np.uint8, 40, 50), noise(np.uint16, 40, 50),
                                    noise(np.uint8, 40, 50, 3)])
def test_lightness_is_that_of_scikit_image(pixels):
    rgb = pixels / np.iinfo(pixels.dtype).max
    rgb = rgb if rgb.ndim == 3 else np.dstack([rgb] * 3)
    L = lightness(Image.fromarray(pixels))
    assert L.dtype == np.float32 and np.abs(L - color.rgb2lab(rgb)[..., 0]).max() < 0.01


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
    rgb = lab_to_rgb(L, result)
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
    assert (photo.image.mode, photo.note) == (becomes, "")
    assert difference(photo.image, image.convert(becomes)) <= tolerance


@pytest.mark.parametrize("values, expected, options", [
    (noise(np.uint16, 40, 50), noise(np.uint16, 40, 50), {"tile": (16, 16), "byteorder": ">"}),
    ((RAMP / 2).astype(np.int32), RAMP / 2, {}),
    (noise(np.uint16, 40, 50, 3), noise(np.uint16, 40, 50, 3) / 257, {"photometric": "rgb"}),
    (noise(np.uint16, 3, 40, 50), noise(np.uint16, 3, 40, 50).transpose(1, 2, 0) / 257,
     {"photometric": "rgb", "planarconfig": "separate", "compression": "zlib"})])
def test_16_bits_of_gray_are_kept_and_of_colour_noted(tmp_path, values, expected, options):
    tifffile.imwrite(tmp_path / "x.tif", values, **options)
    photo, colour = read_photo(tmp_path / "x.tif"), values.ndim == 3
    assert photo.image.mode == ("RGB" if colour else "I;16")
    assert ("16 bits were read as 8" in photo.note) == colour
    assert difference(photo.image, expected) <= (options == {} or colour)


@pytest.mark.parametrize("values", [
    (RAMP * 100).astype(np.int32), RAMP.astype(np.int16), RAMP.astype(np.float32),
    noise(np.uint16, 3, 40, 50), noise(np.uint16, 4, 40, 50)])  # planes: noise to Pillow
def test_pixels_whose_meaning_nobody_knows_are_refused(tmp_path, values):
    options = {"photometric": {3: "rgb", 4: "separated"}[len(values)],
               "planarconfig": "separate"} if values.ndim == 3 else {}
    tifffile.imwrite(tmp_path / "x.tif", values, **options)
    with pytest.raises(ColorizeError, match="x.tif: .*export it"):
        read_photo(tmp_path / "x.tif")


# Image.Transpose: what turns the stored picture upright
TURNS = list(enumerate([None, 0, 3, 1, 5, 4, 6, 2], 1))


@pytest.mark.parametrize("orientation, turn", TURNS)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "xmp.png"])
def test_the_orientation_is_applied_once(tmp_path, name, orientation, turn):
    expected = smooth() if turn is None else smooth().transpose(Image.Transpose(turn))
    exif, info = Image.Exif(), PngImagePlugin.PngInfo()
    exif[TAG.Orientation] = orientation
    inner = exif.get_ifd(ExifTags.IFD.Exif)
    inner[TAG.ExifImageWidth], inner[TAG.ExifImageHeight] = 50, 40
    info.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{orientation}"/>')
    options = {"pnginfo": info} if name == "xmp.png" else {"exif": exif.tobytes()}
    smooth().save(tmp_path / name, **options)
    photo = read_photo(tmp_path / name)
    write_photo(tmp_path / f"out_{name}", [photo.image], photo)
    for image in (photo.image, read_photo(tmp_path / f"out_{name}").image):
        assert image.size == expected.size and difference(image, expected, np.mean) < 5
    if name in ("x.jpg", "x.png"):
        inner = Image.open(tmp_path / f"out_{name}").getexif().get_ifd(ExifTags.IFD.Exif)
        assert not {TAG.ExifImageWidth, TAG.ExifImageHeight} & set(inner)  # no longer true


@pytest.mark.parametrize("orientation, turn", TURNS)
@pytest.mark.parametrize("mode", ["L", "I;16", "RGB"])
def test_tiffs_of_scanners_are_turned_upright_whatever_their_packing(
        tmp_path, mode, orientation, turn):
    image = Image.fromarray(RAMP.astype(np.uint16)) if mode == "I;16" else smooth(mode)
    expected = image if turn is None else image.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[TAG.Orientation] = orientation
    for packing in (None, "tiff_lzw"):
        image.save(tmp_path / "x.tif", exif=exif, compression=packing)
        photo = read_photo(tmp_path / "x.tif")
        assert photo.image.mode == mode and photo.image.size == expected.size
        assert difference(photo.image, expected) == 0


@pytest.mark.parametrize("tag, kind", [
    (TAG.ResolutionUnit, 1), (700, 2), (TAG.XResolution, 7), (ExifTags.IFD.GPSInfo, 1)])
def test_a_malformed_tag_does_not_keep_a_photograph_lying_on_its_side(tmp_path, tag, kind):
    """Bytes, text, anything where numbers belong; a block of EXIF made by hand."""
    fields = struct.pack("<HHIHH", TAG.Orientation, 3, 1, 6, 0), struct.pack("<HHI4s", tag, kind, 4, b"abc")
    if tag == ExifTags.IFD.GPSInfo:  # in it a latitude of bytes
        fields = (fields[0], struct.pack("<HHII", tag, 4, 1, 38),
                  struct.pack("<IHHHI4sI", 0, 1, 2, 1, 4, b"abc", 0))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(fields) + bytes(4)
    smooth().save(tmp_path / "x.png", exif=exif)
    photo = read_photo(tmp_path / "x.png")
    assert difference(photo.image, smooth().transpose(Image.Transpose.ROTATE_270)) == 0


def gamma_profile(gamma: float, space: bytes) -> bytes:
    """The ICC profile of sRGB with one gamma for its curve; of GRAY, or RGB."""
    curve, start = b"para" + bytes(8) + struct.pack(">i", round(gamma * 65536)), SRGB.index(b"para")
    icc = SRGB[:start] + curve + SRGB[start + len(curve):]
    return icc.replace(b"RGB ", space, 1).replace(b"rTRC", b"kTRC" if space == b"GRAY" else b"rTRC")


@pytest.mark.parametrize("mode, space, tolerance", [("L", b"GRAY", 1.01), ("I;16", b"GRAY", 1.01),
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


@pytest.mark.parametrize("name", ["y.png", "y.jpg", "y.tif", "y.webp"])
@pytest.mark.parametrize("source", ["x.png", "x.jpg", "x.tif", "x.webp", "x.avif"])
def test_metadata_and_alpha_go_from_any_format_to_any_other(tmp_path, source, name):
    image, alpha = smooth("RGBA"), noise(np.uint8, 40, 50)
    image.putalpha(Image.fromarray(alpha))
    exif = Image.Exif()
    exif[ExifTags.Base.Artist], exif[ExifTags.Base.DateTime] = "A. Person", "1931:05:04 10:00:00"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] = 400
    smooth().save(tmp_path / "camera.jpg", exif=exif)
    image.convert("RGB" if source == "x.jpg" else "RGBA").save(
        tmp_path / source, exif=Image.open(tmp_path / "camera.jpg").getexif(), dpi=(300, 300),
        lossless=True)
    photo = read_photo(tmp_path / source)
    assert source in ("x.jpg", "x.avif") or difference(photo.alpha, alpha) == 0
    write_photo(tmp_path / name, [image], photo, "Colours by a test")
    written = Image.open(tmp_path / name)
    written.load()
    exif = written.getexif()
    assert [exif[ExifTags.Base[tag]] for tag in ("Artist", "DateTime", "ImageDescription")] \
        == ["A. Person", "1931:05:04 10:00:00", "Colours by a test"]
    assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] == 400
    assert "sRGB" in ImageCms.getProfileName(io.BytesIO(written.info["icc_profile"]))
    if name != "y.jpg":  # which has no alpha
        assert difference(written.getchannel("A"), alpha) == 0
    if source not in ("x.webp", "x.avif") and name != "y.webp":  # these hold no DPI
        assert [round(x) for x in written.info["dpi"]] == [300, 300]


@pytest.mark.parametrize("place", ["y.txt", "y", "y.psd", "y.avif", "file.png/y.png", "folder.png",
                                   "y.webp", "x" * 300 + ".png"])
def test_a_place_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path, place):
    (tmp_path / "file.png").write_bytes(b"precious")
    (tmp_path / "folder.png").mkdir()
    wide = Image.new("RGB", (17000 if place == "y.webp" else 8, 2))  # too wide for a WebP
    with pytest.raises(ColorizeError, match=f"{place}: .*(no picture format|cannot be written)"):
        write_photo(tmp_path / place, [wide], EMPTY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.png", "folder.png"]
    assert (tmp_path / "file.png").read_bytes() == b"precious"


OVERLONG = Image.Exif()
OVERLONG[TAG.Copyright] = "x" * 70_000  # more than a JPEG can hold


@pytest.mark.parametrize("damage", [
    {"exif": b"Exif\0\0garbage......."}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\xff\xff\1"},
    {"exif": OVERLONG}, {"dpi": (1e7, 1e7)}, {"icc_profile": b"nonsense"},
    {"icc_profile": gamma_profile(2, b"GRAY")}])
def test_damaged_metadata_cost_nothing_but_themselves(tmp_path, damage):
    smooth().save(tmp_path / "x.png", **damage)
    photo = read_photo(tmp_path / "x.png")
    assert difference(photo.image, smooth()) == 0 and photo.dpi is None
    assert ("profile" in photo.note) == ("icc_profile" in damage)
    assert len(photo.exif) < 60_000
    assert write_photo(tmp_path / "y.jpg", [photo.image], photo, MADE) == ""
    assert made_with(tmp_path / "y.jpg") == MADE
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


NONE = "damaged, cut off, packed oddly, or none of JPEG"
NO_PHOTOGRAPH = {
    "truncated": (lambda path: [smooth("RGB", 400, 300).save(path, "JPEG"),
                                os.truncate(path, 2000)], NONE),
    "cut in its header": (lambda path: [smooth().save(path, "PNG"), os.truncate(path, 20)], NONE),
    "text": (lambda path: path.write_text("no photograph\n" * 100), NONE),
    "noise": (lambda path: path.write_bytes(noise(np.uint8, 999).tobytes()), NONE),
    "postscript": (lambda path: path.write_text(  # Pillow would run Ghostscript on it
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"), NONE),
    "container of postscript": (lambda path: path.write_bytes(  # IPTC: layers, sides, JPEG
        b"\x1c\3\x3c\0\2\1\0" b"\x1c\3\x14\0\2\0\x09" b"\x1c\3\x1e\0\2\0\x09" b"\x1c\3\x78\0\1\5"
        b"\x1c\x08\x0a\0\x35%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%End"), NONE),
    "link to nothing": (lambda path: path.symlink_to("nothing"), "No such file"),
    "link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "pipe or a device"),
    "empty": (Path.touch, NONE), "folder": (Path.mkdir, "it is a folder"),
    "pipe": (os.mkfifo, "pipe or a device"), "absent": (Path.exists, "No such file")}


@pytest.mark.parametrize("kind", NO_PHOTOGRAPH)
def test_what_is_no_photograph_is_told_in_a_users_words(tmp_path, kind):
    make, words = NO_PHOTOGRAPH[kind]
    path = tmp_path / "x.jpg"
    make(path)
    with pytest.raises(ColorizeError, match=rf"^{path}: .*{words}.*; .*\Z") as error:
        read_photo(path)
    assert "Error" not in str(error.value) and "0x" not in str(error.value)
    assert made_with(path) == ""


def test_only_formats_that_contain_no_others_are_opened():
    inner = {"IPTC", "EPS", "WMF", "ICO", "ICNS", "FITS", "HDF5", "BUFR", "GRIB", "MPEG"}
    assert not inner & set(FORMATS)


# ------------------------------------------------------------------------- bounds

@pytest.mark.parametrize("compression", [None, "zlib"])
def test_16_bit_scans_whose_zero_is_white_are_turned(tmp_path, compression):
    ramp = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", ramp, photometric="miniswhite", compression=compression)
    assert (np.asarray(read_photo(tmp_path / "x.tif").image) == 65535 - ramp).all()


def test_of_an_animation_the_first_picture_is_read_and_that_is_said(tmp_path):
    first, second = Image.new("L", (32, 32), 9), Image.new("L", (32, 32), 99)
    for name in ("x.gif", "x.webp", "x.png"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        photo = read_photo(tmp_path / name)
        assert np.asarray(photo.image.convert("L"))[5, 5] == pytest.approx(9, abs=2)
        assert photo.note == "the first picture of an animation"
        first.save(tmp_path / name)
        assert read_photo(tmp_path / name).note == ""


def test_a_result_that_another_program_has_changed_is_no_result(tmp_path):
    photo = EMPTY._replace(image=Image.new("RGB", (8, 8)))
    write_photo(tmp_path / "x.png", [photo.image], photo, MADE)
    assert made_with(tmp_path / "x.png") == MADE
    image = Image.open(tmp_path / "x.png")
    exif = image.getexif()
    exif[ExifTags.Base.Software] = "GIMP 2.10"
    image.save(tmp_path / "y.png", exif=exif)
    assert made_with(tmp_path / "y.png") == ""


def test_a_few_bytes_that_claim_many_pixels_are_refused(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "x.gif")
    data = bytearray((tmp_path / "x.gif").read_bytes())
    data[6:10] = (9000).to_bytes(2, "little") * 2  # the sides of its screen
    (tmp_path / "x.gif").write_bytes(data)
    with pytest.raises(ColorizeError, match="x.gif: 81 megapixels of next to no bytes"):
        read_photo(tmp_path / "x.gif")


def test_more_megapixels_than_allowed_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    big = Image.new("1", (2000, 1000))
    Image.new("1", (8, 1)).save(tmp_path / "x.tif", save_all=True, append_images=[big])
    big.save(tmp_path / "x.png")
    Image.new("L", (65_501, 1)).save(tmp_path / "wide.png")
    limit = functools.partial(photos_in, max_megapixels=1.9)
    with limit(tmp_path / "x.tif", first=True) as photos:
        assert [photo.image.size for photo in photos] == [(8, 1)]
    with photos_in(tmp_path / "x.png", max_megapixels=2) as photos:
        assert [photo.image.size for photo in photos] == [(2000, 1000)]
    monkeypatch.setattr(Image.Image, "load", None)
    for name in ("x.png", "x.tif"):
        with pytest.raises(ColorizeError, match="1.9 megapixels, pages together; .*--max_mega"):
            limit(tmp_path / name).__enter__()
    with pytest.raises(ColorizeError, match="65500 pixels wide or high"):
        read_photo(tmp_path / "wide.png")


def test_every_page_of_a_tiff_is_read_and_one_of_any_other_file(tmp_path):
    pages = [smooth("L", 40, 30), smooth("RGB", 50, 40), smooth("RGB", 50, 40).rotate(180),
             smooth("RGBA", 20, 20), Image.fromarray(RAMP.astype(np.uint16)), smooth("1", 40, 30)]
    for packing in (None, "tiff_lzw"):
        pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:],
                      compression=packing)
        with photos_in(tmp_path / "x.tif") as photos:
            pass
        assert [p.image.mode for p in photos] == ["L", "RGB", "RGB", "RGB", "I;16", "L"]
        for photo, page in zip(photos, pages):
            assert difference(photo.image, page.convert(photo.image.mode)) == 0
        assert difference(read_photo(tmp_path / "x.tif").image, pages[0]) == 0
    pages[1].save(tmp_path / "x.gif", save_all=True, append_images=[pages[2]])
    with photos_in(tmp_path / "x.gif") as photos:
        assert len(photos) == 1


def test_a_tiff_of_too_many_pages_is_refused_without_looking_at_all(tmp_path, monkeypatch):
    page, seeks, seek = Image.new("L", (8, 8)), [], TiffImagePlugin.TiffImageFile.seek
    page.save(tmp_path / "x.tif", save_all=True, append_images=[page] * 40)
    with photos_in(tmp_path / "x.tif") as photos:
        assert len(photos) == 41
    monkeypatch.setattr(photo_module, "MAX_PAGES", 20)
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "seek",
                        lambda self, n: seeks.append(n) or seek(self, n))
    with pytest.raises(ColorizeError, match="over 20 pages"):
        photos_in(tmp_path / "x.tif").__enter__()
    assert max(seeks) == 20


def test_threads_together_hold_no_more_than_the_budget_and_all_get_their_turn(
        tmp_path, monkeypatch):
    """To the end of their blocks: a result takes as much memory as decoding does."""
    monkeypatch.setattr(photo_module, "MAX_MEGAPIXELS", 6)
    monkeypatch.setattr(photo_module, "MEGAPIXELS", threading.Semaphore(6))
    inside, most, lock = [0], [0], threading.Lock()

    def hold(rows):
        with photos_in(tmp_path / f"{rows}.png") as (photo,):
            share = min(photo.image.width * photo.image.height / 1e6, 6)
            with lock:
                inside[0] += share
                most[0] = max(most[0], inside[0])
            time.sleep(0.002)
            with lock:
                inside[0] -= share
        return rows
    sizes = [5900, 200, 2900, 2900, 9000, 5]
    for rows in sizes:
        Image.new("1", (1000, rows)).save(tmp_path / f"{rows}.png")
    assert list(ordered_map(hold, sizes * 6, 8)) == sizes * 6
    assert 3 < most[0] <= 6
    with pytest.raises(KeyError), photos_in(tmp_path / "5900.png"):
        raise KeyError
    assert hold(9000) == 9000  # what failed has given its room back


def test_a_photograph_for_training_is_reduced_while_it_is_read(tmp_path):
    smooth("RGB", 700, 500).save(tmp_path / "x.jpg")
    for at_least, size in ((120, (175, 125)), (300, (700, 500))):
        with photos_in(tmp_path / "x.jpg", at_least=at_least) as (photo,):
            assert photo.image.size == size


# ------------------------------------------------------------------------- folders

def test_photographs_are_found_once_at_any_depth_in_any_case_and_script(tmp_path, capsys):
    names = ["b.JPG", "a.png", "deep/er/c.TiFf", "写真/сад é.webp", "with space/d.jpeg"]
    others = ["notes.txt", "h.svg", "noextension", ".hidden.png", ".folder/i.png", "movie.mpg"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    links = {"broken.png": "nothing", "linked.png": "a.png", "deep/up": tmp_path,
             "z": tmp_path / "deep", "own.png": "own.png"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    assert find_photos(tmp_path) == sorted(tmp_path / name for name in names)
    said = capsys.readouterr().err
    assert f"{len(links)} passed over, link: {tmp_path}" in said
    assert f"5 passed over, no format that can be read: {tmp_path}" in said


def test_what_is_passed_over_is_told(tmp_path, monkeypatch, capsys):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for path in (inside / "a.png", inside / "b.HEIC", inside / "c" / "d.nef", outside / "e.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (inside / "link.png").symlink_to(outside / "e.png")
    (inside / "folder").symlink_to(outside)
    (inside / "locked").mkdir()
    listdir = os.listdir

    def refusing(path):
        if Path(path).name == "locked":  # tests may run as root, whom nothing refuses
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)
    monkeypatch.setattr(os, "listdir", refusing)
    assert find_photos(inside) == [inside / "a.png"]
    assert sorted(capsys.readouterr().err.splitlines()) == [
        f"1 passed over, cannot be read: Permission denied: {inside / 'locked'}",
        f"2 passed over, link: {inside / 'folder'}, {inside / 'link.png'}",
        f"2 passed over, no format that can be read: {inside / 'b.HEIC'}, {inside / 'c' / 'd.nef'}"]
    (tmp_path / "door").symlink_to(inside)  # what the user names is what the user means
    assert find_photos(tmp_path / "door") == [tmp_path / "door" / "a.png"]


def test_folders_deeper_than_python_calls_itself_are_read(tmp_path):
    (tmp_path / "/".join("a" * 120)).mkdir(parents=True)
    (tmp_path / "/".join("a" * 120) / "x.png").touch()
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack()) + 90)
        found = find_photos(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert [path.name for path in found] == ["x.png"]


# ------------------------------------------------------------------------- results

@pytest.mark.parametrize("name", ["y.png", "y.jpg", "y.tif", "y.webp", "deep.tif"])
def test_a_result_says_so_in_its_header_and_is_the_same_bytes_again(tmp_path, monkeypatch, name):
    smooth().save(tmp_path / name)
    assert made_with(tmp_path / name) == ""
    photo = read_photo(tmp_path / name)
    before = photo.exif
    image = noise(np.uint16, 40, 50, 3) if name == "deep.tif" else smooth()
    made = f"{photo_module.MADE} 1.0, size 256"
    write_photo(tmp_path / name, [image], photo, made)
    first = (tmp_path / name).read_bytes()
    write_photo(tmp_path / name, [image], photo, made)
    assert (tmp_path / name).read_bytes() == first and photo.exif == before
    again = read_photo(tmp_path / name)  # a result that is coloured again
    write_photo(tmp_path / name, [image], again, made.replace("256", "512"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert made_with(tmp_path / name) == made.replace("256", "512")


def test_the_profile_in_a_result_does_not_hold_the_time():
    assert struct.unpack(">6H", photo_module.SRGB[24:36]) == (2000, 1, 1, 0, 0, 0)
    assert photo_module.SRGB[36:] == SRGB[36:]


def test_what_programs_wrote_for_themselves_is_not_kept_and_what_people_wrote_is(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", RAMP.astype(np.uint16))  # {"shape": [40, 50]}
    photo = read_photo(tmp_path / "a.tif")
    pixels = noise(np.uint16, 40, 50, 3)
    write_photo(tmp_path / "b.tif", [pixels], photo, "ours")
    assert np.array_equal(tifffile.imread(tmp_path / "b.tif"), pixels)
    assert Image.open(tmp_path / "b.tif").getexif()[TAG.ImageDescription] == "ours"
    exif = Image.Exif()
    exif[TAG.ImageDescription] = "Grandmother, 1931"
    smooth().save(tmp_path / "c.png", exif=exif)
    write_photo(tmp_path / "d.png", [smooth()], read_photo(tmp_path / "c.png"), "ours")
    words = Image.open(tmp_path / "d.png").getexif()[TAG.ImageDescription]
    assert words == "Grandmother, 1931; ours"


def test_16_bit_results_keep_the_texts_of_the_exif(tmp_path):
    exif = Image.Exif()
    exif[TAG.Artist], exif[TAG.ImageDescription] = "Ä. Person", "Großmutter"
    photo = EMPTY._replace(exif=exif.tobytes(), dpi=(300, 240))
    pixels = noise(np.uint16, 40, 50, 3)
    write_photo(tmp_path / "x.tif", [pixels], photo, "ours")
    assert np.array_equal(tifffile.imread(tmp_path / "x.tif"), pixels)
    tags = Image.open(tmp_path / "x.tif").tag_v2
    written = Image.Exif()
    written.load(exif.tobytes())  # as Pillow wrote it: its own ASCII
    assert tags[TAG.Artist] == written[TAG.Artist]
    assert tags[TAG.ImageDescription] == written[TAG.ImageDescription] + "; ours"
    assert (tags[TAG.XResolution], tags[TAG.YResolution]) == (300, 240)
    assert tags[TAG.InterColorProfile] == photo_module.SRGB


def test_transparency_that_a_format_cannot_hold_is_told(tmp_path):
    for name in ("x.jpg", "x.png", "x.tif", "x.webp"):
        lost = write_photo(tmp_path / name, [smooth("RGBA")], EMPTY)
        assert ("transparency" in lost) == (name == "x.jpg")


@pytest.mark.parametrize("place, words", [
    ("x.gif", "no picture format"), ("y" * 252 + ".png", "255 bytes"),
    ("é" * 126 + ".png", "255 bytes"), ("taken.png", "it is a folder"),
    ("file/x.png", "file is none"), ("file/deeper/x.png", "file is none")])
def test_what_cannot_be_written_is_said_before_the_work(tmp_path, place, words):
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ColorizeError, match=f"{place}: .*{words}") as error:
        check_target(tmp_path / place)
    assert "space" not in str(error.value)
    for good in ("x.png", "new/folder/x.tif", "y" * 251 + ".png"):
        assert check_target(tmp_path / good) in ("PNG", "TIFF")
    write_photo(tmp_path / ("y" * 251 + ".png"), [smooth()], EMPTY)


# --------------------------------------------------------------------- gray, toned, coloured

def test_sepia_and_cyanotype_are_toned_and_real_colours_are_not():
    gray = smooth("L", 300, 200)
    toned = [ImageOps.colorize(gray, *colors) for colors in (
        ("#201408", "#f0e0c0"), ("#0a2540", "#f4f8ff"), ("#2a1a08", "#fff8e8"))]
    for image in toned:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=75)  # whose blocks vary a little
        assert not is_colored(Image.open(file))
    assert not is_colored(gray) and not is_colored(gray.convert("RGB"))
    assert not is_colored(Image.fromarray(RAMP.astype(np.uint16)))
    samples = find_photos(Path(__file__).parent.parent / "data" / "input" / "val")
    assert [is_colored(read_photo(path).image) for path in samples] == [True] * len(samples)


# ------------------------------------------------------------------------- the terminal

class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(text: str) -> list[str]:
    """The lines that a terminal shows of what was written to it."""
    return [re.split("\r\x1b\\[K", line)[-1] for line in text.split("\n")]


def test_a_bar_ends_with_its_last_item_and_lines_of_threads_stand_above_it(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    clock = itertools.count(0, 0.3)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))

    def work(n):
        say(f"line {n}" + "x" * 200)
        return n
    for _ in progress(ordered_map(work, range(40), 8), 40, "photographs"):
        pass
    *lines, bar, end = shown(sys.stderr.getvalue())
    assert sorted(lines) == sorted(f"line {n}" + "x" * 200 for n in range(40))
    assert bar == "photographs: 40/40, 0:00:00 left" and end == ""
    assert "photographs: 10/40, 0:00:09 left" in sys.stderr.getvalue()


def test_without_a_terminal_a_bar_is_a_line_every_10_seconds(monkeypatch, capsys):
    clock = itertools.count(0, 3)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(progress("abcdefghi", 9, "x")) == list("abcdefghi")
    assert capsys.readouterr().err == ("x: 4/9, 0:00:15 left\nx: 8/9, 0:00:03 left\n"
                                       "x: 9/9, 0:00:00 left\n")


def test_what_could_steer_a_terminal_is_escaped(capsys):
    assert printable("a\x1b[2J\r\n\u202eb\udcff写真é ") == \
        "a\\x1b[2J\\r\\n\\u202eb\\udcff写真é "
    say("one\ntwo")
    say("result", result=True)
    assert capsys.readouterr() == ("result\n", "one\\ntwo\n")


# ------------------------------------------------------------------------- atomic writing

def test_an_error_cancels_what_has_not_begun():
    begun = []

    def work(n):
        begun.append(n)
        time.sleep(0.01)
        return 1 / n
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(work, range(60), 2))
    assert len(begun) < 20


def test_threads_that_write_the_same_name_do_not_write_the_same_file(tmp_path):
    """The last wins, whole; train.py finds what a killed process left by this pattern."""
    seen, both = [], threading.Barrier(2)

    def write(path):
        seen.append(path)
        both.wait(10)
        path.write_text("whole")
    list(ordered_map(lambda n: write_atomically(tmp_path / "last.tar", write), range(2), 2))
    assert len(set(seen)) == 2 and all(path.match(".last.tar.*.part") for path in seen)
    assert [path.name for path in tmp_path.iterdir()] == ["last.tar"]


@pytest.mark.parametrize("number, remedy", [(errno.ENOSPC, "full.*; free some space"),
                                            (errno.EROFS, "[Rr]ead-only.*; name another place")])
def test_only_a_full_disk_asks_for_space(tmp_path, number, remedy):
    def write(path):
        path.touch()
        raise OSError(number, os.strerror(number))
    with pytest.raises(ColorizeError, match=remedy):
        write_atomically(tmp_path / "x", write)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_cleared_and_what_others_write_is_not(tmp_path):
    """At the first write into a folder, of whatever name."""
    seen, dead = [], subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write_atomically(tmp_path / "names" / "train.npy", lambda path: seen.append(path.name)
                     or path.touch())
    own = seen[0]  # of a process that lives
    stays = [own, own.replace(photo_module.HOST, "elsewhere"), ".x.part", ".a-1-1.part",
             own.replace(str(os.getpid()), "x"), "train.npy.part"]
    for name in [*stays, own.replace(str(os.getpid()), str(dead.pid))]:
        (tmp_path / name).touch()
    write_atomically(tmp_path / "a.png", Path.touch)
    assert {path.name for path in tmp_path.iterdir()} == {*stays, "a.png", "names"}


@pytest.mark.parametrize("top, said", [(0, False), (1000, True), (4095, True), (4096, False)])
@pytest.mark.parametrize("name", ["x.tif", "x.png"])
def test_12_bit_values_in_16_bits_come_as_they_are_and_it_is_said_that_they_are_dark(
        tmp_path, name, top, said):
    values = np.linspace(0, top, 2000).reshape(40, 50).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    photo = read_photo(tmp_path / name)
    assert np.array_equal(photo.image, values) and ("4095" in photo.note) == said


@pytest.mark.parametrize("packing", [1, 8])
def test_a_tiff_that_packs_12_bits_says_what_is_white(tmp_path, packing):
    values = np.linspace(0, 4095, 2000).astype(np.uint16)
    pairs = (values[::2].astype(int) << 12 | values[1::2]).astype(">u4").view(np.uint8)
    data = pairs.reshape(-1, 4)[:, 1:].tobytes()  # two in three bytes
    data = data if packing == 1 else zlib.compress(data)
    tags = {256: 50, 257: 40, 258: 12, 259: packing, 262: 1, 273: 8, 277: 1, 278: 40,
            279: len(data)}
    content = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    content += b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in tags.items()) + bytes(4)
    (tmp_path / "x.tif").write_bytes(content)
    photo = read_photo(tmp_path / "x.tif")
    assert photo.image.mode == "I;16" and photo.note == ""
    assert difference(photo.image, values.reshape(40, 50) / 4095 * 65535) <= 1


def test_12_bit_values_where_zero_is_white_are_said_too(tmp_path):
    values = np.linspace(0, 4095, 2000).reshape(40, 50).astype(np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="miniswhite")
    photo = read_photo(tmp_path / "x.tif")
    assert np.array_equal(photo.image, 65535 - values) and "times 16" in photo.note


@pytest.mark.parametrize("kind", ["postscript", "container of postscript"])
def test_no_reader_of_programs_is_even_asked(tmp_path, monkeypatch, kind):
    """Where Ghostscript is not installed the message alone would be the same."""
    asked = []
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "_open", lambda eps: asked.append(eps))
    NO_PHOTOGRAPH[kind][0](tmp_path / "x.jpg")
    with contextlib.suppress(Exception), Image.open(tmp_path / "x.jpg") as image:
        image.load()  # as Pillow would, unasked
    assert asked and asked.clear() is None
    with pytest.raises(ColorizeError):
        read_photo(tmp_path / "x.jpg")
    assert not asked


def test_a_sheet_is_cut_to_its_pictures_row_by_row():
    wide, high = Image.new("RGB", (90, 30), "red"), Image.new("L", (30, 60), 0)
    sheet = picture_sheet([wide, wide, high, wide], 2, ["a", "b", "c", "d"], 60)
    pixels = np.asarray(sheet)
    assert sheet.size == (2 * 64 + 4, (20 + 20) + (60 + 20) + 4)  # a wide one is 60 x 20
    red, black = (pixels == [255, 0, 0]).all(axis=2), (pixels == 0).all(axis=2)
    assert red[:24].sum() == 2 * 60 * 20 and red[44:].sum() == 60 * 20
    assert black[44:104].sum() == 30 * 60


@pytest.mark.parametrize("name", ["y.png", "y.jpg", "y.tif", "y.webp", "deep.tif"])
@pytest.mark.parametrize("source", ["x.png", "x.jpg", "x.tif"])
def test_captions_keep_their_letters_byte_by_byte(tmp_path, source, name):
    """Others write UTF-8 into EXIF, or Latin-1; also when a result is coloured again."""
    exif, words = Image.Exif(), "Großmutter, 写真".encode()
    exif[TAG.ImageDescription], exif[TAG.Artist] = words, "Jörg".encode("latin-1")
    smooth("L").save(tmp_path / source, exif=exif)
    image = noise(np.uint16, 40, 50, 3) if name == "deep.tif" else smooth()
    for path in (tmp_path / source, tmp_path / name):
        write_photo(tmp_path / name, [image], read_photo(path), MADE)
    content = (tmp_path / name).read_bytes()
    assert content.count(words + b"; " + MADE.encode() + b"\0") == content.count(b"Gro") == 1
    assert Image.open(tmp_path / name).getexif()[TAG.Artist] == "Jörg"
    assert made_with(tmp_path / name) == MADE


@pytest.mark.parametrize("exposure", [True, False])
def test_what_a_16_bit_result_cannot_hold_of_the_exif_is_said(tmp_path, exposure):
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "A. Nother"
    if exposure:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.01
    Image.new("I;16", (20, 10), 9000).save(tmp_path / "x.png", exif=exif)
    pages = [np.zeros((10, 20, 3), np.uint16)]
    lost = write_photo(tmp_path / "y.tif", pages, read_photo(tmp_path / "x.png"))
    assert lost == ("exposure and GPS data were left out of the 16-bit TIFF" if exposure else "")
    assert Image.open(tmp_path / "y.tif").getexif()[ExifTags.Base.Artist] == "A. Nother"


@pytest.mark.parametrize("words", ["The bridge, 1911", "Мост, Jörg"])
def test_the_text_of_a_png_that_describes_it_stays(tmp_path, words):
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("Description", words)
    Image.new("L", (20, 10), 90).save(tmp_path / "x.png", pnginfo=texts)
    photo = read_photo(tmp_path / "x.png")
    write_photo(tmp_path / "y.png", [photo.image.convert("RGB")], photo, "coloured")
    description = Image.open(tmp_path / "y.png").getexif()[ExifTags.Base.ImageDescription]
    assert description.encode("latin-1").decode() == f"{words}; coloured"  # EXIF's are bytes


def test_of_a_cameras_exif_nothing_stays_that_is_no_longer_true(tmp_path):
    exif, gps = Image.Exif(), ExifTags.IFD.GPSInfo
    exif[ExifTags.IFD.Exif] = {TAG.ISOSpeedRatings: 400, TAG.ColorSpace: 2, TAG.MakerNote: b"x" * 99,
                               ExifTags.IFD.Interop: {1: "R03", 2: b"0100"}}  # Adobe RGB, twice
    smooth("L").save(tmp_path / "x.jpg", exif=exif)
    photo = read_photo(tmp_path / "x.jpg")
    write_photo(tmp_path / "y.jpg", [photo.image.convert("RGB")], photo)
    made = Image.open(tmp_path / "y.jpg").getexif()
    assert made.get_ifd(ExifTags.IFD.Exif) == {TAG.ISOSpeedRatings: 400}
    assert gps not in made  # there was none, nor is there an empty one


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_an_image_in_memory_keeps_its_own_exif(tmp_path, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Copyright] = 6, "A. Nother"
    Image.new("L", (40, 20), 90).save(tmp_path / f"x.{suffix}", exif=exif)
    image = Image.open(tmp_path / f"x.{suffix}")
    before = dict(image.getexif())
    for _ in range(2):
        photo = decode_photo(image)
        assert photo.image.size == (20, 40) and b"A. Nother" in photo.exif
    assert dict(image.getexif()) == before


def test_thumbnails_and_pyramids_of_a_tiff_are_no_pages(tmp_path):
    values = np.arange(0, 60000, 10, dtype=np.uint16).reshape(60, 100)
    with tifffile.TiffWriter(tmp_path / "x.tif") as file:
        file.write(values)
        file.write(values[::2, ::2], subfiletype=1)  # reduced
        file.write(values[:50], subfiletype=2)  # one page of several
    with photos_in(tmp_path / "x.tif") as photos:
        assert [photo.image.size for photo in photos] == [(100, 60), (100, 50)]
        assert np.array_equal(photos[0].image, values)


def test_a_thumbnail_beyond_the_most_pages_does_not_hide_those_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(photo_module, "MAX_PAGES", 2)
    page = np.zeros((20, 30), np.uint8)
    with tifffile.TiffWriter(tmp_path / "x.tif") as file:
        for kind in (0, 0, 1, 0):
            file.write(page, subfiletype=kind)
    with pytest.raises(ColorizeError, match="over 2 pages"), photos_in(tmp_path / "x.tif"):
        pass


def test_a_16_bit_tiff_has_no_resolution_that_the_photograph_had_not(tmp_path):
    Image.new("I;16", (20, 10), 9000).save(tmp_path / "x.png")
    write_photo(tmp_path / "y.tif", [np.zeros((10, 20, 3), np.uint16)],
                read_photo(tmp_path / "x.png"))
    assert read_photo(tmp_path / "y.tif").dpi is None
