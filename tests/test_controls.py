"""What moves colours: tilts, moods, mean colour, reference, variants, hints, dabs."""

from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from conftest import HEADS, gray_16, gray_photo, lab, made_photo, mean_ab
from PIL import Image, ImageDraw
from skimage.color import lab2rgb, rgb2lab
from skimage.measure import block_reduce

import controls
import inference
from controls import MOODS, Controls, fixed_dabs, fixed_points, read_controls, read_hints, tilt
from photo import ColorizeError, FlagError


def colorize(model, photo, size=64, **flags):
    return inference.colorize(model, photo, size, read_controls(**flags))


# ------------------------------------------------------------------------------ tilting

def tilted_by(before: np.ndarray, after: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """The lambda (2,) that made one distribution of the other: p' ~ p exp(lambda . c)."""
    unknowns = np.column_stack([colors, np.ones(len(colors))])  # the last: their normalization
    *vector, _ = np.linalg.lstsq(unknowns, np.log(after / before), rcond=None)[0]
    return np.array(vector)


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
    moved = tilt(probability[None], colors, np.array([target, 0.0]))[0]
    assert tilted_by(probability, moved, colors) == pytest.approx([low, 0], abs=1e-4)
    assert moved @ line == pytest.approx(target, abs=0.03)


def test_gradient_of_the_tilted_mean_is_the_covariance():
    random = np.random.default_rng(0)
    colors, probability = random.uniform(-80, 80, (40, 2)), random.dirichlet(np.ones(40), 30)
    near = tilt(probability, colors, np.array([6.0, -3.0]))
    far = tilt(probability, colors, np.array([6.5, -3.2]))
    at, beyond = (tilted_by(probability[0], moved[0], colors) for moved in (near, far))
    middle = (near + far) / 2
    means = middle @ colors
    covariance = np.einsum("pq,qi,qj->ij", middle, colors, colors) / 30 - means.T @ means / 30
    gained = (far @ colors).mean(axis=0) - (near @ colors).mean(axis=0)
    assert gained == pytest.approx(covariance @ (beyond - at), rel=0.02)


def test_what_gamut_takes_from_the_mean_is_made_up_for():
    L = np.linspace(5, 95, 60 * 40, dtype=np.float32).reshape(40, 60)
    ab, wanted = controls.apply_controls(np.zeros((2, 40, 60), np.float32), L, None,
                                         Controls(target=(5.0, 25.0)))
    rgb = lab2rgb(np.concatenate([L[..., None], controls.into_gamut(L, ab)], axis=-1))
    assert rgb2lab(rgb)[..., 1:].mean(axis=(0, 1)) == pytest.approx([5, 25], abs=0.5)
    assert wanted == pytest.approx([5, 25])


# ---------------------------------------------------------------- moods, mean, reference

@pytest.mark.parametrize("flags", [{"saturation": 1.0}, {"hints": ""}, {"variant": 0},
                                   {"mood": "warm", "strength": 0.0},
                                   {"mean_color": "20,20", "strength": 0.0},
                                   {"variant": 5, "strength": 0.0}], ids=str)
def test_neutral_settings_change_no_bit(models, flags):
    plain = colorize(models["bins"], gray_photo())
    assert plain.tobytes() == colorize(models["bins"], gray_photo(), **flags).tobytes()


TARGETS = ["20,0", "0,20", "-14,0", "0,-20", "14,14", "5,2"]


@pytest.mark.parametrize("head", HEADS)
def test_the_mean_asked_for_is_achieved_or_said_to_be_out_of_reach(models, head, monkeypatch):
    photo, model, achieved = gray_photo(1, 64, 48), models[head], 0
    prediction = inference.predict(model, photo, 32)
    for target in TARGETS:
        wish = np.array(target.split(","), float)
        picture, mean, wanted = inference.add_color(model, photo, prediction,
                                                    read_controls(mean_color=target))
        assert wanted == pytest.approx(wish) and mean == pytest.approx(mean_ab(picture), abs=0.3)
        achieved += np.linalg.norm(mean_ab(picture) - wish) <= 1
    assert achieved >= 5


def test_its_own_output_as_reference_changes_little(models, tmp_path):
    plain = colorize(models["bins"], gray_photo(3, 160, 120))
    plain.save(tmp_path / "own.png")
    again = colorize(models["bins"], gray_photo(3, 160, 120), reference=tmp_path / "own.png")
    assert np.hypot(*np.moveaxis(lab(again) - lab(plain), -1, 0)[1:]).mean() < 1


def test_a_reference_gives_its_mean_and_may_be_of_16_bits(models, tmp_path):
    for reference in (made_photo(5), gray_16()):
        reference.save(tmp_path / "reference.png")
        out = colorize(models["bins"], gray_photo(6), reference=tmp_path / "reference.png")
        expected = mean_ab(reference) if reference.mode == "RGB" else [0, 0]
        assert mean_ab(out) == pytest.approx(expected, abs=1.5)


def test_a_reference_of_wider_colours_spreads_them(models, tmp_path):
    def spread(image):
        return np.sqrt(lab(image)[..., 1:].var(axis=(0, 1)).sum())
    plain = colorize(models["bins"], gray_photo(3), saturation=0.2)
    made_photo(5).save(tmp_path / "wide.png")
    wide = colorize(models["bins"], gray_photo(3), saturation=0.2,
                    reference=tmp_path / "wide.png")
    assert spread(made_photo(5)) > 3 * spread(plain) and spread(wide) > 1.5 * spread(plain)


def test_half_the_strength_goes_half_the_way(models):
    plain, half, whole = (
        mean_ab(colorize(models["bins"], gray_photo(4), mean_color="8,12", strength=strength))
        for strength in (0.0, 0.5, 1.0))
    assert half == pytest.approx((plain + whole) / 2, abs=1)


def test_saturation_scales_the_colours_and_overrides_that_of_a_mood(models):
    def chroma(**flags):
        ab = lab(colorize(models["bins"], gray_photo(7), **flags))[..., 1:]
        return np.hypot(*np.moveaxis(ab, -1, 0)).mean()
    assert chroma(saturation=0.0) < 0.5
    assert chroma(saturation=0.5) == pytest.approx(chroma() / 2, rel=0.1)
    assert read_controls(mood="sepia", saturation=0.9).saturation == 0.9


def test_warm_is_warmer_and_the_help_names_every_mood(models):
    assert (mean_ab(colorize(models["bins"], gray_photo(8), mood="warm"))
            - mean_ab(colorize(models["bins"], gray_photo(8))))[1] > 5
    mood = get_type_hints(inference.inference)["mood"]
    assert set(get_args(get_args(mood)[0])) == set(MOODS)


@pytest.mark.parametrize("flags", [
    {"mood": "warm", "mean_color": "1,2"}, {"mood": "warm", "reference": "x.png"},
    {"mean_color": "1,2", "reference": "x.png"}, {"strength": 0.5}, {"mood": "angry"},
    {"mean_color": "1,2,3"}, {"mean_color": "200,0"}, {"mean_color": "nan,1"},
    {"mean_color": "nocolour"}, {"mean_color": "x,1", "strength": 0.0},
    {"hints": "1,2"}, {"hints": "1.5,2,#ffffff"}, {"hints": "1,2,#zzzzzz"},
    {"hints": "1,2,rgb(300,0,0)"}, {"hints": "1,2,rgb(0,0,999)"}], ids=str)
def test_flags_that_make_no_sense_are_refused_in_one_line(flags):
    with pytest.raises(FlagError, match="--") as error:
        read_controls(**flags)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------- variants

def made_distributions() -> tuple:
    """Log-probabilities (9, 8, 8): the left half certain of one bin, the right half open."""
    steps = np.arange(-1, 2) * 30.0
    bins = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(9, 2).astype(np.float32)
    values = np.full((9, 8, 8), 1e-6)
    values[2, :, :4], values[:, :, 4:] = 1, 1 / 9
    return np.log(values / values.sum(axis=0)).astype(np.float32), bins


def mean_of(log_probability, bins):
    return np.einsum("qhw,qc->hwc", np.exp(log_probability), bins) \
        / np.exp(log_probability).sum(axis=0)[..., None]


def test_a_variant_moves_what_is_open_and_leaves_what_is_certain():
    values, bins = made_distributions()
    likeness, places = np.full((4, 4), 0.05, np.float32) + 0.8 * np.eye(4, dtype=np.float32), (2, 2)
    out = {n: mean_of(controls.vary(values, bins, likeness, places, 1.0, Controls(variant=n)), bins)
           for n in (1, 2)}
    assert out[1][:, :3] == pytest.approx(mean_of(values, bins)[:, :3], abs=0.05)
    assert np.abs(out[1][:, 5:]).max() > 3 and np.abs(out[1] - out[2])[:, 5:].max() > 3
    none = controls.vary(values, bins, likeness, places, 1.0, Controls(variant=1, strength=0.0))
    assert (none == values).all()


def test_the_same_variant_is_the_same_picture_and_another_one_is_not(models):
    zero, one, again, two = (colorize(models["bins"], gray_photo(2), variant=n).tobytes()
                             for n in (0, 1, 1, 2))
    assert one == again and len({zero, one, two}) == 3
    with pytest.raises(FlagError, match="--variant.*--loss bins"):
        colorize(models["ab"], gray_photo(), variant=1)


# ---------------------------------------------------------------------------------- hints

WANTED = rgb2lab(np.array([[[190, 160, 180]]], np.uint8))[0, 0, 1:]  # of #bea0b4


def two_sides(factor=1) -> np.ndarray:
    """L of a flat light shape on a flat dark ground."""
    L = np.full((48, 64), 45, np.float32)
    L[10:38, 12:40] = 70
    return L.repeat(factor, axis=0).repeat(factor, axis=1)


def picture_of(L) -> Image.Image:
    """A gray photograph of this L, by scikit-image."""
    gray = lab2rgb(np.stack([L, 0 * L, 0 * L], axis=-1))[..., 0]
    return Image.fromarray(np.rint(gray * 255).astype(np.uint8))


def halves(shape, places) -> tuple:
    """A likeness in which the left and the right half of the places have nothing in common."""
    side = (np.arange(places[1]) < places[1] // 2).repeat(1)
    side = np.tile(side, places[0])
    like = (side[:, None] == side).astype(np.float32)
    return like / like.sum(axis=1, keepdims=True), places


def test_a_hint_fills_its_object_and_stops_at_the_outline():
    L = two_sides()
    fixed, wanted = fixed_points([(20, 20, 30, -20)], picture_of(L), L)
    places = (48, 64)  # each pixel is a place: alike where the lightness is
    like = (L.ravel()[:, None] == L.ravel()).astype(np.float32)
    ab = controls.propagate_hints(L, np.zeros((48, 64, 2), np.float32), fixed, wanted,
                                  like / like.sum(axis=1, keepdims=True), places)
    assert ab[L == 70] == pytest.approx(np.tile([30, -20], ((L == 70).sum(), 1)), abs=1.5)
    assert np.abs(ab[L == 45]).max() < 1


def test_a_hint_stays_on_its_side_of_equal_lightness_when_features_differ():
    L = np.full((40, 160), 50, np.float32)
    fixed, wanted = fixed_points([(30, 20, 30, -20)], picture_of(L), L)
    ab = controls.propagate_hints(L, np.zeros((40, 160, 2), np.float32), fixed, wanted,
                                  *halves(L.shape, (5, 20)))
    assert ab[:, :60, 0].min() > 24 and np.abs(ab[:, 130:]).max() < 3


@pytest.mark.parametrize("factor", [1, 5])
def test_a_hint_is_met_and_the_other_side_stays(shipped, factor):
    """Also where the network works at a fifth of the photograph's size."""
    photo = picture_of(two_sides(factor))
    plain = lab(colorize(shipped, photo, 96))
    x, y = 21 * factor, 19 * factor
    out = lab(colorize(shipped, photo, 96, hints=f"{x},{y},#bea0b4"))
    assert out[y, x, 1:] == pytest.approx(WANTED, abs=1)
    change = (out - plain)[..., 1:]
    rows, columns = np.arange(48 * factor)[:, None] / factor, np.arange(64 * factor) / factor
    inside = (abs(rows - 23.5) < 12) & (abs(columns - 25.5) < 12)
    outside = (abs(rows - 23.5) > 18) | (abs(columns - 25.5) > 18)
    assert change[inside].mean(axis=0) == pytest.approx(change[y, x], abs=5)
    assert np.linalg.norm(change[y, x]) > 12 and np.abs(change[outside]).max() < 2


def test_five_hints_on_a_pole_four_pixels_wide_do_not_add_up(models):
    L = np.full((200, 300), 40, np.float32)
    L[:, 148:152] = 65
    hints = "; ".join(f"{148 + i % 4},{60 + 20 * i},#bea0b4" for i in range(5))
    out = lab(colorize(models["ab"], picture_of(L), 32, hints=hints))
    for i in range(5):
        assert out[60 + 20 * i, 148 + i % 4, 1:] == pytest.approx(WANTED, abs=1)
    assert out[60:140, 149:151, 1:].mean(axis=(0, 1)) == pytest.approx(WANTED, abs=3)


def test_two_unlike_hints_side_by_side_invent_no_third_colour(models):
    """A fitted sum of bumps must not swing out beyond what was asked."""
    photo = picture_of(np.full((300, 400), 60, np.float32))
    out = lab(colorize(models["ab"], photo, 32, hints="200,150,#b08080; 204,150,#8090b0"))
    one, other = (rgb2lab(np.array([[color]], np.uint8))[0, 0, 1:]
                  for color in ((0xb0, 0x80, 0x80), (0x80, 0x90, 0xb0)))
    assert out[150, 200, 1:] == pytest.approx(one, abs=3)
    assert out[150, 204, 1:] == pytest.approx(other, abs=3)
    most = max(np.hypot(*one), np.hypot(*other))
    assert np.hypot(*np.moveaxis(out, -1, 0)[1:]).max() < 1.3 * most


def test_a_hint_is_met_in_fine_texture(models):
    """Pixels that the network's small copy does not show."""
    texture = np.random.default_rng(0).integers(90, 170, (300, 400), np.uint8)
    out = lab(colorize(models["ab"], Image.fromarray(texture), 32, hints="200,150,#bea0b4"))
    assert out[150, 200, 1:] == pytest.approx(WANTED, abs=1)


def test_spreading_is_the_minimum_that_a_dense_solver_finds():
    """Of sum w (d_r - d_s)^2 + p sum (d - t)^2 with d given at the hint."""
    random, shape = np.random.default_rng(0), (9, 12)
    L, ab = random.uniform(20, 30, shape), random.normal(0, 5, (*shape, 2)).astype(np.float32)
    fixed, wanted = np.zeros(shape, bool), np.zeros((*shape, 2), np.float32)
    fixed[2:4, 3], wanted[2:4, 3] = True, (30, -20)
    like = random.uniform(0.001, 1, (6, 6)) + np.eye(6)
    made = controls.propagate_hints(L.astype(np.float32), ab, fixed, wanted, like, (2, 3))
    member, colors = controls.belonging(L.astype(np.float32), fixed, wanted, like, (2, 3))
    number, p = np.arange(108).reshape(shape), controls.HINT_PULL
    matrix, target = np.eye(108) * p, p * (member * (colors - ab.transpose(2, 0, 1))).reshape(2, -1).T
    for r, s in [*zip(number[1:].flat, number[:-1].flat), *zip(number[:, 1:].flat, number[:, :-1].flat)]:
        w = max(np.exp(-(L.flat[r] - L.flat[s]) ** 2 / 100 ** 2 / (2 * controls.HINT_SIGMA ** 2)), 1e-6)
        matrix[[r, s], [r, s]] += w
        matrix[[r, s], [s, r]] -= w
    matrix[fixed.ravel()] = np.eye(108)[fixed.ravel()]
    target[fixed.ravel()] = (wanted - ab)[fixed]
    assert (made - ab).reshape(-1, 2) == pytest.approx(np.linalg.solve(matrix, target), abs=0.1)


@pytest.mark.parametrize("hints", ["96,0,#808080", "0,-1,#808080"])
def test_a_hint_outside_the_photograph_is_refused(models, hints):
    with pytest.raises(FlagError, match="outside the photograph, which is 96x80"):
        colorize(models["bins"], gray_photo(), hints=hints)


def test_a_text_file_of_hints_is_what_the_flag_would_say(tmp_path):
    (tmp_path / "hints.txt").write_text("\ufeff3,4,#bea0b4\n\n 5,6,rgb(1,2,3); 7,8,red\n", "utf-8")
    points, dabs = read_hints(str(tmp_path / "hints.txt"))
    assert points == read_hints("3,4,#bea0b4; 5,6,rgb(1,2,3); 7,8,#ff0000")[0] and dabs is None
    assert points[0] == pytest.approx((3, 4, *WANTED), abs=0.01)
    for name in ("none.txt", "none.png", "5"):
        with pytest.raises(ColorizeError, match=name):
            read_hints(str(tmp_path / name))


# ----------------------------------------------------------------------------------- dabs

def dab(photo, folder, kind) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A copy with a blue ellipse, a gray line and a red one, as read; where, and rgb there."""
    copy, mask = photo.convert("RGB"), Image.new("RGB", photo.size)
    for picture in (copy, mask):
        draw = ImageDraw.Draw(picture)
        draw.ellipse((40, 40, 90, 70), "#4060d0")
        draw.line((150, 30, 220, 90), "#c02020", 14)
        draw.line((60, 150, 200, 150), "#808080", 14)
    path = folder / f"dabs.{kind}"
    if kind == "png":  # as another program would reduce it
        copy = copy.resize((photo.width // 2, photo.height // 2), Image.Resampling.LANCZOS)
    copy.save(path, quality=85)
    (_, copy), rgb = read_hints(str(path)), np.asarray(mask)
    return copy, rgb.any(axis=-1), rgb


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_dabs_are_found_where_they_were_painted_and_nowhere_else(tmp_path, kind):
    grain = np.random.default_rng(0).normal(0, 6, (200, 300))
    photo = np.clip(np.asarray(gray_photo(4, 300, 200)) * 0.4 + 130 + grain, 0, 255)
    photo = Image.fromarray(photo.astype(np.uint8))
    copy, mask, rgb = dab(photo, tmp_path, kind)
    fixed, wanted = fixed_dabs(copy, photo, (200, 300))
    assert (fixed & ~mask).sum() < 10 and fixed.sum() > 0.6 * mask.sum()
    fixed &= mask
    expected = rgb2lab(rgb)[fixed][:, 1:]
    assert np.abs(wanted[fixed] - expected).mean() < 3  # the chroma of JPEG is half as large
    gray = fixed & (rgb[..., 0] == 128)
    assert gray.sum() > 500 and np.abs(wanted[gray]).mean() < 2


@pytest.mark.parametrize("below", [(0, 0, 0, 0), (255, 255, 255, 0)])
def test_dabs_on_a_clear_layer_are_those_on_a_copy(tmp_path, below):
    photo, dabbed = gray_photo(4, 300, 200), []
    for picture in (photo.convert("RGB"), Image.new("RGBA", photo.size, below)):
        ImageDraw.Draw(picture).rectangle((40, 40, 90, 70), "#4060d0")
        picture.save(tmp_path / "dabs.png")
        dabbed.append(fixed_dabs(read_hints(str(tmp_path / "dabs.png"))[1], photo, (200, 300)))
    assert all(np.array_equal(*pair) for pair in zip(*dabbed))


def test_in_the_texture_of_a_panorama_nothing_is_taken_for_a_dab():
    texture = np.random.default_rng(0).integers(0, 256, (25, 400), np.uint8)
    photo = Image.fromarray(texture).resize((1600, 100), Image.Resampling.NEAREST)  # 16 to 1
    copy = photo.convert("RGB")
    ImageDraw.Draw(copy).rectangle((800, 20, 879, 79), "#4060d0")
    fixed, _ = fixed_dabs(copy, photo, (64, 1024))
    assert fixed[14:50, 514:560].all() and fixed.sum() < 2200  # 51 x 38 pixels


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_dabs_colour_what_they_lie_on_and_not_the_rest(shipped, tmp_path, kind):
    photo = picture_of(two_sides(5))
    copy = photo.convert("RGB")
    ImageDraw.Draw(copy).ellipse((90, 80, 140, 130), "#bea0b4")
    copy.resize((160, 120) if kind == "png" else copy.size).save(tmp_path / f"d.{kind}", quality=85)
    plain = lab(colorize(shipped, photo, 96))
    out = lab(colorize(shipped, photo, 96, hints=str(tmp_path / f"d.{kind}")))
    assert out[70:180, 80:180, 1:].mean(axis=(0, 1)) == pytest.approx(WANTED, abs=4)
    assert np.abs((out - plain)[:, 240:, 1:]).max() < 2


def test_a_picture_that_is_no_dabbed_copy_is_refused_in_one_line(models, tmp_path):
    gray_photo(0, 96, 60).save(tmp_path / "other.png")
    gray_photo().convert("RGB").save(tmp_path / "bare.jpg", quality=85)
    for name, words in (("other.png", "96x60, not of the photograph's shape 96x80"),
                        ("bare.jpg", "no dab found")):
        with pytest.raises(FlagError, match=f"--hints: .*{words}") as error:
            colorize(models["bins"], gray_photo(), hints=str(tmp_path / name))
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------- alike places

def test_alike_places_agree_and_unlike_ones_do_not():
    random = np.random.default_rng(0)
    L = np.full((64, 64), 40, np.float32)
    L[:, 32:] = 80
    features = torch.zeros(1, 8, 8, 8)
    features[:, 0, :, :4], features[:, 1, :, 4:] = 1, 1
    likeness, places = controls.likeness_of(L, [features, features])
    assert places == (8, 8)
    assert likeness.sum(axis=1) == pytest.approx(np.ones(64), abs=1e-5)
    flat = np.full((3, 16, 16), 7, np.float32)
    assert controls.agree(flat, likeness, places) == pytest.approx(flat, abs=1e-4)
    values = random.normal(size=(2, 16, 16)).astype(np.float32)
    values[..., 8:] += 20  # the other half is elsewhere, and stays there
    agreed = controls.agree(values, likeness, places)
    left, right = agreed[..., :7], agreed[..., 9:]
    assert left.mean() == pytest.approx(0, abs=0.3) and right.mean() == pytest.approx(20, abs=0.3)

    def coarse(values):
        return block_reduce(values[..., :6], (1, 2, 2), np.mean).std()
    assert coarse(agreed) < 0.6 * coarse(values)


def test_a_mood_tints_what_is_certain_less_than_what_is_not():
    """0.3 of the way is made by the uncertain half alone, 0.7 by both: 0.7 and 1.3 of it."""
    bins = np.array([(a, b) for a in (-20, 0, 20) for b in (-20, 0, 20)], np.float32)
    probability = np.full((9, 16, 32), 1 / 9, np.float32)
    probability[:, :, :16] = (np.arange(9) == 4)[:, None, None]  # gray for certain
    L = np.full((64, 128), 50, np.float32)
    ab, wanted = controls.apply_controls(probability, L, bins, Controls(shift=(4, 8)))
    certain, open_ = ab[:, :48].mean(axis=(0, 1)), ab[:, 80:].mean(axis=(0, 1))
    assert wanted == pytest.approx([4, 8])
    assert certain == pytest.approx([2.8, 5.6], rel=0.05)
    assert open_ == pytest.approx([5.2, 10.4], rel=0.05)


@pytest.mark.parametrize("content", ["", "\n \n", ";;\n"])
def test_a_text_file_without_a_hint_is_an_error(tmp_path, content):
    (tmp_path / "hints.txt").write_text(content)
    with pytest.raises(FlagError, match="hints.txt.*holds 0 points"):
        read_hints(str(tmp_path / "hints.txt"))
    assert read_controls(hints="") == Controls()  # as where the flag is not given
