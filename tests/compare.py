"""Objectives and networks against each other: trains each for 1,000 steps, prints README's table.

    python tests/compare.py DATA INIT OUT [STEPS]

DATA: a folder with train/CLASS/ (some 10,000 photographs) and val/. INIT: an encoder's state dict
or a checkpoint. OUT: where checkpoints and objectives.png (the sample photographs, a row an
objective) go. A setting whose checkpoint is there is not trained again.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from basic_model import load_checkpoint  # noqa: E402
from colorize_data import ColorizeData, decode_lab, find_photos, prepare  # noqa: E402
from evaluate import score, summarize  # noqa: E402
from inference import colorize  # noqa: E402
from photo import (lab_to_image, picture_sheet, read_photo, working_copy)  # noqa: E402
from train import train  # noqa: E402

BATCH, SIZE, SCORED = 32, 128, 400
RUNS = {  # name: flags beside those that all share
    "mse": {}, "l1": {"loss": "l1"}, "huber": {"loss": "huber"},
    "bins": {"loss": "bins"},
    "mse, plain": {"decoder": "plain"},
    "mse, frozen encoder": {"encoder_share": 0.0},
    "mse, seed 1": {"seed": 1}, "mse, seed 2": {"seed": 2},
}


@torch.inference_mode()
def scores(predict, val: ColorizeData) -> str:
    """PSNR, CIEDE2000 and colourfulness over the truth's of predict: L -> ab, as table cells."""
    rows = []
    for n in range(len(val)):
        lab = decode_lab(val[n][None])
        ab = predict(lab[:, :1])
        made, true = (np.asarray(lab_to_image(lab[0, 0].numpy(), x[0].permute(1, 2, 0).numpy()))
                      for x in (ab, lab[:, 1:]))
        rows.append(score(made, true))
    summary = summarize(rows)
    return " | ".join("{:.2f} ± {:.2f}".format(*summary[k])
                      for k in ("psnr", "ciede2000", "color_ratio"))


def main(data: str, init: str, out: str, steps: str = "1000") -> None:
    limit = int(steps) * BATCH // 3  # three epochs
    print("| setting | parameters, M | photographs/s | PSNR | CIEDE2000 | colour of the truth's |")
    print("|---|---|---|---|---|---|")
    prepare(Path(data))
    val = ColorizeData(Path(data, "processed", "val.npy"), size=SIZE, limit=SCORED)
    samples = [working_copy(read_photo(path).image, 192)
               for path in find_photos(ROOT / "data" / "input" / "val")]
    tiles, captions, blank = [], [], [""] * (len(samples) - 1)
    gray = scores(lambda L: torch.zeros_like(L).expand(-1, 2, -1, -1), val)
    print(f"| plain gray | | | {gray} |", flush=True)
    for name, flags in RUNS.items():
        folder = Path(out, name.replace(", ", "_").replace(" ", ""))
        if not (folder / "best_model.tar").exists():
            train(data=Path(data), out=folder, epochs=3, batch_size=BATCH, size=SIZE, init=init,
                  limit=limit, **flags)
        model, contents = load_checkpoint(folder / "best_model.tar")
        training = contents["training"]  # epoch 0 took no time
        rate = training["photographs"] / training["scores"].get("seconds", math.inf)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        for temperature in (1.0, 0.5, 0.25) if model.arguments["head"] == "bins" else (None,):
            model.temperature = temperature
            found = scores(model.predict, val)
            label = name + (f", T {temperature}" if temperature else "")
            print(f"| {label} | {size:.1f} | {rate:.0f} | {found} |", flush=True)
        if "seed" not in name:
            tiles += [colorize(model, sample, SIZE) for sample in samples]
            captions += [name, *blank]
    sheet = picture_sheet(tiles + samples, len(samples), captions + ["truth", *blank], 120)
    sheet.save(Path(out, "objectives.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
