"""Colouring one photograph, files, folders; formats, edges, memory."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import HEADS, ROOT, gray_16, gray_photo, lab, made_photo, mean_ab
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin
from skimage.io import imread

import inference
from basic_model import PRETRAINED, load_checkpoint
from controls import Controls, read_controls
from inference import colorize
from photo import ColorizeError, FlagError


@pytest.fixture
def run(checkpoints):
    """inference() with the small bins checkpoint, at a small size."""
    model = str(checkpoints["bins"])
    return lambda source, output, **flags: inference.inference(
        **{"image": [str(source)], "output": output, "model": model, "size": 32} | flags)


def files(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


# ------------------------------------------------------------------------- one photograph

@pytest.mark.parametrize("head", HEADS)
def test_both_kinds_of_checkpoint_colour(models, head):
    out = colorize(models[head], gray_photo(), 64)
    assert out.mode == "RGB" and out.size == (96, 80)
    assert np.hypot(*np.moveaxis(lab(out)[..., 1:], -1, 0)).mean() > 1


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "CMYK", "1"])
def test_a_picture_of_any_mode_is_coloured_as_the_photograph_that_it_shows(models, mode, tmp_path):
    picture = gray_photo().convert(mode)
    picture.save(tmp_path / "a.tif")
    out = colorize(models["ab"], picture, 32)
    assert out.mode == "RGB" and out.size == (96, 80)
    assert np.abs(lab(out)[..., 0] - lab(picture.convert("RGB"))[..., 0]).mean() < 0.5
    for path in (tmp_path / "a.tif", str(tmp_path / "a.tif"), Image.open(tmp_path / "a.tif")):
        assert colorize(models["ab"], path, 32).tobytes() == out.tobytes()


def test_arrays_and_16_bits_are_coloured_as_pictures_are(models):
    for picture in (gray_photo(), made_photo(2)):
        out = colorize(models["ab"], np.asarray(picture), 32)
        assert out.tobytes() == colorize(models["ab"], picture, 32).tobytes()
    out = colorize(models["ab"], np.asarray(gray_16()), 32)
    assert out.dtype == np.uint16 and (out == colorize(models["ab"], gray_16(), 32)).all()


def test_no_model_is_the_shipped_one_and_a_path_is_that_of_a_checkpoint(tmp_path):
    gray_photo().save(tmp_path / "a.png")
    shipped = load_checkpoint(PRETRAINED)[0]
    for model in (None, PRETRAINED, str(PRETRAINED)):
        out = colorize(model, str(tmp_path / "a.png"), 32)
        assert out.tobytes() == colorize(shipped, gray_photo(), 32).tobytes()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("photo", [gray_photo(1), made_photo(2)], ids=["gray", "colour"])
def test_lightness_is_kept_even_at_saturation_2(models, head, photo, tmp_path):
    colorize(models[head], photo, 64, Controls(saturation=2.0)).save(tmp_path / "out.png")
    off = np.abs(lab(Image.open(tmp_path / "out.png"))[..., 0] - lab(photo)[..., 0])
    assert off.mean() <= 0.1 and (off <= 0.4).mean() >= 0.999


def test_the_saturation_of_a_checkpoint_acts_as_the_flag_does(checkpoints):
    model = load_checkpoint(checkpoints["bins"])[0]
    flagged = colorize(model, gray_photo(7), 64, Controls(saturation=0.5))
    model.saturation = 0.5
    plain = colorize(model, gray_photo(7), 64)
    assert np.abs(np.asarray(plain).astype(int) - np.asarray(flagged)).max() <= 1


@pytest.mark.parametrize("damage", [float("nan"), 1e38])
def test_colours_that_are_not_finite_are_an_error(checkpoints, damage):
    model = load_checkpoint(checkpoints["ab"])[0]
    model.head.weight.data.fill_(damage)
    with pytest.raises(ColorizeError, match="not finite"):
        colorize(model, gray_photo(), 32)


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
    hinted = read_controls(hints="50,30,#a06040")
    whole = np.asarray(colorize(models["bins"], photo, 64, hinted)).astype(int)
    monkeypatch.setattr(inference, "STRIP", 2100)
    strips = np.asarray(colorize(models["bins"], photo, 64, hinted))
    top = 255 if strips.dtype == np.uint8 else 65535
    assert np.abs(strips - whole).max() <= max(1, 1e-3 * top) and (strips != whole).mean() < 0.5
    assert np.abs(strips - whole).mean() < 1e-4 * top


# ------------------------------------------------------------------------ extreme pictures

@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (33, 35), (4, 90)])
def test_extreme_shapes_are_coloured(models, head, size):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, size[::-1], np.uint8))
    out = colorize(models[head], photo, 64, read_controls(mood="warm"))
    assert out.size == size
    assert np.abs(lab(out)[..., 0] - lab(photo)[..., 0]).mean() < (0.15 if min(size) > 1 else 0.4)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("value", [0, 255])
def test_black_stays_black_and_white_white(models, head, value):
    out = colorize(models[head], Image.new("L", (40, 30), value), 32, read_controls(mood="golden"))
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
                                          (".tif", "TIFF"), (".webp", "WEBP")])
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
    with pytest.raises(ColorizeError, match="3 pages, which only a .tif can hold"):
        run(tmp_path / "a.tif", tmp_path / "out.jpg")
    with pytest.raises(ColorizeError, match="--max_megapixels"):
        run(tmp_path / "a.tif", tmp_path / "out.tif", max_megapixels=0.005)
    assert files(tmp_path) == ["a.tif"]


def test_a_photograph_is_never_overwritten(run, tmp_path):
    gray_photo().save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    (tmp_path / "link.png").symlink_to("a.png")
    for target in ("a.png", "link.png"):
        with pytest.raises(ColorizeError, match="is the photograph itself"):
            run(tmp_path / "a.png", tmp_path / target, overwrite=True)
    assert (tmp_path / "a.png").read_bytes() == before


def test_a_file_that_is_not_ours_is_overwritten_only_when_asked(run, tmp_path):
    gray_photo(1).save(tmp_path / "a.png")
    made_photo(1).save(tmp_path / "a_color.png")
    before = (tmp_path / "a_color.png").read_bytes()
    with pytest.raises(ColorizeError, match="no result of .*--overwrite"):
        run(tmp_path / "a.png", tmp_path)
    assert (tmp_path / "a_color.png").read_bytes() == before
    run(tmp_path / "a.png", tmp_path, overwrite=True)
    assert (tmp_path / "a_color.png").read_bytes() != before


def test_what_was_made_with_other_settings_is_made_again_and_said(run, tmp_path, capsys):
    gray_photo(1).save(tmp_path / "a.png")
    run(tmp_path / "a.png", tmp_path)
    plain, said = (tmp_path / "a_color.png").read_bytes(), capsys.readouterr().out
    assert "other settings" not in said
    run(tmp_path / "a.png", tmp_path)
    assert "1 already there with these settings" in capsys.readouterr().out
    for flags in ({"mood": "warm"}, {"size": 64}, {"invert": True}, {"saturation": 0.5}):
        run(tmp_path / "a.png", tmp_path, **flags)
        assert "in place of one made with other settings" in capsys.readouterr().out
        assert (tmp_path / "a_color.png").read_bytes() != plain
    run(tmp_path / "a.png", tmp_path)  # and back: the same bytes
    assert (tmp_path / "a_color.png").read_bytes() == plain


def test_a_result_of_another_photograph_of_that_name_is_neither_taken_nor_replaced(
        run, tmp_path, capsys):
    """Two boxes of scans are both numbered from one; old files, copied after the first run."""
    for i, box in enumerate(("one", "two")):
        (tmp_path / box).mkdir()
        for name in ("1.png", "2.png"):
            gray_photo(i).save(tmp_path / box / name)
            os.utime(tmp_path / box / name, (9, 9))
    run(tmp_path / "one", tmp_path / "out")
    before = (tmp_path / "out" / "1_color.png").read_bytes()
    for flags in ({}, {"mood": "warm"}):
        with pytest.raises(ColorizeError, match="2 of 2"):
            run(tmp_path / "two", tmp_path / "out", **flags)
        assert capsys.readouterr().err.count("is there, and no result of") == 2
    assert (tmp_path / "out" / "1_color.png").read_bytes() == before
    run(tmp_path / "two", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "1_color.png").read_bytes() != before
    (tmp_path / "two").rename(tmp_path / "three")  # and what has moved is still the same one
    run(tmp_path / "three", tmp_path / "out")
    assert "0 done, 2 already there" in capsys.readouterr().out


def test_a_negative_is_turned(run, tmp_path):
    for name, picture in (("a.png", gray_photo(1)), ("b.tif", gray_16())):
        picture.save(tmp_path / name)
        run(tmp_path / name, tmp_path / "out", invert=True)
    out = lab(Image.open(tmp_path / "out" / "a_color.png"))
    assert np.abs(out[..., 0] - lab(ImageOps.invert(gray_photo(1)))[..., 0]).mean() < 0.3
    deep = imread(tmp_path / "out" / "b_color.tif")
    assert deep.dtype == np.uint16
    assert np.abs(lab(deep)[..., 0] - lab(65535 - np.asarray(gray_16()))[..., 0]).mean() < 0.1


def test_the_grid_is_the_photograph_with_lines_at_its_coordinates(run, tmp_path):
    Image.new("L", (640, 420), 128).save(tmp_path / "a.png")
    run(tmp_path / "a.png", tmp_path, grid=True)
    grid = np.asarray(Image.open(tmp_path / "a_grid.png")).astype(int)
    assert grid.shape == (420, 640, 3)
    red = (grid[..., 0] - grid[..., 2] > 100)
    assert red[250:, 200].all() and red[200, 250:].all()
    assert not red[250, 210] and not red[:, 5].all()


def test_the_grid_of_a_panorama_has_its_coordinates(run, tmp_path):
    Image.new("I;16", (1000, 100), 30000).save(tmp_path / "a.png")
    run(tmp_path / "a.png", tmp_path, grid=True)
    grid = np.asarray(Image.open(tmp_path / "a_grid.png")).astype(int)
    assert grid.shape == (100, 1000, 3)
    red = (grid[..., 0] - grid[..., 2] > 100)
    assert red[60:, 500].all() and not red[60:, 510].any()


def test_a_variant_of_an_ab_checkpoint_is_a_mistake_in_the_flags_of_a_folder_too(
        run, tmp_path, checkpoints):
    for i in range(2):
        gray_photo(i).save(tmp_path / f"{i}.png")
    with pytest.raises(FlagError, match="--loss bins"):
        run(tmp_path, tmp_path / "out", model=str(checkpoints["ab"]), variant=1)
    assert not (tmp_path / "out").exists()


def test_format_and_suffix_name_the_results(run, tmp_path):
    gray_photo().save(tmp_path / "a.png")
    gray_photo(1).save(tmp_path / "b.tif")
    run(tmp_path, tmp_path / "out", format="jpg", suffix="x")
    assert files(tmp_path / "out") == ["a_x.jpg", "b_x.jpg"]
    assert Image.open(tmp_path / "out" / "a_x.jpg").format == "JPEG"
    run("", tmp_path / "two", image=[str(tmp_path / name) for name in ("a.png", "b.tif")])
    assert files(tmp_path / "two") == ["a_color.png", "b_color.tif"]


@pytest.mark.parametrize("size, name, compare", [
    ((40, 16384), "x.webp", False), ((8192, 40), "x.webp", True), ((32751, 40), "x.jpg", True)])
def test_sides_that_a_format_cannot_hold_are_said_before_the_work(
        run, tmp_path, monkeypatch, size, name, compare):
    monkeypatch.setattr(inference, "predict", None)
    Image.new("L", size, 99).save(tmp_path / "a.png")
    with pytest.raises(ColorizeError, match="pixels a side, not .*--format png"):
        run(tmp_path / "a.png", tmp_path / name, compare=compare)


def test_sides_that_a_format_just_holds_are_written(run, tmp_path):
    Image.new("L", (16383, 40), 99).save(tmp_path / "a.png")
    run(tmp_path / "a.png", tmp_path / "x.webp")
    assert Image.open(tmp_path / "x.webp").size == (16383, 40)


def test_a_file_as_output_and_a_format_contradict_each_other(run, tmp_path):
    gray_photo().save(tmp_path / "a.png")
    with pytest.raises(FlagError, match="no --format"):
        run(tmp_path / "a.png", tmp_path / "x.png", format="jpg")


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
    kind = "compare" if compare else "color"
    a, b = (Image.open(tmp_path / "out" / f"{name}_{kind}.tif") for name in "ab")
    assert a.n_frames == 3 and a.size == (50 * (1 + compare), 40)
    assert b.size == (90 * (1 + compare), 60)


@pytest.mark.parametrize("head, tiles", [("ab", 9), ("bins", 13)])
def test_the_sheet_has_a_tile_for_every_mood_and_variants(run, checkpoints, tmp_path, head, tiles):
    gray_photo(0, 60, 60).save(tmp_path / "a.png")
    run(tmp_path / "a.png", tmp_path, sheet=True, model=str(checkpoints[head]))
    sheet = Image.open(tmp_path / "a_sheet.png")
    middles = [(148 + i % 5 * 292, 148 + i // 5 * 308) for i in range(-(-tiles // 5) * 5)]
    assert sheet.size == (5 * 292 + 4, -(-tiles // 5) * 308 + 4)
    assert sum(sheet.getpixel(middle) != (255, 255, 255) for middle in middles) == tiles


def test_hints_are_for_one_photograph(photos, run, tmp_path):
    with pytest.raises(FlagError, match="one photograph"):
        run(photos / "val", tmp_path, hints="1,1,#ff0000")
    one, two = gray_photo(1), gray_photo(2)
    one.save(tmp_path / "pages.tif", save_all=True, append_images=[two])
    with pytest.raises(FlagError, match="one photograph, .*pages.tif has 2 pages; export"):
        run(tmp_path / "pages.tif", tmp_path, hints="1,1,#ff0000")
    assert files(tmp_path) == ["pages.tif"]


@pytest.mark.parametrize("flags", [{"mood": "warm"}, {"variant": 2}, {"compare": True}])
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


def test_what_dabs_take_from_a_mood_is_not_called_out_of_reach(run, tmp_path, capsys):
    copy = gray_photo(1).convert("RGB")
    gray_photo(1).save(tmp_path / "a.png")
    copy.paste("#4060d0", (10, 10, 60, 60))
    copy.save(tmp_path / "dabs.png")
    run(tmp_path / "a.png", tmp_path, mood="golden", hints=str(tmp_path / "dabs.png"))
    said = capsys.readouterr().out
    asked, achieved = (np.array(pair.split(","), float) for pair in re.search(
        r"mean ab (\S+) asked, (\S+) achieved", said).groups())
    assert np.linalg.norm(asked - achieved) > 1 and "out of reach" not in said


def test_a_colour_photograph_is_remarked_on(run, tmp_path, capsys):
    made_photo(1).save(tmp_path / "a.png")
    run(tmp_path / "a.png", tmp_path)
    assert "has colour already" in capsys.readouterr().out


# -------------------------------------------------------------------------------- folders

def test_a_folder_keeps_its_structure_and_a_second_run_does_what_is_missing(run, tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    for i, name in enumerate(("a.jpg", "a.png", "a.jpg.png", "deep/er/Größe 写真.png", ".hid.png",
                              "note.txt")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        gray_photo(i).save(source / name, "PNG")
    save_pages(source / "pages.tif")
    run(source, out)
    made = ["a.jpg.png_color.png", "a.jpg_color.png", "a.png_color.png",
            "deep/er/Größe 写真_color.png", "pages_color.tif"]
    assert files(out) == made and "5 done, 0 already there" in capsys.readouterr().out
    assert len({(out / name).read_bytes() for name in made}) == 5
    (out / made[0]).unlink()
    stamp = (out / made[1]).stat().st_mtime_ns
    run(source, out)
    assert "1 done, 4 already there" in capsys.readouterr().out
    assert files(out) == made and (out / made[1]).stat().st_mtime_ns == stamp
    run(source, out, overwrite=True)
    assert "5 done, 0 already there" in capsys.readouterr().out
    assert (out / made[1]).stat().st_mtime_ns != stamp


def test_results_whose_names_differ_by_case_alone_do_not_meet_where_that_is_no_difference(
        run, tmp_path):
    """As on the disks of Windows and of Macs: the second was taken for done."""
    for name in ("IMG_1.JPG", "img_1.png", "b.png"):
        gray_photo().save(tmp_path / name, "PNG")
    run(tmp_path, tmp_path / "out")
    assert files(tmp_path / "out") == ["IMG_1.JPG_color.png", "b_color.png", "img_1.png_color.png"]


def test_a_photograph_that_has_the_name_of_anothers_result_is_not_replaced_by_it(run, tmp_path):
    """As one that another program has coloured; --overwrite asks for results to be made again."""
    for i, name in enumerate(("a.png", "a_color.png")):
        made_photo(i).save(tmp_path / name)
    before = (tmp_path / "a_color.png").read_bytes()
    for _ in range(2):
        run(tmp_path, tmp_path, overwrite=True)
        assert (tmp_path / "a_color.png").read_bytes() == before
        assert files(tmp_path) == ["a.png", "a.png_color.png", "a_color.png",
                                   "a_color_color.png"]


def test_a_photograph_in_a_folder_gets_the_bytes_that_it_gets_alone(run, tmp_path):
    for i, size in enumerate([(96, 80), (96, 80), (50, 200), (33, 35)]):
        gray_photo(i, *size).save(tmp_path / f"{i}.png")
    run(tmp_path, tmp_path / "together", mood="warm")
    for i in range(4):
        run(tmp_path / f"{i}.png", tmp_path / "alone", mood="warm")
        both = [(tmp_path / way / f"{i}_color.png").read_bytes() for way in ("together", "alone")]
        assert both[0] == both[1]


@pytest.mark.parametrize("where", ["", "out"])
def test_results_are_not_coloured_again_even_when_their_photograph_is_gone(
        run, tmp_path, where, capsys):
    for name in ("a.png", "b.png"):
        gray_photo().save(tmp_path / name)
    save_pages(tmp_path / "c.tif")
    for _ in range(2):
        run(tmp_path, tmp_path / where)
    out = capsys.readouterr().out
    assert "0 done, 3 already there with these settings" in out and "0 failed" in out
    (tmp_path / "a.png").rename(tmp_path / where / "moved")
    run(tmp_path, tmp_path / where, mood="warm")
    assert "2 done, 0 already there" in capsys.readouterr().out
    run(tmp_path, tmp_path / "elsewhere")  # results lie below the folder, of any name
    assert files(tmp_path / "elsewhere") == ["b_color.png", "c_color.tif"]
    assert not [name for name in files(tmp_path) if "color_color" in name]


def test_thirty_mixed_files_end_with_the_right_counts(run, tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    out.mkdir()
    for i in range(30):
        path = source / ("sub" if i % 3 else "") / f"{i}{'.png' if i % 2 else '.jpg'}"
        gray_photo(i % 5, 24 + i % 4, 32).save(path)
        if i % 10 == 7:
            path.write_bytes((path.read_bytes()[:len(path.read_bytes()) // 2], b"", b"text")[i % 3])
        if i % 10 == 9:
            target = out / path.relative_to(source).parent / f"{i}_color.png"
            target.parent.mkdir(exist_ok=True)
            target.write_text("not ours")
        if i % 10 == 3:
            path.rename(path.with_suffix(".txt"))
    (source / ("long" * 62 + ".png")).write_bytes((source / "0.jpg").read_bytes())
    with pytest.raises(ColorizeError, match="7 of 28"):
        run(source, out)
    written = capsys.readouterr()
    assert "21 done, 0 already there with these settings, 7 failed" in written.out
    assert written.err.count("error: ") == 7 and len(files(out)) == 24
    assert written.err.count("is there, and no result of") == 3 and "255 bytes" in written.err


def test_an_empty_folder_and_one_file_for_many_are_one_line(photos, run, tmp_path):
    with pytest.raises(ColorizeError, match="no photograph"):
        run(tmp_path, tmp_path / "out")
    with pytest.raises(ColorizeError, match="is one file for 4 photographs.*or make that one"):
        run(photos / "val", tmp_path / "out.png")
    with pytest.raises(ColorizeError, match="v1.3: '.3' is no .*, or make that folder"):
        run(photos / "val" / "round" / "9.png", tmp_path / "v1.3")


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


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/a.png", "file:///etc/hostname"])
def test_an_address_is_told_from_a_missing_file(tmp_path, address):
    with pytest.raises(ColorizeError, match=f"{address}: is an address; download it"):
        inference.inference(image=[address], output=tmp_path)


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
            inference.inference(image=[f"{n}.tif"], output=inference.Path(f"out{n}.tif"),
                                model=sys.argv[1], size=32)
            print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    """
    out = subprocess.run([sys.executable, "-c", code, str(checkpoints["bins"])], cwd=tmp_path,
                         env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    low, high = (int(n) * 1024 for n in re.findall(r"peak (\d+)", out.stdout))
    assert (high - low) / 30e6 < 12, out.stderr


# ------------------------------------------------------------------ where things may lie

def test_an_output_above_the_photographs_hides_none_and_one_below_them_holds_results(
        run, tmp_path):
    """Also those that another program has retouched, and that no longer say what they are."""
    (tmp_path / "scans" / "out").mkdir(parents=True)
    gray_photo(1).save(tmp_path / "scans" / "a.png")
    run(tmp_path / "scans", tmp_path)
    gray_photo(2).save(tmp_path / "scans" / "out" / "retouched.png")
    run(tmp_path / "scans", tmp_path / "scans" / "out")
    assert files(tmp_path) == ["a_color.png", "scans/a.png", "scans/out/a_color.png",
                               "scans/out/retouched.png"]


@pytest.mark.parametrize("image", [
    np.zeros((9, 9)), np.zeros((9, 9, 3), np.float32), np.zeros((9, 9), np.int32),
    np.zeros((9, 9), bool), np.zeros((9, 9, 3), np.uint16), np.zeros((9, 9, 2), np.uint8),
    np.zeros((3, 9, 9), np.uint8), np.zeros((1, 9, 9, 3), np.uint8), np.zeros(9, np.uint8),
    np.zeros((0, 9), np.uint8), np.uint8(9), Image.new("L", (9, 0)), None, [[1, 2], [3, 4]]],
    ids=lambda image: f"{type(image).__name__} {np.shape(image)}")
def test_what_is_no_picture_is_refused_in_words_and_not_taken_for_a_dark_one(models, image):
    with pytest.raises(ColorizeError, match="uint8 .H, W. or .H, W, 3., or uint16"):
        colorize(models["ab"], image, 32)


@pytest.mark.parametrize("flags", [{"mood": "warm"}, {"hints": "5,5,#ff0000"}, {"saturation": 2.0}])
def test_a_grid_takes_no_colours_that_it_would_not_show(run, tmp_path, flags):
    gray_photo().save(tmp_path / "a.png")
    with pytest.raises(FlagError, match="--grid .*leave"):
        run(tmp_path / "a.png", tmp_path, grid=True, **flags)


@pytest.mark.parametrize("flags, name", [
    ({"compare": True, "suffix": "x"}, "a_x.png"), ({"grid": True, "suffix": "x"}, "a_x.png"),
    ({"compare": True}, "a_compare.png")])
def test_a_suffix_is_that_of_every_kind_of_result(run, tmp_path, flags, name):
    gray_photo().save(tmp_path / "a.png")
    run(tmp_path / "a.png", tmp_path / "out", **flags)
    assert files(tmp_path / "out") == [name]
