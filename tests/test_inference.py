"""Colouring: controls, edges, formats, folders, addresses, large and hostile files."""

import errno
import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from conftest import ROOT, made_photo
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin
from skimage.color import lab2rgb, rgb2lab
from skimage.io import imread

import inference
from basic_model import load_checkpoint
from controls import MOODS, read_controls, tilt
from inference import colorize
from photo import ColorizeError, FlagError

HEADS = ("ab", "bins")


@pytest.fixture(scope="session")
def models(checkpoints):
    """The two networks, the bins head made to vary more from place to place."""
    models = {head: load_checkpoint(path)[0] for head, path in checkpoints.items()}
    with torch.no_grad():
        models["bins"].head.weight.mul_(20)
    return models


@pytest.fixture
def run(checkpoints):
    """inference() with the small bins checkpoint, at a small size."""
    model = str(checkpoints["bins"])
    return lambda image, output, **flags: inference.inference(
        **{"image": str(image), "output": output, "model": model, "size": 32} | flags)


def gray_photo(seed=0, width=96, height=80) -> Image.Image:
    return made_photo(seed, width, height).convert("L")


def gray_16(width=90, height=60) -> Image.Image:
    """More grays than 8 bits tell apart."""
    values = np.linspace(500, 64000, width * height).reshape(height, width)
    return Image.fromarray(values.astype(np.uint16))


def lab(image) -> np.ndarray:
    """scikit-image's Lab of a picture, 8 or 16 bit, gray or RGB."""
    pixels = np.asarray(image)
    return rgb2lab(np.stack([pixels] * 3, axis=-1) if pixels.ndim == 2 else pixels[..., :3])


def mean_ab(image) -> np.ndarray:
    return lab(image)[..., 1:].mean(axis=(0, 1))


def files(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


# ------------------------------------------------------------------------------ tilting

def test_lambda_of_one_pixel_is_that_of_bisection():
    logits, line = np.array([0.3, -1.0, 2.0, 0.0, 0.5]), np.array([-40.0, -10.0, 0.0, 25.0, 60.0])
    probability, target = np.exp(logits) / np.exp(logits).sum(), 12.0

    def tilted_mean(slope):
        weights = probability * np.exp(slope * line)
        return (weights @ line) / weights.sum()
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted_mean(middle) < target else (low, middle)
    colors = np.stack([line, np.zeros(5)], axis=1)
    moved, vector = tilt(probability[None], colors, np.array([target, 0.0]))
    assert vector[0] == pytest.approx(low, abs=1e-4) and vector[1] == 0
    assert moved[0] @ line == pytest.approx(target, abs=0.03)


def test_gradient_of_the_tilted_mean_is_the_covariance():
    random = np.random.default_rng(0)
    colors, probability = random.uniform(-80, 80, (40, 2)), random.dirichlet(np.ones(40), 30)
    near, at = tilt(probability, colors, np.array([6.0, -3.0]))
    far, beyond = tilt(probability, colors, np.array([6.5, -3.2]), at)
    middle = (near + far) / 2
    means = middle @ colors
    covariance = np.einsum("pq,qi,qj->ij", middle, colors, colors) / 30 - means.T @ means / 30
    gained = (far @ colors).mean(axis=0) - (near @ colors).mean(axis=0)
    assert gained == pytest.approx(covariance @ (beyond - at), rel=0.02)


# ------------------------------------------------------------------------------ controls

@pytest.mark.parametrize("head", HEADS)
def test_both_kinds_of_checkpoint_colour(models, head):
    out = colorize(models[head], gray_photo())
    assert out.mode == "RGB" and out.size == (96, 80)
    assert np.hypot(*np.moveaxis(lab(out)[..., 1:], -1, 0)).mean() > 2


@pytest.mark.parametrize("flags", [{"saturation": 1.0}, {"vividness": 1.0}, {"hints": ""},
                                   {"mood": "warm", "strength": 0.0},
                                   {"mean_color": "20,20", "strength": 0.0}])
def test_neutral_settings_change_no_bit(models, flags):
    plain = colorize(models["bins"], gray_photo())
    assert plain.tobytes() == colorize(models["bins"], gray_photo(), **flags).tobytes()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("photo", [gray_photo(1), made_photo(2)], ids=["gray", "colour"])
def test_lightness_is_kept_even_at_saturation_2(models, head, photo, tmp_path):
    colorize(models[head], photo, saturation=2.0).save(tmp_path / "out.png")
    off = np.abs(lab(Image.open(tmp_path / "out.png"))[..., 0] - lab(photo)[..., 0])
    assert off.mean() <= 0.1 and (off <= 0.4).mean() >= 0.999


TARGETS = [(20, 0), (0, 20), (-14, 0), (0, -20), (14, 14), (-10, 10), (10, -10), (5, 2)]


@pytest.mark.parametrize("head", HEADS)
def test_the_mean_asked_for_is_achieved_or_said_to_be_out_of_reach(models, head, checkpoints, run,
                                                                   tmp_path, capsys):
    achieved = 0
    for seed in range(10):
        photo = gray_photo(seed, 64, 48)
        for target in TARGETS:
            text = f"{target[0]},{target[1]}"
            off = np.linalg.norm(mean_ab(colorize(models[head], photo, mean_color=text)) - target)
            achieved += off <= 1
            if off > 1.1:  # 8 bits and the printed digits blur the limit a little
                photo.save(tmp_path / "a.png")
                run(tmp_path / "a.png", tmp_path, mean_color=text, model=str(checkpoints[head]))
                assert "out of reach" in capsys.readouterr().out
    assert achieved >= 70


@pytest.mark.parametrize("head", HEADS)
def test_its_own_output_as_reference_changes_little(models, head, tmp_path):
    photo = gray_photo(3, 160, 120)
    plain = colorize(models[head], photo)
    plain.save(tmp_path / "reference.png")
    again = colorize(models[head], photo, reference=tmp_path / "reference.png")
    assert np.hypot(*np.moveaxis(lab(again) - lab(plain), -1, 0)[1:]).mean() < 1


def test_a_reference_gives_its_mean_and_may_be_of_16_bits(models, tmp_path):
    made_photo(5).save(tmp_path / "reference.png")
    out = colorize(models["bins"], gray_photo(6), reference=tmp_path / "reference.png")
    assert mean_ab(out) == pytest.approx(mean_ab(made_photo(5)), abs=1.5)
    gray_16().save(tmp_path / "gray.png")
    out = colorize(models["bins"], gray_photo(6), reference=tmp_path / "gray.png")
    assert mean_ab(out) == pytest.approx([0, 0], abs=1)


def test_what_gamut_takes_from_the_mean_is_made_up_for():
    L = np.linspace(5, 95, 60 * 40, dtype=np.float32).reshape(40, 60)
    gray = np.zeros((40, 60, 2), np.float32)
    ab = inference.move_mean(gray, L, None, lambda prediction: prediction, np.array([5.0, 25.0]))
    rgb = lab2rgb(np.concatenate([L[..., None], inference.into_gamut(L, ab)], axis=-1))
    assert rgb2lab(rgb)[..., 1:].mean(axis=(0, 1)) == pytest.approx([5, 25], abs=0.5)


def test_a_reference_of_wider_colours_spreads_them(models, tmp_path):
    def spread(image):
        return np.sqrt(lab(image)[..., 1:].var(axis=(0, 1)).sum())
    plain = colorize(models["bins"], gray_photo(3), saturation=0.2)
    made_photo(5).save(tmp_path / "wide.png")
    assert spread(made_photo(5)) > 3 * spread(plain)
    wide = colorize(models["bins"], gray_photo(3), saturation=0.2,
                    reference=tmp_path / "wide.png")
    assert spread(wide) > 1.5 * spread(plain)


@pytest.mark.parametrize("head", HEADS)
def test_a_mirrored_photograph_gets_mirrored_colours(models, head):
    plain = colorize(models[head], gray_photo(5))
    mirrored = ImageOps.mirror(colorize(models[head], ImageOps.mirror(gray_photo(5))))
    assert np.abs(lab(mirrored) - lab(plain)).mean() < 0.1


def test_half_the_strength_goes_half_the_way(models):
    plain, half, whole = (
        mean_ab(colorize(models["bins"], gray_photo(4), mean_color="8,12", strength=strength))
        for strength in (0.0, 0.5, 1.0))
    assert half == pytest.approx((plain + whole) / 2, abs=1)


def test_vividness_strengthens_and_saturation_scales_the_colours(models):
    def chroma(**flags):
        ab = lab(colorize(models["bins"], gray_photo(7), **flags))[..., 1:]
        return np.hypot(*np.moveaxis(ab, -1, 0)).mean()
    assert chroma(vividness=3.0) > 1.1 * chroma() and chroma(saturation=0.0) < 0.5
    assert chroma(saturation=0.5) == pytest.approx(chroma() / 2, rel=0.1)


def test_the_saturation_of_a_checkpoint_acts_as_the_flag_does(checkpoints):
    model = load_checkpoint(checkpoints["bins"])[0]
    flagged = colorize(model, gray_photo(7), saturation=0.5)
    model.saturation = 0.5
    assert colorize(model, gray_photo(7)).tobytes() == flagged.tobytes()


def test_warm_is_warmer_and_explicit_flags_override_a_mood(models):
    assert (mean_ab(colorize(models["bins"], gray_photo(8), mood="warm"))
            - mean_ab(colorize(models["bins"], gray_photo(8))))[1] > 5
    assert read_controls(mood="sepia", saturation=0.9).saturation == 0.9


def test_the_help_names_every_mood():
    mood = get_type_hints(inference.inference)["mood"]
    assert set(get_args(get_args(mood)[0])) == set(MOODS)


@pytest.mark.parametrize("flags", [
    {"mood": "warm", "mean_color": "1,2"}, {"mood": "warm", "reference": "x.png"},
    {"mean_color": "1,2", "reference": "x.png"}, {"mood": "warm", "strength": 2.0},
    {"mood": "warm", "strength": -0.1}, {"mood": "warm", "strength": float("nan")},
    {"strength": 0.5}, {"saturation": 5.0}, {"vividness": 0.0}, {"mood": "angry"},
    {"mean_color": "1,2,3"}, {"mean_color": "200,0"}, {"mean_color": "nan,1"},
    {"mean_color": "1,nan"}, {"mean_color": "nocolour"}, {"mean_color": "x,1", "strength": 0.0},
    {"hints": "5"}, {"hints": "1,2"}, {"hints": "1.5,2,#ffffff"}, {"hints": "1,2,#zzzzzz"},
    {"hints": "96,0,#808080"}, {"hints": "0,-1,#808080"}], ids=str)
def test_flags_that_make_no_sense_are_refused_in_one_line(models, flags):
    with pytest.raises(FlagError) as error:
        colorize(models["bins"], gray_photo(), **flags)
    assert "\n" not in str(error.value) and "--" in str(error.value)


def test_vividness_of_an_ab_checkpoint_is_refused(models):
    with pytest.raises(FlagError, match="--loss bins"):
        colorize(models["ab"], gray_photo(), vividness=2.0)


# --------------------------------------------------------------------------------- hints

def two_sides() -> np.ndarray:
    """L of a flat light shape on a flat dark ground."""
    L = np.full((48, 64), 45, np.float32)
    L[10:38, 12:40] = 70
    return L


def test_hints_spread_as_the_direct_solution_does():
    random = np.random.default_rng(0)
    L = np.repeat(random.uniform(40, 60, (5, 6)), 4, axis=0).repeat(4, axis=1).astype(np.float32)
    ab, (h, w) = random.normal(0, 5, (*L.shape, 2)).astype(np.float32), L.shape
    A, fixed = 1e-4 * np.eye(L.size), np.zeros(L.shape, bool)
    d = np.zeros((h, w, 2))
    for y in range(h):
        for x in range(w):
            if (y - 9) ** 2 + (x - 6) ** 2 <= 6.25:
                fixed[y, x], d[y, x] = abs(L[y, x] - L[9, 6]) <= 4, (30, -10) - ab[9, 6]
            for v, u in ((y + 1, x), (y, x + 1)):
                if v < h and u < w:
                    weight = max(np.exp(-((L[y, x] - L[v, u]) / 100) ** 2 / (2 * 0.02 ** 2)), 1e-6)
                    r, s = y * w + x, v * w + u
                    A[[r, s], [r, s]] += weight
                    A[[r, s], [s, r]] -= weight
    free = ~fixed.ravel()
    d = np.where(fixed[..., None], d, 0).reshape(-1, 2)
    d[free] = np.linalg.solve(A[np.ix_(free, free)], -A[np.ix_(free, ~free)] @ d[~free])
    assert inference.propagate_hints(L, ab, [(6, 9, 30, -10)]) == pytest.approx(
        ab + d.reshape(h, w, 2), abs=0.3)


def test_a_hint_fills_its_shape_and_stops_at_the_outline():
    L = two_sides()
    ab = inference.propagate_hints(L, np.zeros((48, 64, 2), np.float32), [(20, 20, 30, -20)])
    assert ab[L == 70] == pytest.approx(np.tile([30, -20], ((L == 70).sum(), 1)), abs=1.5)
    assert np.abs(ab[L == 45]).max() < 1


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("factor", [1, 5])
def test_a_hint_is_met_and_the_other_side_stays(models, head, factor):
    """Also where the network works at a fifth of the photograph's size."""
    L = two_sides().repeat(factor, axis=0).repeat(factor, axis=1)
    photo = Image.fromarray(np.where(L > 60, 171, 107).astype(np.uint8))
    plain = lab(colorize(models[head], photo, 48))
    wanted = rgb2lab(np.array([[[190, 160, 180]]], np.uint8))[0, 0, 1:]
    x, y = 21 * factor, 19 * factor
    out = lab(colorize(models[head], photo, 48, hints=f"{x},{y},#bea0b4"))
    assert out[y, x, 1:] == pytest.approx(wanted, abs=2)
    change = (out - plain)[..., 1:]
    rows, columns = np.arange(48 * factor)[:, None] / factor, np.arange(64 * factor) / factor
    inside = (abs(rows - 23.5) < 12) & (abs(columns - 25.5) < 12)
    outside = (abs(rows - 23.5) > 18) | (abs(columns - 25.5) > 18)
    assert np.abs(change[inside] - change[y, x]).max() < 5 and np.abs(change[outside]).max() < 1


def test_a_hint_is_met_in_fine_texture(models):
    """Pixels that the network's small copy does not show."""
    texture = np.random.default_rng(0).integers(90, 170, (300, 400), np.uint8)
    out = lab(colorize(models["ab"], Image.fromarray(texture), 32, hints="200,150,#907080"))
    wanted = rgb2lab(np.array([[[0x90, 0x70, 0x80]]], np.uint8))[0, 0, 1:]
    assert out[150, 200, 1:] == pytest.approx(wanted, abs=1)


def test_a_hint_of_the_colour_that_is_there_changes_nothing(models):
    plain = colorize(models["bins"], gray_photo(2), 80, saturation=3.0)
    color = "#%02x%02x%02x" % plain.getpixel((50, 30))
    hinted = colorize(models["bins"], gray_photo(2), 80, saturation=3.0, hints=f"50,30,{color}")
    assert np.abs(lab(hinted) - lab(plain)).mean() < 0.3


def test_hints_are_for_one_photograph(photos, run, tmp_path):
    with pytest.raises(FlagError, match="one photograph"):
        run(photos / "val", tmp_path, hints="1,1,#ff0000")


# --------------------------------------------------------------------------------- edges

def test_constant_lightness_leaves_plain_bicubic():
    ab = np.random.default_rng(0).normal(0, 20, (12, 16, 2)).astype(np.float32)
    L = np.full((50, 70), 40, np.float32)
    enlarged = inference.guided_upsampler(np.full((12, 16), 40, np.float32), ab, 70, 50)(L, 0)
    for i in (0, 1):
        plane = Image.fromarray(ab[..., i]).resize((70, 50), Image.Resampling.BICUBIC)
        assert enlarged[..., i] == pytest.approx(np.asarray(plane), abs=1e-3)


def test_colour_follows_an_edge_better_than_bicubic():
    """A colour edge at a lightness edge, seen by the network at an eighth of the size."""
    L = np.full((128, 128), 40, np.float32)
    L[:, 67:] = 75
    ab = np.where(L[..., None] > 50, [30, 20], [-20, -10]).astype(np.float32)
    small = np.stack([np.asarray(Image.fromarray(plane).resize((16, 16), Image.Resampling.BOX))
                      for plane in (L, ab[..., 0], ab[..., 1])], axis=-1)
    edge_aware = inference.guided_upsampler(small[..., 0], small[..., 1:], 128, 128)(L, 0)
    plain = np.stack([np.asarray(Image.fromarray(np.ascontiguousarray(small[..., i])).resize(
        (128, 128), Image.Resampling.BICUBIC)) for i in (1, 2)], axis=-1)
    assert np.abs(edge_aware - ab).mean() < 0.6 * np.abs(plain - ab).mean()


@pytest.mark.parametrize("photo", [gray_photo(0, 301, 203), gray_16()], ids=["8 bit", "16 bit"])
def test_strips_give_the_same_as_one_piece(models, photo, monkeypatch):
    whole = np.asarray(colorize(models["bins"], photo, 64, hints="50,30,#a06040")).astype(int)
    monkeypatch.setattr(inference, "STRIP", 2100)
    strips = np.asarray(colorize(models["bins"], photo, 64, hints="50,30,#a06040"))
    top = 255 if strips.dtype == np.uint8 else 65535
    assert np.abs(strips - whole).max() <= max(1, 1e-3 * top) and (strips != whole).mean() < 0.5
    assert np.abs(strips - whole).mean() < 1e-4 * top


# ------------------------------------------------------------------------ extreme pictures

@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (33, 35), (4, 90)])
def test_extreme_shapes_are_coloured(models, head, size):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, size[::-1], np.uint8))
    out = colorize(models[head], photo, mood="warm")
    assert out.size == size
    assert np.abs(lab(out)[..., 0] - lab(photo)[..., 0]).mean() < (0.15 if min(size) > 1 else 0.4)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("value", [0, 255])
def test_black_stays_black_and_white_white(models, head, value):
    out = colorize(models[head], Image.new("L", (40, 30), value), mood="golden")
    assert np.abs(np.asarray(out).astype(int) - value).max() <= 4  # blue 4 is black to 0.1 L
    assert np.abs(lab(out)[..., 0] - value / 2.55).max() < 0.1


# --------------------------------------------------------------------------- files, one by one

@pytest.mark.parametrize("name", ["gray.png", "gray.tif"])
def test_16_bit_gray_to_tif_gives_16_bit_rgb_with_its_lightness(run, tmp_path, name):
    gray_16().save(tmp_path / name, dpi=(300, 300))
    run(tmp_path / name, tmp_path / "out.tif")
    out = imread(tmp_path / "out.tif")
    assert out.dtype == np.uint16 and out.shape == (60, 90, 3)
    assert np.abs(lab(out)[..., 0] - lab(gray_16())[..., 0]).max() < 0.02
    assert Image.open(tmp_path / "out.tif").info["dpi"] == pytest.approx((300, 300), abs=0.1)


@pytest.mark.parametrize("width, height", [(1200, 900), (3, 2000)])
def test_16_bit_gray_that_is_much_reduced_for_the_network(models, width, height):
    out = colorize(models["bins"], gray_16(width, height), 32)
    assert out.dtype == np.uint16 and out.shape == (height, width, 3)
    assert np.abs(lab(out)[..., 0] - lab(gray_16(width, height))[..., 0]).max() < 0.1


def test_16_bit_gray_to_png_keeps_its_lightness_to_8_bit_and_says_so(run, tmp_path, capsys):
    gray_16().save(tmp_path / "gray.png")
    run(tmp_path / "gray.png", tmp_path / "out.png")
    assert "written as 8-bit" in capsys.readouterr().out
    out = lab(Image.open(tmp_path / "out.png"))
    assert np.abs(out[..., 0] - lab(gray_16())[..., 0]).mean() < 0.2


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_carried_byte_by_byte(run, tmp_path, mode):
    photo, alpha = made_photo(0).convert(mode), gray_photo(9)
    photo.putalpha(alpha)
    photo.save(tmp_path / "a.png")
    run(tmp_path / "a.png", tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").getchannel("A").tobytes() == alpha.tobytes()


@pytest.mark.parametrize("ending, kind", [(".png", "PNG"), (".jpg", "JPEG"), (".JPEG", "JPEG"),
                                          (".tif", "TIFF"), (".webp", "WEBP"), (".bmp", "BMP")])
def test_the_extension_of_output_is_its_format(run, tmp_path, ending, kind):
    gray_photo().save(tmp_path / "a.png", dpi=(300, 300))
    run(tmp_path / "a.png", tmp_path / f"out{ending}")
    out = Image.open(tmp_path / f"out{ending}")
    assert out.format == kind and out.size == (96, 80) and out.mode == "RGB"
    if kind in ("PNG", "JPEG", "TIFF"):
        assert "Colours added" in out.getexif()[ExifTags.Base.ImageDescription]
        assert out.info["dpi"] == pytest.approx((300, 300), abs=0.1) and out.info["icc_profile"]
    if kind == "JPEG":
        assert JpegImagePlugin.get_sampling(out) == 0  # 4:4:4



def save_pages(path) -> list[Image.Image]:
    pages = [gray_photo(i, 50 + 10 * i, 40) for i in range(3)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return pages


@pytest.mark.parametrize("output", ["out.tif", ""])
def test_every_page_of_a_tiff_is_coloured(run, tmp_path, output):
    pages = save_pages(tmp_path / "a.tif")
    run(tmp_path / "a.tif", tmp_path / output)
    out = Image.open(tmp_path / (output or "a_color.tif"))
    assert out.n_frames == 3
    for i, page in enumerate(pages):
        out.seek(i)
        assert out.size == page.size and out.mode == "RGB"
        assert np.abs(lab(out)[..., 0] - lab(page)[..., 0]).mean() < 0.15


def test_pages_are_not_forced_into_a_jpeg_nor_over_the_limit(run, tmp_path):
    save_pages(tmp_path / "a.tif")
    with pytest.raises(ColorizeError, match="3 pages; name a .tif"):
        run(tmp_path / "a.tif", tmp_path / "out.jpg")
    with pytest.raises(ColorizeError, match="--max_megapixels"):
        run(tmp_path / "a.tif", tmp_path / "out.tif", max_megapixels=0.005)
    assert files(tmp_path) == ["a.tif"]


@pytest.mark.parametrize("name", ["a.png", "a_color.tif"])
def test_a_photograph_is_never_overwritten(run, tmp_path, name):
    if name.endswith("tif"):
        save_pages(tmp_path / name)
    else:
        gray_photo().save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ColorizeError, match="is the photograph itself"):
        run(tmp_path / name, (tmp_path / name).with_suffix(".png"))
    assert (tmp_path / name).read_bytes() == before and files(tmp_path) == [name]


def test_compare_is_gray_beside_colour(run, tmp_path):
    gray_photo().save(tmp_path / "a.png")
    run(tmp_path / "a.png", tmp_path / "plain.png")
    run(tmp_path / "a.png", tmp_path / "both.png", compare=True)
    both, plain = Image.open(tmp_path / "both.png"), Image.open(tmp_path / "plain.png")
    left = np.asarray(both.crop((0, 0, 96, 80))).astype(int)
    assert both.size == (192, 80) and np.abs(left - np.asarray(gray_photo())[..., None]).max() <= 1
    assert both.crop((96, 0, 192, 80)).tobytes() == plain.tobytes()


@pytest.mark.parametrize("compare", [False, True])
def test_pages_and_16_bits_can_be_compared(run, tmp_path, compare):
    save_pages(tmp_path / "a.tif")
    gray_16().save(tmp_path / "b.tif")
    run(tmp_path, tmp_path / "out", compare=compare)
    a, b = (Image.open(tmp_path / "out" / name) for name in ("a_color.tif", "b_color.png"))
    assert a.n_frames == 3 and a.size == (50 * (1 + compare), 40)
    assert b.size == (90 * (1 + compare), 60)


@pytest.mark.parametrize("head, tiles", [("ab", 9), ("bins", 12)])
def test_the_sheet_has_a_tile_for_every_mood(run, checkpoints, tmp_path, head, tiles):
    gray_16().save(tmp_path / "a.png")
    run(tmp_path / "a.png", tmp_path, sheet=True, model=str(checkpoints[head]))
    sheet = Image.open(tmp_path / "a_sheet.png")
    middles = [(148 + i % 4 * 292, 148 + i // 4 * 308) for i in range(12)]
    assert sheet.size == (4 * 292 + 4, 3 * 308 + 4)
    assert sum(sheet.getpixel(middle) != (255, 255, 255) for middle in middles) == tiles


@pytest.mark.parametrize("flags", [{"mood": "warm"}, {"saturation": 2.0}, {"compare": True}])
def test_a_sheet_shows_every_mood_and_takes_no_other(run, tmp_path, flags):
    gray_photo().save(tmp_path / "a.png")
    with pytest.raises(FlagError, match="--sheet"):
        run(tmp_path / "a.png", tmp_path, sheet=True, **flags)


def test_a_mood_says_what_was_asked_and_achieved(run, tmp_path, capsys):
    gray_photo().save(tmp_path / "a.png")
    run(tmp_path / "a.png", tmp_path, mood="warm")
    asked, achieved = (tuple(map(float, pair.split(","))) for pair in re.search(
        r"mean ab (\S+) asked, (\S+) achieved", capsys.readouterr().out).groups())
    assert asked == pytest.approx(achieved, abs=1)
    assert mean_ab(Image.open(tmp_path / "a_color.png")) == pytest.approx(achieved, abs=0.3)


def test_a_colour_photograph_is_remarked_on(run, tmp_path, capsys):
    made_photo(1).save(tmp_path / "a.png")
    run(tmp_path / "a.png", tmp_path)
    assert "has colour already" in capsys.readouterr().out


# -------------------------------------------------------------------------------- folders

def test_a_folder_keeps_its_structure_and_a_second_run_does_what_is_missing(run, tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.jpg", "a.png", "deep/er/Größe 写真.png", ".hidden.png", "notes.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        gray_photo().save(source / name, "PNG")
    save_pages(source / "pages.tif")
    run(source, out)
    made = ["a.jpg_color.png", "a.png_color.png", "deep/er/Größe 写真_color.png",
            "pages_color.tif"]
    assert files(out) == made and "4 done, 0 already there, 0 failed" in capsys.readouterr().out
    (out / made[0]).unlink()
    stamp = (out / made[1]).stat().st_mtime_ns
    run(source, out)
    assert "1 done, 3 already there" in capsys.readouterr().out
    assert files(out) == made and (out / made[1]).stat().st_mtime_ns == stamp
    run(source, out, overwrite=True)
    assert "4 done, 0 already there" in capsys.readouterr().out
    assert (out / made[1]).stat().st_mtime_ns != stamp


@pytest.mark.parametrize("where", ["", "out"])
def test_results_inside_the_folder_are_not_coloured_again(run, tmp_path, where, capsys):
    gray_photo().save(tmp_path / "a.png")
    gray_photo().save(tmp_path / "b.png")
    save_pages(tmp_path / "c.tif")
    for _ in range(2):
        run(tmp_path, tmp_path / where)
    out = capsys.readouterr().out
    assert "0 done, 3 already there (--overwrite does them again), 0 failed" in out
    assert len(files(tmp_path)) == 6


def test_a_hundred_mixed_files_end_with_the_right_counts(run, tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    out.mkdir()
    for i in range(100):
        path = source / ("sub" if i % 3 else "") / f"{i}{'.png' if i % 2 else '.jpg'}"
        gray_photo(i % 5, 24 + i % 4, 32).save(path)
        if i % 10 == 7:
            path.write_bytes((path.read_bytes()[:len(path.read_bytes()) // 2], b"", b"text")[i % 3])
        if i % 10 == 9:
            target = out / path.relative_to(source).parent / f"{i}_color.png"
            target.parent.mkdir(exist_ok=True)
            target.write_text("of an earlier run")
        if i % 10 == 3:
            path.rename(path.with_suffix(".txt"))
    with pytest.raises(ColorizeError, match="10 of 90"):
        run(source, out)
    written = capsys.readouterr()
    assert "70 done, 10 already there (--overwrite does them again), 10 failed" in written.out
    assert written.err.count("error: ") == 10 and len(files(out)) == 80


def test_an_empty_folder_is_one_line(run, tmp_path):
    with pytest.raises(ColorizeError, match="no photograph"):
        run(tmp_path, tmp_path / "out")


def test_large_photographs_do_not_wait_for_each_other():
    class Fake:
        def __init__(self, megapixels, shape=(32, 48)):
            self.photo = self
            self.image = self
            self.width, self.height, self.small = megapixels * 1000, 1000, np.zeros(shape)
    many = [Fake(20)] * 4 + [Fake(1)] * 9 + [Fake(1, (1000, 1000))] * 2
    assert [len(batch) for batch in inference.batches(many)] == [3, 10, 1, 1]


# ----------------------------------------------------------------------------- full or read-only

@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "disk is full"),
                                           (errno.EROFS, "Read-only file system")])
def test_a_result_that_cannot_be_written_leaves_nothing_and_the_rest_whole(
        run, tmp_path, monkeypatch, capsys, number, words):
    for name in "abc":
        gray_photo().save(tmp_path / f"{name}.png")
    replace = os.replace

    def full(source, target):
        if Path(target).name == "b_color.png":
            raise OSError(number, os.strerror(number))
        replace(source, target)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ColorizeError, match=words):
        run(tmp_path / "b.png", tmp_path / "out")
    with pytest.raises(ColorizeError, match="1 of 3"):
        run(tmp_path, tmp_path / "out")
    assert words in capsys.readouterr().err
    assert files(tmp_path / "out") == ["a_color.png", "c_color.png"]


# ------------------------------------------------------------------------------- addresses

class Site(http.server.BaseHTTPRequestHandler):
    content = {"/photo.png": None, "/text.png": b"not a photograph", "/..%2F..%2Fup.png": None}

    def do_GET(self):
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1:1/photo.png")
            self.end_headers()
            return
        body = self.content.get(self.path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("site") / "photo.png"
    gray_photo().save(path)
    Site.content |= {"/photo.png": path.read_bytes(), "/..%2F..%2Fup.png": path.read_bytes()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path, name", [("photo.png", "photo"), ("..%2F..%2Fup.png", "up")])
def test_a_photograph_at_an_address_is_coloured(run, site, tmp_path, path, name):
    run(f"{site}/{path}", tmp_path)
    assert files(tmp_path) == [f"{name}_color.png"]
    assert Image.open(tmp_path / f"{name}_color.png").size == (96, 80)


@pytest.mark.parametrize("address, words", [
    ("{site}/missing.png", "404"), ("{site}/text.png", "photograph"), ("{site}/..", "fetched"),
    ("{site}/elsewhere", "fetched"), ("ftp://127.0.0.1/a.png", "only http"),
    ("file:///etc/hostname", "only http"), ("http://127.0.0.1:1/a.png", "fetched"),
    ("http://[bad/a.png", "fetched"), ("http:///a.png", "fetched")])
def test_an_address_that_gives_no_photograph_is_one_line(run, site, tmp_path, address, words):
    with pytest.raises(ColorizeError, match=words) as error:
        run(address.format(site=site), tmp_path)
    assert "\n" not in str(error.value) and files(tmp_path) == []


def test_a_download_has_a_limit(run, site, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "MAX_DOWNLOAD", 100)
    with pytest.raises(ColorizeError, match="over"):
        run(f"{site}/photo.png", tmp_path)


# ------------------------------------------------------------------------- hostile checkpoints

class Trap:
    """An object that would create a file when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def spoil(good: dict, kind: str, folder: Path) -> dict | Trap:
    weights = dict(good["weights"])
    name = next(iter(weights))
    if kind == "trap":
        return Trap(folder / "executed")
    if kind == "hidden trap":
        return good | {"training": {"note": Trap(folder / "executed")}}
    if kind == "wrong shape":
        weights[name] = torch.zeros(3, 3)
    if kind == "huge shape":
        weights[name] = torch.zeros(1).expand(10 ** 6, 10 ** 6)
    if kind == "missing":
        del weights[name]
    if kind == "no tensor":
        weights[name] = "text"
    if kind == "huge network":
        return good | {"model": good["model"] | {"classes": 10 ** 9}}
    return [1, 2] if kind == "list" else good | {"weights": weights}


@pytest.mark.parametrize("kind", ["trap", "hidden trap", "wrong shape", "huge shape", "missing",
                                  "no tensor", "huge network", "list", "image", "folder", "empty",
                                  "absent"])
def test_a_hostile_checkpoint_is_one_line_and_nothing_runs(run, checkpoints, tmp_path, kind):
    path, photo = tmp_path / "strange.tar", tmp_path / "a.png"
    gray_photo().save(photo)
    if kind == "image":
        gray_photo().save(path, "PNG")
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind != "absent":
        torch.save(spoil(torch.load(checkpoints["bins"], weights_only=True), kind, tmp_path), path)
    with pytest.raises(ColorizeError) as error:
        run(photo, tmp_path, model=str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "a_color.png").exists()


# --------------------------------------------------------------------------------- memory

@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's VmHWM")
def test_memory_grows_by_few_bytes_a_pixel(checkpoints, tmp_path):
    ramp = np.arange(8000, dtype=np.uint16).astype(np.uint8)
    Image.fromarray(np.tile(ramp[:4000], (2500, 1))).save(tmp_path / "10.tif")
    Image.fromarray(np.tile(ramp, (5000, 1))).save(tmp_path / "40.tif")
    code = """if True:
        import re, sys
        import inference
        for n in (10, 40):
            inference.inference(image=f"{n}.tif", output=inference.Path(f"out{n}.tif"),
                                model=sys.argv[1], size=32)
            print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    """
    out = subprocess.run([sys.executable, "-c", code, str(checkpoints["bins"])], cwd=tmp_path,
                         env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    low, high = (int(n) * 1024 for n in re.findall(r"peak (\d+)", out.stdout))
    assert (high - low) / 30e6 < 12, out.stderr
