"""Scores against independent computations; patchiness by hand; the report; curves."""

import csv
import io
import json
import math
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from conftest import made_photo
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import evaluate
import photo
from evaluate import score, summarize
from photo import ColorizeError, Photo, write_photo

TRUTH, MADE = np.asarray(made_photo(0)), np.asarray(made_photo(1))
GRAY = np.asarray(made_photo(0).convert("L").convert("RGB"))


def files(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


# --------------------------------------------------------------------------------- scores

def hasler_suesstrunk(rgb):
    """Section 7 of the paper, pixel by pixel."""
    pixels = rgb.reshape(-1, 3).astype(float)
    rg = [r - g for r, g, b in pixels]
    yb = [0.5 * (r + g) - b for r, g, b in pixels]
    deviation = math.sqrt(np.var(rg) + np.var(yb))
    return deviation + 0.3 * math.sqrt(np.mean(rg) ** 2 + np.mean(yb) ** 2)


def zhang_auc(lab, true_lab):
    """The share of pixels within t of the truth, for each t, integrated and divided by 150."""
    error = np.sqrt(((lab - true_lab)[..., 1:] ** 2).sum(axis=-1))
    shares = [(error <= t).mean() for t in range(151)]
    return sum((shares[t] + shares[t + 1]) / 2 for t in range(150)) / 150


INDEPENDENT = {
    "psnr": lambda a, b: peak_signal_noise_ratio(b, a, data_range=255),
    "ssim": lambda a, b: structural_similarity(b, a, channel_axis=-1, data_range=255),
    "ciede2000": lambda a, b: deltaE_ciede2000(rgb2lab(b), rgb2lab(a)).mean(),
    "distance": lambda a, b: np.sqrt(((rgb2lab(a) - rgb2lab(b))[..., 1:] ** 2).sum(axis=-1)).mean(),
    "auc": lambda a, b: zhang_auc(rgb2lab(a), rgb2lab(b)),
    "colorfulness": lambda a, b: hasler_suesstrunk(a),
    "true_colorfulness": lambda a, b: hasler_suesstrunk(b),
    "delta_L": lambda a, b: np.abs((rgb2lab(a) - rgb2lab(b))[..., 0]).mean(),
}


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("made", [MADE, GRAY, MADE[::-1]], ids=["other", "gray", "upside down"])
def test_a_score_is_that_of_an_independent_computation(name, made):
    expected = INDEPENDENT[name](made, TRUTH)
    assert score(made, TRUTH)[name] == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_a_perfect_prediction_has_perfect_scores():
    scores = score(TRUTH, TRUTH)
    perfect = {"psnr": 100, "ssim": 1, "ciede2000": 0, "distance": 0, "auc": 1, "delta_L": 0}
    assert {name: scores[name] for name in perfect} == pytest.approx(perfect)
    assert scores["colorfulness"] == scores["true_colorfulness"] > 10


def test_a_gray_prediction_is_off_by_the_truths_own_chroma_and_has_no_colour():
    scores = score(GRAY, TRUTH)
    chroma = np.hypot(*np.moveaxis(rgb2lab(TRUTH), -1, 0)[1:])
    assert scores["distance"] == pytest.approx(chroma.mean(), abs=0.05)
    assert scores["colorfulness"] == pytest.approx(0, abs=1e-4)


def test_constant_pictures_have_known_scores():
    """Red (255, 0, 0) for black: MSE of a third, rg 255 and yb 127.5 everywhere, L 53.24."""
    red, black = np.zeros((2, 40, 40, 3), np.uint8)
    red[..., 0] = 255
    scores = score(red, black)
    assert scores["psnr"] == pytest.approx(10 * math.log10(3))
    assert scores["colorfulness"] == pytest.approx(0.3 * math.hypot(255, 127.5), rel=1e-5)
    assert scores["delta_L"] == pytest.approx(53.24, abs=0.02)
    assert scores["distance"] == pytest.approx(math.hypot(80.09, 67.20), abs=0.05)  # ab of sRGB red
    steps = (np.arange(151) >= math.hypot(80.09, 67.20)).astype(float)
    assert scores["auc"] == pytest.approx((steps[:-1] + steps[1:]).sum() / 2 / 150)


def test_a_summary_is_mean_and_95_percent_interval():
    rows = [score(np.asarray(made_photo(i)), np.asarray(made_photo(i + 1))) for i in range(4)]
    values = [row["psnr"] for row in rows]
    summary = summarize(rows)
    assert summary["psnr"] == pytest.approx((np.mean(values), 1.96 * np.std(values, ddof=1) / 2))
    ratio = sum(r["colorfulness"] for r in rows) / sum(r["true_colorfulness"] for r in rows)
    assert summary["color_ratio"][0] == pytest.approx(ratio) and summary["color_ratio"][1] > 0
    assert summarize(rows[:1])["psnr"] == (values[0], 0.0)


def flat(colors, short=240, wide=240) -> np.ndarray:
    """Lab of vertical stripes of equal width, each of one ab, all of L 50."""
    ab = np.repeat(np.array(colors, float), wide // len(colors), axis=0)
    return np.concatenate([np.full((short, wide, 1), 50.0), np.tile(ab, (short, 1, 1))], axis=-1)


def patchiness(lab) -> float:
    change, chroma = evaluate.even_neighbors(lab)
    return change / max(chroma, 1e-9)


def test_patchiness_of_made_walls_is_the_one_computed_by_hand():
    """24 x 24 places of 10 pixels make 2 * 24 * 23 pairs of neighbours."""
    assert patchiness(flat([(30, 10)])) == 0
    # half red, half green: 24 of the pairs lie across the border, 60 apart, chroma 30 everywhere
    assert patchiness(flat([(30, 0), (-30, 0)])) == pytest.approx(24 * 60 / (2 * 24 * 23) / 30)
    # a stripe a place: of 2 * 24 * 23 pairs those side by side differ, by twice the chroma
    assert patchiness(flat([(0, 20), (0, -20)] * 12)) == pytest.approx(1.0)
    # 48 places in a row of a picture twice as wide; two of 20 and two of 40, 90 degrees apart
    lab = flat([(20, 0), (0, 40)], wide=480)
    pairs = 24 * 47 + 48 * 23
    chroma = (48 * 23 * 30 + 24 * (23 * 20 + 23 * 40 + 30)) / pairs
    assert patchiness(lab) == pytest.approx(24 * math.hypot(20, 40) / pairs / chroma)


@pytest.mark.parametrize("step, deviation, counts", [
    (3.9, 0, True), (4.1, 0, False), (0, 5.5, True), (0, 6.5, False)])
def test_only_even_places_of_like_lightness_are_neighbours(step, deviation, counts):
    lab = flat([(30, 0), (-30, 0)] * 12)
    lab[..., 0] += np.repeat([0, step] * 12, 10)                   # from place to place
    lab[..., 0] += deviation * (-1.0) ** np.arange(240)[:, None]  # within each
    side_by_side = 1.0  # of those one above the other none differs
    assert patchiness(lab) == pytest.approx(
        side_by_side if counts else 0, abs=1e-6)


def test_patchiness_needs_no_truth_and_sees_no_blob_in_gray():
    rows = [score(made, None) for made in (MADE, GRAY)]
    assert set(rows[0]) == {"colorfulness", "even_change", "even_chroma"}
    assert list(summarize(rows)) == ["colorfulness", "patchiness"]
    assert summarize(rows[1:])["patchiness"][0] < 0.01 < summarize(rows[:1])["patchiness"][0]
    own = summarize([score(TRUTH, TRUTH)])
    assert own["patchiness"] == own["true_patchiness"]


def test_a_prediction_that_is_always_the_truth_has_a_ratio_of_one_without_doubt():
    rows = [score(np.asarray(made_photo(i)), np.asarray(made_photo(i))) for i in range(3)]
    assert summarize(rows)["color_ratio"] == pytest.approx((1.0, 0.0))


# ----------------------------------------------------------------------- evaluate, end to end

@pytest.fixture(scope="module")
def report(photos, checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    folder = tmp_path_factory.mktemp("mixed")
    shutil.copytree(photos / "val", folder / "val")
    made_photo(1).convert("L").save(folder / "gray.png")
    (folder / "broken.jpg").write_bytes(b"no photograph")
    with pytest.MonkeyPatch.context() as patch:
        printed = io.StringIO()
        patch.setattr("sys.stdout", printed)
        models = f"{checkpoints['bins']}, {checkpoints['ab']}"
        evaluate.evaluate(image=folder, model=models, size=64, out=out)
    return out, printed.getvalue()


def test_the_table_has_a_column_a_method_and_a_row_a_score(report, checkpoints):
    lines = report[1].splitlines()
    assert lines[0].startswith("4 photographs")
    assert re.split("  +", lines[1].strip()) == [
        "gray", "mean ab for each L", str(checkpoints["bins"]), str(checkpoints["ab"])]
    assert [line[:20].strip() for line in lines[2:12]] == [
        heading for heading, _ in evaluate.SCORES.values()]
    written = json.loads((report[0] / "evaluation.json").read_text())["in colour"]
    written = written["summary"]
    expected = written[str(checkpoints["ab"])]["ciede2000"]
    assert lines[4].endswith("{:.2f} +-{:.2f}".format(*expected))


def test_checkpoints_are_compared_photograph_by_photograph(report, checkpoints):
    rows = [row for row in csv.DictReader(open(report[0] / "scores.csv")) if row["ciede2000"]]
    first, second = ([float(row["ciede2000"]) for row in rows if row["method"] == str(path)]
                     for path in (checkpoints["bins"], checkpoints["ab"]))
    differences = [two - one for one, two in zip(first, second)]
    mean, half = statistics.mean(differences), 1.96 * statistics.stdev(differences) / 2
    line = f"{checkpoints['ab']} less {checkpoints['bins']}: CIEDE2000 {mean:+.2f} +-{half:.2f}"
    assert len(first) == 4 and report[1].count(line) == report[1].count(" less ") == 1


def test_one_photograph_has_no_interval(capsys):
    scores = {"psnr": 20.0, "ciede2000": 9.5}
    evaluate.print_table("one", {"gray": evaluate.summarize([scores])})
    evaluate.print_table("two", {"gray": evaluate.summarize([scores, {**scores, "psnr": 22.0}])})
    one, two = capsys.readouterr().out.split("two")
    assert one.count("+-") == 1 and "20.00\n" in one  # that of the heading
    assert "21.00 +-1.96" in two


def test_json_and_csv_hold_every_score(report, checkpoints):
    out, _ = report
    written = json.loads((out / "evaluation.json").read_text())
    assert written["in colour"]["photographs"] == 4 and written["settings"]["size"] == 64
    assert written["gray or toned"]["photographs"] == 1
    assert set(written["settings"]["checkpoints"]) == {str(path) for path in checkpoints.values()}
    rows = list(csv.DictReader(open(out / "scores.csv", newline="")))
    assert len(rows) == 5 * 4
    for method, summary in written["in colour"]["summary"].items():
        values = [float(row["psnr"]) for row in rows if row["method"] == method and row["psnr"]]
        assert summary["psnr"][0] == pytest.approx(np.mean(values), abs=1e-3)
    # gray has the truth's lightness; the mean colour of these checkpoints is gray
    summary = written["in colour"]["summary"]
    assert summary["gray"]["delta_L"][0] < 0.2
    assert summary["gray"] == summary["mean ab for each L"]


def test_the_picture_has_the_stated_size(report):
    """4 photographs (200 x 167) of gray, two models and truth: 4 columns, 4 rows with captions."""
    assert Image.open(report[0] / "evaluation.png").size == (4 * 204 + 4, 4 * 187 + 4)


def test_the_mean_colour_for_each_lightness_is_what_the_checkpoint_says():
    mean_ab = np.zeros((101, 2))
    mean_ab[50:] = 10, -20
    made = rgb2lab(evaluate.mean_color_baseline(mean_ab, made_photo(3)))
    lightness = rgb2lab(np.asarray(made_photo(3)))[..., 0]
    assert np.abs(made[..., 0] - lightness).mean() < 0.2
    light = (lightness > 51) & (lightness < 80)
    assert made[light, 1:].mean(axis=0) == pytest.approx([10, -20], abs=0.3)
    assert made[lightness < 49, 1:].mean(axis=0) == pytest.approx([0, 0], abs=0.3)


@pytest.mark.parametrize("flags, words", [
    ({"model": " ,"}, "--model"), ({"image": Path(__file__).parent}, "no photograph there"),
    ({"image": Path("missing")}, "missing"), ({"model": "missing.tar"}, "missing.tar")])
def test_a_mistake_is_one_line(photos, checkpoints, tmp_path, flags, words):
    with pytest.raises(ColorizeError, match=words) as error:
        good = {"image": photos / "val", "model": str(checkpoints["ab"]), "out": tmp_path}
        evaluate.evaluate(**good | flags)
    assert "\n" not in str(error.value) and files(tmp_path) == []


def test_of_gray_and_toned_photographs_what_needs_no_truth_is_scored(checkpoints, tmp_path, capsys):
    gray = made_photo(0).convert("L")
    gray.save(tmp_path / "a.png")
    Image.merge("RGB", [gray, gray.point(lambda x: x * 0.9), gray.point(lambda x: x * 0.7)]).save(
        tmp_path / "sepia.png")
    evaluate.evaluate(image=tmp_path, model=str(checkpoints["ab"]), size=64, out=tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 photographs gray or toned, network at 64 px")
    assert [line[:20].strip() for line in lines[2:4]] == ["colourfulness", "patchiness"]
    assert lines[2].split()[1] == "0.0" and float(lines[2].split()[-2]) > 1  # gray; the checkpoint
    assert (tmp_path / "out" / "evaluation.png").exists()


def test_results_and_evaluations_are_not_taken_for_photographs(checkpoints, tmp_path, capsys):
    made_photo(3).save(tmp_path / "a.png")
    write_photo(tmp_path / "a_color.png", [made_photo(4)], Photo(made_photo(4)), photo.MADE)
    for _ in range(2):  # the second time evaluation.png lies there
        evaluate.evaluate(image=tmp_path, model=str(checkpoints["ab"]), size=64, out=tmp_path)
        assert capsys.readouterr().out.startswith("1 photographs in colour")


def test_an_empty_name_scores_no_other_checkpoint(checkpoints, photos, tmp_path):
    paths = sorted((photos / "val").rglob("*.png"))[:2]
    evaluate.evaluate(image=list(map(str, paths)), model=f"{checkpoints['ab']},", size=64, out=tmp_path)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(written["settings"]["checkpoints"]) == [str(checkpoints["ab"])]
    rows = csv.DictReader(open(tmp_path / "scores.csv", newline=""))
    assert list(dict.fromkeys(row["photograph"] for row in rows)) == list(map(str, paths))


# ----------------------------------------------------------------------------------- curves

ROW = {"loss": 0.5, "val_loss": 0.6, "psnr": 22.0, "color_ratio": 0.7, "lr": 1e-3}


@pytest.mark.parametrize("rows, panels", [
    ([{"loss": 1.0}], 1), ([ROW], 4), ([ROW, ROW | {"loss": 0.1}], 4),
    ([ROW | {"d_loss": 1.0}] * 3, 5),
    ([ROW | {"psnr": math.nan, "loss": math.inf}, ROW | {"psnr": math.nan}], 4)])
def test_curves_are_a_picture_of_panels_two_a_row(tmp_path, rows, panels):
    history = [{"epoch": i} | row for i, row in enumerate(rows, 1)]
    evaluate.draw_curves(tmp_path / "curves.png", history)
    picture = Image.open(tmp_path / "curves.png")
    assert picture.size == (1040, 300 * math.ceil(panels / 2))
    blue = (np.asarray(picture) == (0x1f, 0x5f, 0xbf)).all(axis=-1).sum()  # of the first curves
    finite = sum(math.isfinite(row["loss"]) for row in rows)
    assert blue > (200 if finite > 1 else 0)


def test_history_is_a_row_an_epoch(tmp_path):
    history = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "psnr": 20.0}]
    evaluate.write_csv(tmp_path / "history.csv", history)
    rows = list(csv.DictReader(open(tmp_path / "history.csv", newline="")))
    assert rows == [{"epoch": "1", "loss": "0.5", "psnr": ""},
                    {"epoch": "2", "loss": "0.25", "psnr": "20.0"}]
