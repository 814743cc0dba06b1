"""The shipped checkpoint: believable on photographs that it has never seen."""

import json

import pytest
from conftest import ROOT

from basic_model import PRETRAINED
from evaluate import evaluate


def test_the_shipped_checkpoint_colours_the_samples_well(tmp_path):
    assert PRETRAINED.stat().st_size < 64e6
    evaluate(image=ROOT / "data" / "input" / "val", model=str(PRETRAINED), out=tmp_path)
    summary = json.loads((tmp_path / "evaluation.json").read_text())["in colour"]["summary"]
    ours, gray, mean = ({score: value for score, (value, _) in summary[name].items()}
                        for name in (str(PRETRAINED), "gray", "mean ab for each L"))
    assert ours["ciede2000"] < 11.5 < min(gray["ciede2000"], mean["ciede2000"])
    assert ours["psnr"] > gray["psnr"] and 0.55 < ours["color_ratio"] < 1.1
    assert ours["delta_L"] == pytest.approx(0, abs=0.15)
