"""Photographs made in memory and tiny trained checkpoints, once a session, in temporary folders."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2lab

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("COLORIZE_TRACEBACK", None)

from basic_model import PRETRAINED, ColorNet, load_checkpoint, save_checkpoint  # noqa: E402
from photo import lab_to_rgb  # noqa: E402


HEADS = ("ab", "bins")


def made_photo(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """Coloured discs on a gradient, a different one for each seed: lightness and colour vary."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    lab = np.stack([30 + 50 * y, 20 * np.cos(x * 3 + seed), 30 * np.sin(y * 4 + seed)], axis=-1)
    for _ in range(4):
        cx, cy, radius = random.uniform(0.1, 0.9, 3) * [1, 1, 0.3]
        lab[np.hypot(x - cx, y - cy) < radius] = random.uniform([25, -45, -45], [85, 45, 45])
    lab = lab.astype(np.float32)
    rgb = lab_to_rgb(lab[..., 0], lab[..., 1:])
    return Image.fromarray(np.rint(rgb * 255).astype(np.uint8))


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


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A data folder: 8 photographs in train in two class folders, 4 in val."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(12):
        split, kind = "train" if i < 8 else "val", "round" if i % 2 else "square"
        path = folder / split / kind / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        made_photo(i).save(path)
    return folder


def make_checkpoint(path: Path, head: str) -> Path:
    """A small network with colourful, seeded random weights: resnet18 to stride 8."""
    torch.manual_seed(1)
    model = ColorNet(stages=2, head=head)
    with torch.no_grad():
        model.head.weight.mul_(30)
        if head == "bins":  # likely colours near gray, as in photographs
            model.head.bias.copy_(-model.bins.norm(dim=1) / 15)
    save_checkpoint(path, model.eval(), mean_ab=torch.zeros(101, 2), training={})
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """{"ab": path, "bins": path}."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {head: make_checkpoint(folder / f"{head}.tar", head) for head in ("ab", "bins")}


@pytest.fixture(scope="session")
def models(checkpoints):
    """The two networks, the bins head made to vary more from place to place."""
    models = {head: load_checkpoint(path)[0] for head, path in checkpoints.items()}
    with torch.no_grad():
        models["bins"].head.weight.mul_(20)
    return models


@pytest.fixture(scope="session")
def shipped():
    """The shipped network: only a trained one tells objects apart."""
    return load_checkpoint(PRETRAINED)[0]
