"""What each step of a prediction is worth, at equal colourfulness: prints README's table.

    python tests/consistency.py FOLDER [STEP]      # every STEP-th photograph of a folder

Closeness and evenness are cheap for a pale picture: so each way of asking the network gets
the saturation at which its pictures have as much colour as those of the shipped way.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import inference  # noqa: E402
from basic_model import PRETRAINED, load_checkpoint  # noqa: E402
from colorize_data import find_photos  # noqa: E402
from controls import Controls  # noqa: E402
from evaluate import score, scored_copy, summarize  # noqa: E402

SHIPPED, AGREE = inference.SCALES, inference.agree
WAYS = {  # working sizes with their weights, and whether alike places agree
    "two sizes, alike places agree (shipped)": (SHIPPED, AGREE),
    "two sizes": (SHIPPED, lambda values, *_: values),
    "one size": (((1.0, 1.0),), lambda values, *_: values),
    "one size, alike places agree": (((1.0, 1.0),), AGREE),
}


def scores(model, photographs: list, predictions: list, saturation: float) -> dict:
    """The summary over the photographs, coloured with a factor on the colours."""
    controls = Controls(saturation)
    rows = [score(np.asarray(inference.add_color(model, picture, prediction, controls)[0]),
                  np.asarray(picture))
            for picture, prediction in zip(photographs, predictions)]
    return {name: mean for name, (mean, _) in summarize(rows).items()}


def at_equal_color(model, photographs: list, wanted: float | None) -> tuple[float, dict]:
    """The saturation that gives the wanted colour ratio, found by secants, and its scores."""
    predictions = [inference.predict(model, picture, 256) for picture in photographs]
    saturation, found = 1.0, scores(model, photographs, predictions, 1.0)
    for _ in range(3 if wanted else 0):
        saturation *= wanted / found["color_ratio"]
        found = scores(model, photographs, predictions, saturation)
    return saturation, found


def main(folder: str, step: str = "1") -> None:
    model, wanted = load_checkpoint(PRETRAINED)[0], None
    copies = [scored_copy(path) for path in find_photos(Path(folder))[::int(step)]]
    photographs = [picture for picture, colored in copies if colored]
    print(f"{len(photographs)} photographs in colour")
    print("| way | saturation | PSNR | CIEDE2000 | colour over the truth's | patchiness |")
    print("|---|---|---|---|---|---|")
    for name, (inference.SCALES, inference.agree) in WAYS.items():
        saturation, found = at_equal_color(model, photographs, wanted)
        wanted = wanted or found["color_ratio"]
        print(f"| {name} | {saturation:.2f} | {found['psnr']:.2f} | {found['ciede2000']:.2f} "
              f"| {found['color_ratio']:.2f} | {found['patchiness']:.3f} |", flush=True)
    print(f"patchiness of the photographs themselves: {found['true_patchiness']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
