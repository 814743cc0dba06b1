"""Scores against independent computations; the report; the data command; archives; curves."""

import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import made_photo
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import colorize_data
import evaluate
from evaluate import score, summarize
from photo import ColorizeError, FlagError

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
    written = json.loads((report[0] / "evaluation.json").read_text())["in colour"]["summary"]
    expected = written[str(checkpoints["ab"])]["ciede2000"]
    assert lines[4].endswith("{mean:.2f} +-{interval95:.2f}".format(**expected))


def test_json_and_csv_hold_every_score(report, checkpoints):
    out, _ = report
    written = json.loads((out / "evaluation.json").read_text())
    assert written["in colour"]["photographs"] == 4 and written["settings"]["size"] == 64
    assert written["gray or toned"]["photographs"] == 1
    assert set(written["checkpoints"]) == {str(path) for path in checkpoints.values()}
    rows = list(csv.DictReader(open(out / "scores.csv", newline="")))
    assert len(rows) == 5 * 4
    for method, summary in written["in colour"]["summary"].items():
        values = [float(row["psnr"]) for row in rows if row["method"] == method and row["psnr"]]
        assert summary["psnr"]["mean"] == pytest.approx(np.mean(values), abs=1e-3)
    # gray has the truth's lightness; the mean colour of these checkpoints is gray
    summary = written["in colour"]["summary"]
    assert summary["gray"]["delta_L"]["mean"] < 0.2
    assert summary["gray"] == summary["mean ab for each L"]


def test_the_picture_has_the_stated_size(report):
    """4 photographs of gray, two models and truth: 4 columns, 4 rows of 200 pixels and captions."""
    assert Image.open(report[0] / "evaluation.png").size == (4 * 204 + 4, 4 * 220 + 4)


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


def test_an_empty_name_scores_no_other_checkpoint(checkpoints, photos, tmp_path):
    paths = sorted((photos / "val").rglob("*.png"))[:2]
    evaluate.evaluate(image=list(map(str, paths)), model=f"{checkpoints['ab']},", size=64, out=tmp_path)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(written["checkpoints"]) == [str(checkpoints["ab"])]
    assert list(written["scores"]) == list(map(str, paths))


def test_a_module_run_by_itself_says_what_to_type():
    done = subprocess.run([sys.executable, "evaluate.py"], cwd=Path(evaluate.__file__).parent,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "type: python main.py evaluate --help\n"


# -------------------------------------------------------------------------- the data command

@pytest.fixture
def folder(photos, tmp_path):
    """A copy of the made photographs, for commands that write beside them."""
    return shutil.copytree(photos, tmp_path / "data", ignore=shutil.ignore_patterns("processed"))


def test_the_data_report_counts_what_there_is(folder, capsys):
    made_photo(90).convert("L").save(folder / "train" / "gray.png")
    colorize_data.data(data=folder)
    out = capsys.readouterr().out
    assert "train: 8 photographs used" in out and "val: 4 photographs used" in out
    assert "1 left out, without colour: train/gray.png" in out
    assert "round 4" in out and "square 4" in out
    ab = np.concatenate([rgb2lab(np.asarray(Image.open(path)))[..., 1:].reshape(-1, 2)
                         for path in (folder / "train").rglob("[0-9]*.png")])
    means = [float(line.split()[2].rstrip(",")) for line in out.splitlines() if line[1:2] == "*"]
    assert means == pytest.approx(ab.mean(axis=0), abs=2)  # the arrays hold a centre crop
    assert Image.open(folder / "processed" / "preview.png").size == (6 * 196 + 4, 5 * 212 + 4)


def test_the_histogram_is_bright_where_colours_are():
    counts = np.zeros((256, 256))
    counts[128 + 60, 128 + 40] = 100  # a 60, b 40: right of and above the middle
    picture = np.asarray(evaluate.ab_histogram(counts)).max(axis=2)
    assert np.unravel_index(picture.argmax(), picture.shape) == (127 - 40, 128 + 60)


def test_the_same_photograph_in_train_and_val_is_an_error_that_names_both(folder):
    shutil.copy(folder / "train" / "square" / "0.png", folder / "val" / "copy.png")
    with pytest.raises(ColorizeError) as error:
        colorize_data.data(data=folder)
    assert "train/square/0.png" in str(error.value) and "val/copy.png" in str(error.value)


@pytest.mark.parametrize("fraction", [0.0, 1.0, float("nan")])
def test_a_fraction_that_makes_no_sense_is_refused(tmp_path, fraction):
    with pytest.raises(FlagError, match="between 0 and 1"):
        colorize_data.data(data=tmp_path, val_fraction=fraction)


# ----------------------------------------------------------------------------------- import

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
    colorize_data.import_photos(source, tmp_path / "data", 0.3)
    made = files(tmp_path / "data")
    assert sorted(name.split("/", 1)[1] for name in made) == sorted(FLOWERS)
    assert 2 <= sum(name.startswith("val/") for name in made) <= 18
    assert (tmp_path / "data" / made[0]).read_bytes() == (
        tmp_path / "flowers" / made[0].split("/", 1)[1]).read_bytes()


def test_the_split_is_the_same_again_and_added_files_move_none(tmp_path):
    source = make_set(tmp_path / "flowers", FLOWERS)
    colorize_data.import_photos(source, tmp_path / "data", 0.3)
    first = files(tmp_path / "data")
    colorize_data.import_photos(source, tmp_path / "again", 0.3)
    assert files(tmp_path / "again") == first
    make_set(source, FLOWERS + [f"lily/{i}.png" for i in range(10)])
    colorize_data.import_photos(source, tmp_path / "data", 0.3)
    assert set(first) < set(files(tmp_path / "data")) and len(files(tmp_path / "data")) == 40


def test_other_photographs_of_the_same_names_are_taken_too(tmp_path):
    for folder in ("one", "two"):
        path = tmp_path / folder / "1.png"
        path.parent.mkdir()
        made_photo(0, 64 if folder == "one" else 96, 64).save(path)
        colorize_data.import_photos(path.parent, tmp_path / "data", 1e-9)
    assert len(files(tmp_path / "data")) == 2
    assert "train/1.png" in files(tmp_path / "data")


def test_another_fraction_puts_no_photograph_into_both(tmp_path):
    source = make_set(tmp_path / "flowers", FLOWERS)
    for fraction in (0.1, 0.6):
        colorize_data.import_photos(source, tmp_path / "data", fraction)
    assert len(files(tmp_path / "data")) == len(FLOWERS)


@pytest.mark.parametrize("names, expected", [
    (["set/Train/cat/0.png", "set/valid/cat/1.png", "set/Train/dog/2.png"],
     ["train/cat/0.png", "train/dog/2.png", "val/cat/1.png"]),
    (["train/0.png", "test/1.png"], ["train/0.png", "val/1.png"]),
    (["train/cat/0.png", "train/dog/1.png"], ["train/cat/0.png", "train/dog/1.png"]),
    (["val/cat/0.png", "val/cat/1.png"], ["val/cat/0.png", "val/cat/1.png"])])
@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_a_set_that_is_split_stays_split_so(tmp_path, kind, names, expected):
    colorize_data.import_photos(pack(make_set(tmp_path / "set", names), kind), tmp_path / "data", 0.5)
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
        colorize_data.data(data=tmp_path / "deep" / "data", source=source)
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
        colorize_data.import_photos(source, tmp_path / "data", 0.1)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists() or files(tmp_path / "data") == []


def test_an_archive_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    source = pack(make_set(tmp_path / "flowers", FLOWERS), "zip")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ColorizeError, match="free"):
        colorize_data.import_photos(source, tmp_path / "data", 0.1)
    assert files(tmp_path / "data") == []



# ----------------------------------------------------------------------------------- curves

ROW = {"loss": 0.5, "val_loss": 0.6, "psnr": 22.0, "color_ratio": 0.7, "lr": 1e-3}


@pytest.mark.parametrize("rows, panels", [
    ([{"loss": 1.0}], 1), ([ROW], 4), ([ROW, ROW | {"loss": 0.1}], 4),
    ([ROW | {"d_loss": 1.0, "d_real": 0.5, "d_fake": 0.5}] * 3, 5),
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
