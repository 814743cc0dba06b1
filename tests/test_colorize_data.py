"""Photographs in and out, colour, arrays and batches; references: scikit-image, numpy, Pillow."""

import errno
import io
import itertools
import json
import os
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms, ImageFilter, ImageOps, PngImagePlugin, features
from skimage import color

import colorize_data
from colorize_data import (SIDE, ColorizeData, ColorizeError, Photo, as_is, class_names, decode_lab,
                           encode_lab, film_lightness, find_photos, gray_to_L, in_gamut, into_gamut,
                           lab_to_linear, lab_to_rgb, linear_to_srgb, ordered_map, picture_sheet,
                           prepare, progress, read_photo, rgb_to_lab, write_photo, write_whole)
from conftest import made_photo

# what Pillow says of damaged files; the project silences it, pytest brings it back
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL",
                                        "ignore::PIL.Image.DecompressionBombWarning")
RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (40, 50, 3), dtype=np.uint8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


# ------------------------------------------------------------------------------------- colour

@pytest.mark.parametrize("rgb", [
    RGB, RGB / np.float64(255), RGB.astype(np.uint16) * 257,
    np.array(list(itertools.product([0, 1, 10, 11, 128, 254, 255], repeat=3)), np.uint8)])
def test_rgb_to_lab_is_that_of_scikit_image(rgb):
    top = np.iinfo(rgb.dtype).max if rgb.dtype.kind == "u" else 1
    lab = rgb_to_lab(rgb)
    assert lab.dtype == np.float32
    assert np.abs(lab - color.rgb2lab(rgb.astype(np.float64) / top)).max() < 0.01


def test_lab_to_rgb_is_that_of_scikit_image_also_outside_the_gamut():
    lab = RANDOM.uniform([0, -100, -100], [100, 100, 100], (5000, 3)).astype(np.float32)
    rgb = lab_to_rgb(lab)
    assert rgb.dtype == np.float32
    with pytest.warns(UserWarning, match="negative Z"):
        expected = color.lab2rgb(lab.astype(np.float64))
    assert np.abs(rgb - expected).max() < 1e-4


def test_storage_loses_at_most_half_a_unit():
    lab = rgb_to_lab(RGB)
    stored = encode_lab(lab)
    assert stored.dtype == np.uint8
    assert np.abs(decode_lab(stored) - lab).max() <= 0.5 + 1e-4


def test_a_tensor_is_decoded_as_an_array_is():
    stored = RANDOM.integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    tensor = decode_lab(torch.from_numpy(stored).permute(0, 3, 1, 2))
    assert tensor.dtype == torch.float32
    assert np.allclose(tensor.permute(0, 2, 3, 1).numpy(), decode_lab(stored), atol=1e-5)


@pytest.mark.parametrize("gray", [np.arange(256, dtype=np.uint8), np.arange(65536, dtype=np.uint16),
                                  np.linspace(0, 1, 1000)])
def test_L_of_gray_is_that_of_equal_channels(gray):
    top = np.iinfo(gray.dtype).max if gray.dtype.kind == "u" else 1
    expected = color.rgb2lab(np.repeat(gray[:, None] / top, 3, axis=1))[:, 0]
    L = gray_to_L(gray)
    assert L.dtype == np.float32 and np.abs(L - expected).max() < 0.01


def linear(L, ab):
    """Linear sRGB of Lab by the textbook, in float64: the reference for the gamut."""
    fy = (L + 16) / 116
    f = np.stack([fy + ab[..., 0] / 500, fy, fy - ab[..., 1] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f ** 3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.95047, 1, 1.08883]
    return xyz @ np.linalg.inv(color.colorconv.xyz_from_rgb).T


def test_colours_outside_the_gamut_keep_lightness_and_hue_and_land_on_its_edge():
    L = RANDOM.uniform(2, 98, 2000).astype(np.float32)
    ab = RANDOM.uniform(-110, 110, (2000, 2)).astype(np.float32)
    result = into_gamut(L, ab)
    outside = ~in_gamut(L, ab)
    assert 0.3 < outside.mean() < 1
    assert np.array_equal(result[~outside], ab[~outside])
    assert (linear(L, result) > -3e-4).all() and (linear(L, result) < 1 + 3e-4).all()
    scale = (result * ab).sum(axis=1) / (ab ** 2).sum(axis=1)
    assert np.abs(result - scale[:, None] * ab).max() < 1e-3, "the hue has changed"
    assert (scale[outside] < 1).all() and (scale > 0).all()
    further = scale[outside, None] * 1.02 * ab[outside]  # closed form: on the edge, no nearer
    values = linear(L[outside], further)
    assert ((values < 0) | (values > 1)).any(axis=1).mean() > 0.98
    back = color.rgb2lab(lab_to_rgb(np.concatenate([L[:, None], result], axis=1)).astype(float))
    assert np.abs(back[:, 0] - L).max() < 0.1


@pytest.mark.parametrize("rgb", [(0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 0, 1), (0, 1, 0), (1, 1, 0)])
def test_the_corners_of_srgb_are_in_gamut(rgb):
    lab = rgb_to_lab(np.array(rgb, np.float64))
    assert in_gamut(lab[0], lab[1:])


def test_linear_light_round_trips():
    srgb = np.linspace(0, 1, 999, dtype=np.float32)
    assert np.abs(linear_to_srgb(colorize_data.srgb_to_linear(srgb)) - srgb).max() < 1e-5
    assert lab_to_linear(np.float32(50), np.zeros(2, np.float32)).shape == (3,)


# ------------------------------------------------------------------------------------- reading

def smooth(mode="RGB", width=50, height=40) -> Image.Image:
    """Smooth colours, so that lossy formats stay close."""
    return made_photo(3, width, height).filter(ImageFilter.GaussianBlur(4)).convert(mode)


def difference(image, expected) -> int:
    return np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max()


@pytest.mark.parametrize("mode, becomes", [("1", "L"), ("L", "L"), ("LA", "L"), ("P", "RGB"),
                                           ("RGB", "RGB"), ("RGBA", "RGB"), ("CMYK", "RGB"),
                                           ("YCbCr", "RGB"), ("I;16", "I;16"), ("I", "I;16")])
def test_every_mode_of_pillow_is_read(tmp_path, mode, becomes):
    if mode in ("I;16", "I"):
        image = Image.fromarray((np.asarray(smooth("L")).astype(np.uint16) * 257 + 3).astype(
            np.uint16 if mode == "I;16" else np.int32))
    else:
        image = smooth().convert(mode)
    path = tmp_path / "x.tif"
    image.save(path)
    photo = read_photo(path)
    assert (photo.image.mode, photo.image.size, photo.pages) == (becomes, image.size, 1)
    expected = image if mode in ("I;16", "I") else image.convert(becomes)
    assert difference(photo.image, expected) <= (2 if mode == "YCbCr" else 0)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
def test_alpha_is_set_aside_exactly(tmp_path, mode, name):
    if mode == "PA" and name != "x.png":
        pytest.skip("palettes with alpha are PNG's")
    alpha = Image.fromarray(RGB[..., 0].copy())
    image = smooth()
    image.putalpha(alpha)
    (image.quantize(16) if mode == "PA" else image.convert(mode)).save(
        tmp_path / name, **{"lossless": True} if name == "x.webp" else {})
    photo = read_photo(tmp_path / name)
    assert photo.image.mode == ("L" if mode == "LA" and name != "x.webp" else "RGB")
    assert photo.alpha.mode == "L"
    assert mode == "PA" or difference(photo.alpha, alpha) == 0


@pytest.mark.parametrize("mode, transparent", [("P", 0), ("L", 7), ("RGB", (1, 2, 3)), ("1", 0)])
def test_a_transparent_colour_of_a_png_becomes_alpha(tmp_path, mode, transparent):
    image = Image.new(mode, (8, 8), 1 if mode in "P1" else 0)
    image.paste(transparent, (0, 0, 4, 8))
    image.save(tmp_path / "x.png", transparency=transparent)
    photo = read_photo(tmp_path / "x.png")
    assert photo.image.mode in ("L", "RGB")
    assert np.array_equal(np.asarray(photo.alpha), np.repeat([[0] * 4 + [255] * 4], 8, axis=0))


@pytest.mark.parametrize("name, options, tolerance", [
    ("x.png", {}, 0), ("x.jpg", {"quality": 98, "subsampling": 0}, 8), ("x.tif", {}, 0),
    ("x.tif", {"compression": "tiff_lzw"}, 0), ("x.tif", {"compression": "tiff_deflate"}, 0),
    ("x.bmp", {}, 0), ("x.ppm", {}, 0), ("x.tga", {}, 0), ("x.gif", {}, 40),
    ("x.webp", {"lossless": True}, 0), ("x.jp2", {}, 0), ("x.avif", {"quality": 98}, 10)])
def test_every_format_is_read(tmp_path, name, options, tolerance):
    needs = {"x.jp2": "jpg_2000", "x.avif": "avif", "x.webp": "webp"}.get(name)
    if needs and not features.check(needs):
        pytest.skip(f"this Pillow has no {needs}")
    smooth().save(tmp_path / name, **options)
    photo = read_photo(tmp_path / name)
    assert photo.image.mode == "RGB"
    assert difference(photo.image, smooth()) <= tolerance


@pytest.mark.parametrize("options", [{"tile": (16, 16)}, {"rowsperstrip": 7},
                                     {"byteorder": ">"}, {"byteorder": "<"}])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiled_and_striped_tiffs_of_8_and_16_bit_gray_are_read_exactly(tmp_path, options, dtype):
    gray = RANDOM.integers(0, np.iinfo(dtype).max, (40, 50)).astype(dtype)
    tifffile.imwrite(tmp_path / "x.tif", gray, **options)
    photo = read_photo(tmp_path / "x.tif")
    assert photo.image.mode == ("L" if dtype == np.uint8 else "I;16")
    assert np.array_equal(np.asarray(photo.image), gray)


def png(rows: np.ndarray, color_type: int) -> bytes:
    """A 16-bit PNG of big-endian samples, by the specification (Pillow writes none in colour)."""
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)
            + chunk(b"IEND", b""))


@pytest.mark.parametrize("name", ["x.png", "x.pgm"])
def test_16_bit_gray_keeps_every_value(tmp_path, name):
    gray = RANDOM.integers(0, 65536, (40, 50)).astype(np.uint16)
    (tmp_path / name).write_bytes(png(gray, 0) if name == "x.png"
                                  else b"P5 50 40 65535\n" + gray.astype(">u2").tobytes())
    photo = read_photo(tmp_path / name)
    assert photo.image.mode == "I;16" and photo.note == ""
    assert np.array_equal(np.asarray(photo.image), gray)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.ppm"])
def test_16_bit_colour_is_read_as_8_bit_and_says_so(tmp_path, name):
    deep = RANDOM.integers(0, 65536, (40, 50, 3)).astype(np.uint16)
    if name == "x.tif":
        tifffile.imwrite(tmp_path / name, deep, photometric="rgb")
    else:
        (tmp_path / name).write_bytes(png(deep, 2) if name == "x.png"
                                      else b"P6 50 40 65535\n" + deep.astype(">u2").tobytes())
    photo = read_photo(tmp_path / name)
    assert difference(photo.image, deep / 257) <= 1
    assert "16-bit" in photo.note and "\n" not in photo.note


def test_an_inverted_cmyk_jpeg_as_adobe_writes_it_is_not_a_negative(tmp_path):
    smooth().convert("CMYK").save(tmp_path / "x.jpg", quality=98, subsampling=0)
    assert b"Adobe" in (tmp_path / "x.jpg").read_bytes()
    assert difference(read_photo(tmp_path / "x.jpg").image, smooth()) <= 12


def test_a_lab_tiff_is_converted_to_srgb(tmp_path):
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(smooth(), srgb, lab, outputMode="LAB")
    image.save(tmp_path / "x.tif")
    read = np.asarray(read_photo(tmp_path / "x.tif").image).astype(int)
    assert np.abs(read - np.asarray(smooth())).mean() < 1.5  # Lab of 8 bits is coarse


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-5.0, 1e6)])
def test_a_float_tiff_is_scaled_from_its_own_range(tmp_path, low, high):
    ramp = np.linspace(low, high, 2000, dtype=np.float32).reshape(40, 50)
    tifffile.imwrite(tmp_path / "x.tif", ramp)
    photo = read_photo(tmp_path / "x.tif")
    assert photo.image.mode == "I;16"
    assert difference(photo.image, np.linspace(0, 65535, 2000).reshape(40, 50)) <= 1


def test_a_float_tiff_of_nan_and_infinity_gives_a_picture(tmp_path):
    ramp = np.linspace(0, 1, 2000, dtype=np.float32).reshape(40, 50)
    ramp[3, 3], ramp[4, 4], ramp[5, 5] = np.nan, np.inf, -np.inf
    tifffile.imwrite(tmp_path / "x.tif", ramp)
    assert read_photo(tmp_path / "x.tif").image.getpixel((49, 39)) == 65535


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
def test_the_orientation_of_the_exif_is_applied_and_reset(tmp_path, name, orientation):
    upright = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}[orientation]
    expected = smooth()
    for number in upright:  # Image.Transpose: what turns the stored picture upright
        expected = expected.transpose(Image.Transpose(number))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    smooth().save(tmp_path / name, exif=exif)
    photo = read_photo(tmp_path / name)
    assert photo.image.size == expected.size
    assert np.abs(np.asarray(photo.image).astype(int) - np.asarray(expected)).mean() < 4
    write_photo(tmp_path / f"out_{name}", [photo.image], photo)
    again = read_photo(tmp_path / f"out_{name}").image
    assert again.size == expected.size
    assert np.abs(np.asarray(again).astype(int) - np.asarray(expected)).mean() < 5


def test_an_orientation_in_xmp_is_not_written_again(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    smooth().save(tmp_path / "x.png", pnginfo=info)
    photo = read_photo(tmp_path / "x.png")
    assert photo.image.size == (40, 50)
    write_photo(tmp_path / "y.png", [photo.image], photo)
    assert read_photo(tmp_path / "y.png").image.size == (40, 50)


def test_a_jpeg_may_be_decoded_smaller_but_not_below_the_limit(tmp_path):
    smooth("RGB", 1600, 1200).save(tmp_path / "x.jpg")
    assert read_photo(tmp_path / "x.jpg", at_least=500).image.size == (800, 600)
    assert read_photo(tmp_path / "x.jpg").image.size == (1600, 1200)


def test_every_page_of_a_tiff_is_read_and_written(tmp_path):
    pages = [smooth(), smooth("RGB", 33, 44), Image.new("RGB", (20, 30), "red")]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    photos = [read_photo(tmp_path / "x.tif", page) for page in range(3)]
    assert [photo.pages for photo in photos] == [3, 3, 3]
    write_photo(tmp_path / "y.tif", [photo.image for photo in photos], photos[0])
    for i, page in enumerate(pages):
        assert difference(read_photo(tmp_path / "y.tif", i).image, page) == 0
    with pytest.raises(ColorizeError):
        read_photo(tmp_path / "x.tif", 3)


# -------------------------------------------------------------------------------- ICC profiles

def gamma_profile(gamma: float, space: bytes) -> bytes:
    """An ICC profile (version 2) of one gamma: GRAY, or RGB with sRGB's primaries."""
    def xyz(*values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": xyz(0.9642, 1, 0.8249), b"cprt": b"text\0\0\0\0none\0\0\0\0",
            b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"g\0" + bytes(79)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:  # sRGB's primaries, adapted to D50
        tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
                 b"rXYZ": xyz(0.43607, 0.22249, 0.01392), b"gXYZ": xyz(0.38515, 0.71687, 0.09708),
                 b"bXYZ": xyz(0.14307, 0.06061, 0.71410)}
    table, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        body += bytes(-len(body) % 4)
        table += name + struct.pack(">II", offset + len(data), len(body))
        data += body
    head = struct.pack(">I4sI", offset + len(data), b"lcms", 0x02100000) + b"mntr" + space + b"XYZ "
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def from_gamma(values, gamma):
    """sRGB in 0..1 of values in 0..1 that were encoded by a gamma: the closed form."""
    light = values ** gamma
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.2])
def test_gray_profiles_are_converted_to_srgb(tmp_path, gamma):
    gray = np.tile(np.arange(256, dtype=np.uint8), (8, 1))
    Image.fromarray(gray).save(tmp_path / "x.png", icc_profile=gamma_profile(gamma, b"GRAY"))
    photo = read_photo(tmp_path / "x.png")
    assert photo.image.mode == "L" and photo.note == ""
    assert difference(photo.image, from_gamma(gray / 255, gamma) * 255) <= 1.01


def test_a_gray_profile_applies_to_16_bit_too(tmp_path):
    gray = np.linspace(0, 65535, 2000).astype(np.uint16).reshape(40, 50)
    tifffile.imwrite(tmp_path / "x.tif", gray, iccprofile=gamma_profile(1.8, b"GRAY"))
    photo = read_photo(tmp_path / "x.tif")
    assert photo.image.mode == "I;16"
    assert difference(photo.image, from_gamma(gray / 65535, 1.8) * 65535) < 400
    assert len(np.unique(np.asarray(photo.image))) > 1000


def test_colour_profiles_are_converted_to_srgb(tmp_path):
    smooth().save(tmp_path / "x.png", icc_profile=gamma_profile(1.0, b"RGB "))
    photo = read_photo(tmp_path / "x.png")
    assert photo.note == ""
    assert difference(photo.image, from_gamma(np.asarray(smooth()) / 255, 1.0) * 255) <= 3


def test_a_profile_of_srgb_itself_changes_nothing_to_speak_of(tmp_path):
    smooth().save(tmp_path / "x.png", icc_profile=SRGB)
    assert difference(read_photo(tmp_path / "x.png").image, smooth()) <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("profile", [b"nonsense", gamma_profile(2.2, b"GRAY"),
                                     gamma_profile(2.2, b"RGB ")[:200]])
def test_a_profile_that_does_not_fit_is_passed_over_and_named(tmp_path, mode, profile):
    if mode == "L" and b"GRAY" in profile[:20]:
        profile = gamma_profile(2.2, b"RGB ")
    image = smooth().convert(mode)
    image.save(tmp_path / "x.tif", icc_profile=profile)
    photo = read_photo(tmp_path / "x.tif")
    assert "profile" in photo.note
    assert difference(photo.image, image.convert("L" if mode == "L" else "RGB")) == 0


# ------------------------------------------------------------------------------------- writing

def photo_with(**info) -> Photo:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist], exif[ExifTags.Base.DateTime] = "A. Person", "1931:05:04 10:00:00"
    return Photo(smooth("L"), None, {"exif": exif, "dpi": (300, 300), "text": {}} | info, 1, "")


@pytest.mark.parametrize("name", ["y.png", "y.jpg", "y.tif", "y.webp", "y.avif"])
@pytest.mark.parametrize("source", ["x.png", "x.jpg", "x.tif", "x.webp"])
def test_metadata_goes_from_any_format_to_any_other(tmp_path, source, name):
    if name == "y.avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    before = photo_with()
    before.image.save(tmp_path / source, exif=before.info["exif"], dpi=(300, 300))
    photo = read_photo(tmp_path / source)
    write_photo(tmp_path / name, [smooth()], photo, "Colours added by a test")
    with Image.open(tmp_path / name) as image:
        image.load()
        exif = image.getexif()
        assert image.mode == "RGB" and image.size == (50, 40)
        assert exif[ExifTags.Base.Artist] == "A. Person"
        assert exif[ExifTags.Base.DateTime] == "1931:05:04 10:00:00"
        assert exif[ExifTags.Base.Software].startswith("colorize")
        assert exif[ExifTags.Base.ImageDescription] == "Colours added by a test"
        assert exif.get(ExifTags.Base.Orientation, 1) == 1
        assert "sRGB" in ImageCms.getProfileName(io.BytesIO(image.info["icc_profile"]))
        if source != "x.webp" and name in ("y.png", "y.jpg", "y.tif"):  # the others hold no DPI
            assert [round(x) for x in image.info["dpi"]] == [300, 300]


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "jpeg", "packbits", "group4"])
def test_a_tiff_however_it_is_packed_becomes_a_tiff_of_exactly_these_colours(tmp_path, compression):
    mode = "1" if compression == "group4" else "L"
    smooth(mode).save(tmp_path / "x.tif", compression=compression)
    write_photo(tmp_path / "y.tif", [smooth()], read_photo(tmp_path / "x.tif"))
    assert difference(Image.open(tmp_path / "y.tif"), smooth()) == 0
    assert difference(tifffile.imread(tmp_path / "y.tif"), smooth()) == 0


def test_exif_of_the_camera_and_the_place_survives(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] = 400
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    smooth().save(tmp_path / "0.jpg", exif=exif)
    for i, name in enumerate(["1.tif", "2.tif", "3.png", "4.jpg"]):  # each made of the one before
        source = next(tmp_path.glob(f"{i}.*"))
        write_photo(tmp_path / name, [smooth()], read_photo(source))
        after = Image.open(tmp_path / name).getexif()
        assert after.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] == 400
        assert after.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"


def test_text_of_a_png_survives_in_any_script(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", "A. Person")
    info.add_itxt("Title", "写真 фото")
    smooth("L").save(tmp_path / "x.png", pnginfo=info)
    write_photo(tmp_path / "y.png", [smooth()], read_photo(tmp_path / "x.png"), "Colours added")
    text = Image.open(tmp_path / "y.png").text
    assert (text["Author"], text["Title"]) == ("A. Person", "写真 фото")
    assert text["Description"] == "Colours added"


@pytest.mark.parametrize("name", ["y.png", "y.tif", "y.webp"])
def test_alpha_is_written_exactly(tmp_path, name):
    image = smooth()
    image.putalpha(Image.fromarray(RGB[..., 1].copy()))
    write_photo(tmp_path / name, [image], photo_with())
    assert difference(read_photo(tmp_path / name).alpha, RGB[..., 1]) == 0


def test_a_jpeg_is_written_at_quality_95_without_subsampling(tmp_path):
    write_photo(tmp_path / "y.jpg", [smooth()], photo_with())
    smooth().save(tmp_path / "expected.jpg", quality=95, subsampling=0)
    written, expected = Image.open(tmp_path / "y.jpg"), Image.open(tmp_path / "expected.jpg")
    assert written.quantization == expected.quantization
    assert [layer[1:3] for layer in written.layer] == [(1, 1)] * 3
    assert difference(written, expected) == 0


def test_16_bit_colour_is_written_to_tiff_with_its_metadata(tmp_path):
    deep = RANDOM.integers(0, 65536, (40, 50, 3)).astype(np.uint16)
    write_photo(tmp_path / "y.tif", [deep], photo_with(), "Colours added – ü")
    with tifffile.TiffFile(tmp_path / "y.tif") as file:
        tags = {tag.name: tag.value for tag in file.pages[0].tags}
        assert np.array_equal(file.asarray(), deep)
    assert tags["ImageDescription"].startswith("Colours added") and tags["Artist"] == "A. Person"
    assert tags["Software"].startswith("colorize") and tags["XResolution"] == (300, 1)
    assert tags["DateTime"] == "1931:05:04 10:00:00" and "InterColorProfile" in tags


@pytest.mark.parametrize("name", ["y.txt", "y", "y.mp4", "y.psd"])
def test_an_extension_that_cannot_be_written_is_named(tmp_path, name):
    with pytest.raises(ColorizeError, match="no picture format"):
        write_photo(tmp_path / name, [smooth()], photo_with())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dpi", [(0, 0), (float("nan"), 1), (float("inf"), 2), (1e9, 1e9)])
def test_a_senseless_dpi_is_dropped(tmp_path, monkeypatch, dpi):
    smooth().save(tmp_path / "x.png")
    image = Image.open(tmp_path / "x.png")
    image.info["dpi"] = dpi
    monkeypatch.setattr(Image, "open", lambda *_, **__: image)
    assert read_photo(tmp_path / "x.png").info["dpi"] is None


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
@pytest.mark.parametrize("exif", [
    b"Exif\0\0garbage.......", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\1",
    b"Exif\0\0MM\0*\xff\xff\xff\xff"])
def test_a_damaged_exif_block_costs_nothing_but_itself(tmp_path, name, exif):
    smooth().save(tmp_path / name, exif=exif)
    photo = read_photo(tmp_path / name)
    assert difference(photo.image, Image.open(tmp_path / name).convert("RGB")) == 0
    write_photo(tmp_path / "y.jpg", [photo.image], photo)
    assert Image.open(tmp_path / "y.jpg").size == (50, 40)


def test_metadata_too_long_for_a_jpeg_is_left_behind_but_not_its_quality(tmp_path, capsys):
    photo = photo_with()
    photo.info["exif"][ExifTags.Base.Copyright] = "x" * 70000
    write_photo(tmp_path / "y.jpg", [smooth()], photo)
    image = Image.open(tmp_path / "y.jpg")
    assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3 and image.info["icc_profile"]
    assert "without its old metadata" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file.png/y.png", "é" * 140 + ".png", "x" * 300 + ".png",
                                   "folder.png", "y.webp"])
def test_a_place_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, place):
    (tmp_path / "file.png").write_bytes(b"precious")
    (tmp_path / "folder.png").mkdir()
    wide = Image.new("RGB", (17000 if place == "y.webp" else 8, 2))
    with pytest.raises(ColorizeError, match="cannot be written"):
        write_photo(tmp_path / place, [wide], photo_with())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.png", "folder.png"]
    assert (tmp_path / "file.png").read_bytes() == b"precious"


@pytest.mark.parametrize("error, said", [
    (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied")])
def test_a_failure_while_writing_leaves_the_old_file(tmp_path, error, said):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def write(temporary):
        temporary.write_bytes(b"half")
        raise error
    with pytest.raises(ColorizeError, match=said):
        write_whole(path, write)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.bin", b"old")]


# ------------------------------------------------------------------------------- hostile files

def eight_files() -> list[bytes]:
    """Eight small files of different formats."""
    files = []
    for kind, mode, options in [("PNG", "RGB", {}), ("PNG", "P", {}), ("JPEG", "RGB", {}),
                                ("TIFF", "L", {"compression": "tiff_lzw"}), ("WEBP", "RGB", {}),
                                ("BMP", "RGB", {}), ("GIF", "P", {}), ("PPM", "L", {})]:
        buffer = io.BytesIO()
        smooth(mode).save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def mutated(files: list[bytes], random: np.random.Generator) -> bytes:
    """One of the files with bytes changed, cut short, or with a piece of another in it."""
    data = bytearray(files[random.integers(len(files))])
    kind = random.integers(3)
    if kind == 0:
        for place in random.integers(0, len(data), random.integers(1, 12)):
            data[place] = random.integers(256)
    elif kind == 1:
        del data[random.integers(len(data)):]
    else:
        other = files[random.integers(len(files))]
        start, length = random.integers(len(other)), random.integers(1, 400)
        place = random.integers(len(data))
        data[place:place + random.integers(0, 400)] = other[start:start + length]
    return bytes(data)


def test_a_mutated_file_is_read_or_refused(tmp_path):
    """COLORIZE_FUZZ=2000 for a longer run."""
    files, outcomes = eight_files(), []
    for seed in range(int(os.environ.get("COLORIZE_FUZZ", 100))):
        path = tmp_path / "x.png"
        path.write_bytes(mutated(files, np.random.default_rng(seed)))
        try:
            photo = read_photo(path)
            assert photo.image.mode in ("L", "RGB", "I;16"), seed
            assert np.asarray(photo.image).size > 0, seed
            write_photo(tmp_path / "y.png", [photo.image.convert("RGB")], photo)
            outcomes.append(True)
        except ColorizeError as error:
            assert "\n" not in str(error), seed
            outcomes.append(False)
    assert 0.1 < np.mean(outcomes) < 0.9, "the mutations test nothing"


def hostile(folder, kind):
    path = folder / "x.jpg"
    if kind == "truncated":
        smooth("RGB", 400, 300).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no photograph\n" * 100)
    elif kind == "postscript":  # Pillow would run Ghostscript on it
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to nothing":
        path.symlink_to(folder / "nothing")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    return path


HOSTILE = ["truncated", "empty", "text", "postscript", "folder", "pipe", "link to nothing",
           "link to itself", "device", "absent"]


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_photograph_is_refused_in_one_line_that_names_it(tmp_path, kind):
    path = hostile(tmp_path, kind)
    with pytest.raises(ColorizeError) as error:
        read_photo(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("error", [
    PermissionError(errno.EACCES, "Permission denied"), MemoryError(), RecursionError(),
    SyntaxError("bad"), struct.error("short"), AttributeError("None")])
def test_whatever_the_decoder_raises_becomes_one_error(tmp_path, monkeypatch, error):
    smooth().save(tmp_path / "x.png")

    def fail(*_, **__):
        raise error
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ColorizeError, match="x.png"):
        read_photo(tmp_path / "x.png")


def test_an_interrupt_is_no_damaged_file(tmp_path, monkeypatch):
    smooth().save(tmp_path / "x.png")

    def interrupt(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_photo(tmp_path / "x.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_the_oddest_sizes_are_read(tmp_path, size, mode):
    Image.new(mode, size, "white").save(tmp_path / "x.png")
    photo = read_photo(tmp_path / "x.png", at_least=512)
    assert photo.image.size == size and photo.image.getextrema()[0] in (255, (255, 255))


def test_more_megapixels_than_allowed_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("1", (2000, 1000)).save(tmp_path / "x.png")
    assert read_photo(tmp_path / "x.png", max_megapixels=2).image.size == (2000, 1000)
    monkeypatch.setattr(Image.Image, "load", None)
    for limit in (1.9, 0.5):
        with pytest.raises(ColorizeError, match=f"{limit} megapixels.*--max_megapixels"):
            read_photo(tmp_path / "x.png", max_megapixels=limit)


def test_a_bomb_on_a_later_page_or_inside_an_icon_is_refused(tmp_path):
    small, big = Image.new("1", (8, 8)), Image.new("1", (2000, 2000))
    small.save(tmp_path / "x.tif", save_all=True, append_images=[big])
    assert read_photo(tmp_path / "x.tif", 0, max_megapixels=1).image.size == (8, 8)
    buffer = io.BytesIO()
    big.save(buffer, "PNG")
    header = struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(buffer.getvalue()), 22)
    (tmp_path / "x.ico").write_bytes(header + buffer.getvalue())
    for path, page in ((tmp_path / "x.tif", 1), (tmp_path / "x.ico", 0)):
        with pytest.raises(ColorizeError):
            read_photo(path, page, max_megapixels=1)


# ------------------------------------------------------------------------------------- finding

def test_photographs_are_found_at_any_depth_in_any_case_and_script(tmp_path):
    names = ["b.JPG", "a.png", "deep/er/c.TiFf", "写真/сад é.webp", "with space/d.jpeg",
             "x.y/e.jp2"]
    others = ["notes.txt", "g.pdf", "h.eps", "noextension", ".hidden.png", ".folder/i.png",
              "movie.mpg"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to("nothing")
    (tmp_path / "linked.png").symlink_to("a.png")
    assert find_photos(tmp_path) == sorted(tmp_path / name for name in [*names, "linked.png"])


def test_a_loop_of_links_ends_and_each_photograph_is_found_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "z").symlink_to(tmp_path / "a")
    assert find_photos(tmp_path) == [tmp_path / "a" / "x.png"]
    (tmp_path / "outside").symlink_to(tmp_path.parent / "nowhere")
    assert find_photos(tmp_path / "nothing") == []


# -------------------------------------------------------------------------------------- arrays

@pytest.fixture
def data(tmp_path, photos):
    """A copy of the photographs without what was made of them."""
    shutil.copytree(photos, tmp_path / "data", ignore=shutil.ignore_patterns("processed"))
    return tmp_path / "data"


def array(data, split="train"):
    return np.load(data / "processed" / f"{split}.npy")


def test_the_array_holds_the_photographs_as_lab(data):
    manifests = prepare(data, workers=3)
    stored = array(data)
    assert stored.shape == (8, SIDE, SIDE, 3) and stored.dtype == np.uint8
    assert array(data, "val").shape == (4, SIDE, SIDE, 3)
    for (name, size, mtime, label), row in zip(manifests["train"]["photographs"], stored):
        image = Image.open(data / name)
        left = (image.width - image.height) // 2
        square = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS,
                              box=(left, 0, left + image.height, image.height))
        L, a, b = np.moveaxis(color.rgb2lab(np.asarray(square)), -1, 0)
        expected = np.stack([L * 2.55, a + 128, b + 128], axis=-1)
        assert np.abs(row - expected).max() <= 0.51
        assert (size, mtime) == ((data / name).stat().st_size, (data / name).stat().st_mtime_ns)
        assert label == name.split("/")[1] and name.startswith("train/")
    assert class_names(manifests["train"]) == ["round", "square"]


def test_the_arrays_are_the_same_with_any_number_of_workers(data):
    prepare(data, workers=1)
    first = array(data).copy()
    shutil.rmtree(data / "processed")
    prepare(data, workers=5)
    assert np.array_equal(first, array(data))


def test_the_arrays_are_reused_until_the_photographs_change(data, monkeypatch, capsys):
    first = prepare(data)
    monkeypatch.setattr(colorize_data, "lab_square", None)
    assert prepare(data) == first
    monkeypatch.undo()
    for change in (lambda: made_photo(50).save(data / "train" / "new.png"),
                   lambda: os.utime(data / "val" / "round" / "9.png", (1, 1)),
                   lambda: (data / "train" / "new.png").unlink(),
                   lambda: (data / "val" / "round" / "9.png").rename(data / "val" / "9.png")):
        capsys.readouterr()
        change()
        assert prepare(data) != first
        assert "changed" in capsys.readouterr().err
        first = prepare(data)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name, content", [
    ("train.npy", b""), ("train.npy", b"\x93NUMPY\1\0"), ("val.json", b"[]"), ("val.json", b"{}"),
    ("val.json", b"\xff"), ("val.npy", None)])
def test_damaged_arrays_are_built_again(data, name, content):
    prepare(data)
    path = data / "processed" / name
    path.unlink() if content is None else path.write_bytes(content)
    prepare(data)
    assert len(array(data)) == 8 and len(array(data, "val")) == 4


def test_what_cannot_teach_is_left_out_counted_and_named(data, capsys):
    train = data / "train"
    (train / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no photograph")
    (train / "empty.png").touch()
    made_photo(60, 63, 200).save(train / "tiny.png")
    made_photo(61, 64, 64).save(train / "small.png")
    made_photo(62).convert("L").save(train / "gray.png")
    made_photo(63).convert("L").convert("RGB").save(train / "grayrgb.jpg")
    Image.fromarray(np.zeros((80, 80), np.uint16)).save(train / "deep.png")
    left = prepare(data)["train"]["left_out"]
    assert left == {"train/broken.jpg": "unreadable", "train/empty.png": "unreadable",
                    "train/tiny.png": "under 64 pixels", "train/gray.png": "without colour",
                    "train/grayrgb.jpg": "without colour", "train/deep.png": "without colour"}
    err = capsys.readouterr().err
    assert "train: 2 left out, unreadable: train/broken.jpg, train/empty.png" in err
    assert "train: 3 left out, without colour: " in err
    assert len(array(data)) == 9


def test_gray_copies_beside_the_colour_folder_make_no_class(tmp_path):
    for i in range(3):
        for kind, mode in (("color", "RGB"), ("gray", "L")):
            path = tmp_path / "train" / kind / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            made_photo(i).convert(mode).convert("RGB").save(path)
    train = prepare(tmp_path, val_fraction=1e-9)["train"]
    assert [name for name, *_ in train["photographs"]] == [f"train/color/{i}.jpg" for i in range(3)]
    assert len(train["left_out"]) == 3 and class_names(train) == []


def many(folder, numbers):
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for i in numbers:
        made_photo(i, 64, 64).save(folder / "train" / f"{i}.png", compress_level=1)


def names(manifest):
    return {name for name, *_ in manifest["photographs"]}


def test_without_val_a_share_is_set_aside_that_added_photographs_never_move(tmp_path, capsys):
    many(tmp_path, range(30))
    first = prepare(tmp_path, val_fraction=0.3)
    assert "set aside for validation" in capsys.readouterr().err
    assert names(first["train"]) | names(first["val"]) == {f"train/{i}.png" for i in range(30)}
    assert not names(first["train"]) & names(first["val"]) and 3 <= len(names(first["val"])) <= 16
    many(tmp_path, range(30, 45))
    (tmp_path / "train" / "0.png").rename(tmp_path / "train" / "renamed.png")
    second = prepare(tmp_path, val_fraction=0.3)
    old = {f"train/{i}.png" for i in range(1, 30)}
    assert names(second["train"]) & old == names(first["train"]) & old
    assert names(second["val"]) & old == names(first["val"]) & old
    assert not names(second["train"]) & names(second["val"])
    assert prepare(tmp_path, val_fraction=0.3) == second


def test_an_empty_split_is_reused_too(tmp_path, capsys):
    many(tmp_path, range(2))
    first = prepare(tmp_path, val_fraction=1e-9)
    assert names(first["val"]) == set() and array(tmp_path, "val").shape == (0, SIDE, SIDE, 3)
    capsys.readouterr()
    assert prepare(tmp_path, val_fraction=1e-9) == first and capsys.readouterr().err == ""


def test_a_file_that_may_not_be_read_is_left_out(tmp_path, monkeypatch):
    many(tmp_path, range(2))

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(colorize_data, "content_hash", refuse)
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ColorizeError, match="2 unreadable"):
        prepare(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "absent"])
def test_hostile_files_among_the_photographs_stop_nothing(tmp_path, kind):
    many(tmp_path, range(2))
    hostile(tmp_path / "train", kind)
    manifests = prepare(tmp_path)
    assert len(names(manifests["train"]) | names(manifests["val"])) == 2


def test_no_usable_photograph_says_where_it_looked_and_what_was_wrong(tmp_path):
    with pytest.raises(ColorizeError, match=f"{tmp_path / 'train'}.*--data"):
        prepare(tmp_path)
    (tmp_path / "train").mkdir()
    for i in range(2):
        made_photo(i).convert("L").save(tmp_path / "train" / f"{i}.png")
    (tmp_path / "train" / "x.png").touch()
    with pytest.raises(ColorizeError) as error:
        prepare(tmp_path, val_fraction=1e-9)
    for piece in (str(tmp_path / "train"), "2 without colour", "1 unreadable"):
        assert piece in str(error.value)


def test_a_disk_too_small_is_an_error_before_the_start(data, monkeypatch):
    monkeypatch.setattr(colorize_data, "free_space", lambda folder: 12 * SIDE * SIDE * 3 - 1)
    with pytest.raises(ColorizeError, match="make room"):
        prepare(data)
    assert not (data / "processed").exists()
    monkeypatch.setattr(colorize_data, "free_space", lambda folder: 12 * SIDE * SIDE * 3)
    prepare(data)


@pytest.mark.parametrize("dies_at", [1, 5, 8, 9, 12])
def test_a_build_that_was_killed_leaves_nothing_that_looks_finished(data, monkeypatch, dies_at):
    """Killed at any photograph, over older arrays: the next run builds what a fresh one would."""
    prepare(data)
    expected = array(data).copy()
    shutil.rmtree(data / "processed")
    (data / "train" / "round" / "1.png").rename(data / "train" / "hidden")
    prepare(data)
    (data / "train" / "hidden").rename(data / "train" / "round" / "1.png")
    calls, whole = [], colorize_data.lab_square

    def dying(path):
        calls.append(path)
        if len(calls) == dies_at:
            raise SystemExit(137)
        return whole(path)
    monkeypatch.setattr(colorize_data, "lab_square", dying)
    with pytest.raises(SystemExit):
        prepare(data, workers=1)
    monkeypatch.undo()
    assert not [path for path in (data / "processed").iterdir() if path.name.startswith(".")]
    prepare(data)
    assert np.array_equal(array(data), expected) and len(array(data, "val")) == 4


def test_a_processed_that_is_no_folder_is_one_line(data):
    (data / "processed").write_text("")
    with pytest.raises(ColorizeError, match="processed"):
        prepare(data)


# ------------------------------------------------------------------------------------- batches

@pytest.fixture(scope="session")
def arrays(photos):
    prepare(photos)
    return [photos / "processed" / f"{split}.npy" for split in ("train", "val")]


def batches(dataset, workers, numbers=range(20)):
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=[list(numbers[i:i + 4]) for i in range(0, len(numbers), 4)],
        collate_fn=as_is, num_workers=workers)
    return [torch.cat(parts) for parts in zip(*loader)]


@pytest.mark.parametrize("film", [False, True])
def test_batches_are_a_pure_function_of_seed_and_number(arrays, film):
    def data(seed):
        return ColorizeData(arrays, np.arange(12), size=96, train=True, film=film, seed=seed)
    lab, labels = batches(data(7), 0)
    assert lab.shape == (20, 3, 96, 96) and lab.dtype == torch.uint8
    for other in (batches(data(7), 2), data(7).__getitems__(range(20))):
        assert torch.equal(other[0], lab) and torch.equal(other[1], labels)
    late = data(7)
    assert torch.equal(late[19][0], lab[19]) and torch.equal(late[3][0], lab[3])
    assert not torch.equal(batches(data(8), 0)[0], lab)


def test_each_epoch_is_another_permutation_of_all_rows(arrays):
    dataset = ColorizeData(arrays, train=True)
    epochs = [[int(dataset.row(n)) for n in range(e * 12, e * 12 + 12)] for e in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_without_train_the_rows_come_in_order_and_unchanged(arrays):
    whole = np.concatenate([np.load(path) for path in arrays])
    dataset = ColorizeData(arrays, np.arange(12) * 10)
    assert len(dataset) == 12
    lab, labels = dataset.__getitems__(range(12))
    assert np.array_equal(lab.permute(0, 2, 3, 1).numpy(), whole)
    assert labels.tolist() == list(range(0, 120, 10))
    assert ColorizeData(arrays, size=64)[3][0].shape == (3, 64, 64)
    assert ColorizeData(arrays)[0][1] == -1


def test_a_limit_takes_a_fixed_sample(arrays):
    first, second = (ColorizeData(arrays, limit=5, seed=seed) for seed in (1, 2))
    assert len(first) == 5 and np.array_equal(first.chosen, second.chosen)
    assert len(ColorizeData(arrays, limit=100)) == 12
    trained = ColorizeData(arrays, limit=5, train=True)
    assert {int(trained.row(n)) for n in range(10)} == set(first.chosen.tolist())


def test_without_crop_a_sample_is_the_row_or_its_mirror_image(arrays):
    dataset = ColorizeData(arrays, train=True, crop=False)
    whole, flipped = np.concatenate([np.load(path) for path in arrays]), 0
    for n in range(24):
        row = torch.from_numpy(whole[dataset.row(n)]).permute(2, 0, 1)
        lab = dataset[n][0]
        assert torch.equal(lab, row) or torch.equal(lab, row.flip(-1))
        flipped += torch.equal(lab, row.flip(-1))
    assert 5 <= flipped <= 19


def test_a_crop_is_a_piece_of_the_photograph_of_35_percent_or_more(tmp_path):
    """On an array whose a and b are the pixel's own coordinates a crop shows where it was taken."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.uint8)
    np.save(tmp_path / "x.npy", np.stack([x * 0, y, x], axis=-1)[None])
    dataset, areas = ColorizeData([tmp_path / "x.npy"], train=True), []
    for n in range(60):
        _, rows, columns = dataset[n][0].numpy().astype(int)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert np.ptp(rows, axis=1).max() <= 1 and np.ptp(columns, axis=0).max() <= 1
        areas.append(height * width / SIDE ** 2)
    assert 0.33 < min(areas) < 0.5 and 0.85 < max(areas) <= 1


def test_film_changes_the_lightness_alone(arrays):
    plain = ColorizeData(arrays, train=True, crop=False, seed=3)
    film = ColorizeData(arrays, train=True, crop=False, film=True, seed=3)
    changed = 0
    for n in range(24):
        before, after = plain[n][0], film[n][0]
        assert torch.equal(before[1:], after[1:])
        changed += not torch.equal(before[0], after[0])
    assert 5 <= changed <= 19


def test_film_leaves_the_lightness_of_gray_but_for_the_grain():
    gray = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    for seed in range(5):
        L = film_lightness(gray, np.random.default_rng(seed))[0].float()
        assert abs(L.mean() - 128) < 1.5 and L.std() < 2 * 2.55


def test_a_dataset_is_pickled_without_its_array(arrays):
    dataset = ColorizeData(arrays, train=True)
    first = dataset[0][0]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 5000
    assert torch.equal(pickle.loads(pickled)[0][0], first)


# ---------------------------------------------------------------------------- the smaller things

def test_ordered_map_keeps_the_order_and_takes_no_more_than_its_window():
    taken = []

    def numbers():
        for i in range(50):
            taken.append(i)
            yield i
    results = ordered_map(lambda i: i * i, numbers(), 4, window=5)
    assert next(results) == 0 and len(taken) == 5
    assert list(results) == [i * i for i in range(1, 50)]


def test_progress_passes_everything_through_and_is_silent_when_quick(capsys):
    assert list(progress(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_progress_redraws_one_line_on_a_terminal(capsys, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(colorize_data.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress(range(3), 3, "x")) == [0, 1, 2]
    err = capsys.readouterr().err
    assert err.count("\r") == 3 and err.count("\n") == 1 and "x: 3/3" in err


def test_a_picture_sheet_holds_every_tile_and_caption():
    tiles = [Image.new("RGB", (40, 20), "red"), np.zeros((10, 10, 3), np.uint8),
             Image.new("L", (5, 9))]
    sheet = picture_sheet(tiles, 2, ["one", "", "three"], side=64)
    assert sheet.size == (2 * 68 + 4, 2 * (68 + 16) + 4)
    assert sheet.getpixel((36, 36)) == (255, 0, 0) and sheet.getpixel((36 + 68, 36)) == (0, 0, 0)
    assert picture_sheet(tiles, 3, side=64).size == (3 * 68 + 4, 72)


def test_the_manifest_is_plain_json(data):
    prepare(data)
    manifest = json.loads((data / "processed" / "train.json").read_text())
    assert set(manifest) == {"format", "fingerprint", "photographs", "left_out"}
