"""The network, its colours and its checkpoints."""

import functools
import itertools
import time
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import made_photo
from skimage.color import rgb2lab

import basic_model
from basic_model import (ColorNet, Discriminator, annealed_mean, color_bins,
                         encoder_levels, initialize, load_checkpoint, read_checkpoint,
                         save_checkpoint, soft_encode, starting_point)
from photo import ColorizeError, in_gamut


@functools.cache
def network(encoder, head):
    return ColorNet(encoder, stages=2, head=head).eval()


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (64, 100), (7, 90), (1, 1)])
@pytest.mark.parametrize("encoder", ["resnet18", "vgg11"])
def test_any_size_gives_ab_at_its_resolution_and_bins_at_a_quarter(encoder, height, width):
    for head in ("ab", "bins"):
        model = network(encoder, head)
        with torch.no_grad():
            output = model(torch.rand(2, 1, height, width) * 100)
            expected = (2, 2, height, width) if head == "ab" else \
                (2, len(model.bins), -(-height // 4), -(-width // 4))
            assert output.shape == expected
            assert model.predict(torch.rand(1, 1, height, width)).shape == (1, 2, height, width)


@pytest.mark.parametrize("encoder, decoder, head", [
    *itertools.product(["resnet18"], ["unet", "plain"], ["ab", "bins"]),
    ("vgg16_bn", "unet", "ab"), ("resnet50", "unet", "bins"), ("mobilenet_v2", "plain", "ab")])
def test_every_parameter_gets_a_gradient(encoder, decoder, head):
    model = ColorNet(encoder, decoder, head)
    torch.nn.init.normal_(model.head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.rand(2, 1, 64, 64) * 100)
    output.float().square().mean().backward()
    idle = [name for name, p in model.named_parameters()
            if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not idle


def test_levels_of_resnet18_are_its_last_nodes_before_each_stride():
    levels = encoder_levels(torchvision.models.resnet18(), 4)
    assert [(channels, stride) for _, channels, stride in levels] == [
        (64, 2), (64, 4), (128, 8), (256, 16), (512, 32)]
    assert [node for node, _, _ in levels][2:] == [f"layer{n}.1.relu_1" for n in (2, 3, 4)]


@pytest.mark.parametrize("stages, stride", [(2, 8), (3, 16)])
def test_stages_set_the_last_stride(stages, stride):
    assert encoder_levels(torchvision.models.resnet18(), stages)[-1][2] == stride


@pytest.mark.parametrize("encoder", ["resnet19", "squeezenet1_1", "vit_b_16", "fcn_resnet50"])
def test_an_encoder_that_does_not_fit_is_named(encoder):
    with pytest.raises(ColorizeError, match="--encoder"):
        ColorNet(encoder)


def test_bins_hold_every_srgb_colour_and_only_cells_that_hold_one():
    bins = color_bins().numpy()
    rgb = np.stack(np.meshgrid(*[np.linspace(0, 1, 40)] * 3), axis=-1).reshape(-1, 3)
    cells = {tuple(cell) for cell in np.rint(rgb2lab(rgb)[:, 1:] / 10).astype(int) * 10}
    own = {tuple(cell) for cell in bins.astype(int)}
    assert cells <= own
    assert len(own - cells) <= 12  # cells that a grid of 40 x 40 x 40 colours just misses


def test_soft_encoding_is_one_in_sum_and_comes_back_within_half_a_bin():
    bins = color_bins()
    random = np.random.default_rng(0)
    ab = torch.from_numpy(random.uniform(-60, 60, (500, 2)).astype(np.float32))
    ab = ab[torch.from_numpy(in_gamut(np.full(500, 60, np.float32), ab.numpy()))]
    nearest, weights = soft_encode(ab, bins)
    assert torch.allclose(weights.sum(dim=1), torch.ones(len(ab)))
    by_hand = np.linalg.norm(ab.numpy()[:, None] - bins.numpy(), axis=-1)
    assert (nearest[:, 0].numpy() == by_hand.argmin(axis=1)).all()
    back = (bins[nearest] * weights[..., None]).sum(dim=1)
    assert (back - ab).norm(dim=1).max() < 5


def test_annealed_mean_goes_from_the_mean_to_the_mode():
    bins = color_bins()
    logits = torch.randn(2, len(bins), 3, 4, generator=torch.Generator().manual_seed(0)) * 2
    probability = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True)
    mean = np.einsum("nqhw,qc->nchw", probability, bins.numpy())
    assert np.allclose(annealed_mean(logits, bins, 1.0).numpy(), mean, atol=1e-3)
    mode = bins[logits.argmax(dim=1)].permute(0, 3, 1, 2)
    assert torch.allclose(annealed_mean(logits, bins, 1e-3), mode, atol=1e-2)


def test_discriminator_judges_patches():
    logits = Discriminator()(torch.rand(2, 1, 64, 96) * 100, torch.zeros(2, 2, 64, 96))
    assert logits.shape == (2, 1, 8, 12)


@pytest.mark.parametrize("head", ["ab", "bins"])
def test_a_saved_network_predicts_the_same(head, tmp_path):
    model = ColorNet(stages=2, head=head).eval()
    torch.nn.init.normal_(model.head.weight)
    save_checkpoint(tmp_path / "x.tar", model, mean_ab=torch.zeros(101, 2))
    loaded, contents = load_checkpoint(tmp_path / "x.tar")
    L = torch.rand(1, 1, 40, 56) * 100
    with torch.no_grad():
        difference = (loaded.predict(L) - model.predict(L)).abs().max()
    assert difference < 1.0  # half precision, ab up to 100
    assert contents["format"] == 3
    kinds = {name: w.dtype for name, w in contents["weights"].items()}
    assert kinds["head.weight"] == torch.float16
    assert kinds["bottleneck.1.running_var"] == torch.float32
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_what_is_not_finite_is_not_written(tmp_path):
    model = ColorNet(stages=2)
    model.head.weight.data[0] = 1e6  # beyond half precision
    with pytest.raises(ColorizeError, match="head.weight is not finite"):
        save_checkpoint(tmp_path / "x.tar", model)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------- strangers' checkpoints

class Trap:
    """An object that would create a file when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


MODEL = {"encoder": "resnet18", "decoder": "unet", "head": "bins", "stages": 2}
LAUGHS = functools.reduce(lambda inner, _: [inner] * 1000, range(7), [])  # 10^21 empty lists
ODD = {
    "nan": ({"weights/head.bias": torch.full((262,), torch.nan)}, "head.bias is not finite"),
    "variance": ({"weights/bottleneck.1.running_var": -torch.ones(192)}, "negative variance"),
    "temperature": ({"colors/temperature": 1e-40}, "'colors'"),
    "no temperature": ({"colors/temperature": None}, "'colors'"),
    "nan bins": ({"colors/bins": torch.full((262, 2), torch.nan)}, "'colors'"),
    "bins alone": ({"colors": {"bins": torch.zeros(262, 2)}}, "'colors'"),
    "no colors": ({"colors": None}, "'colors'"),
    "expanded": ({"weights/head.bias": torch.zeros(1).expand(10 ** 9)}, "not a checkpoint"),
    "huge shape": ({"weights/head.bias": torch.zeros(1).expand(10 ** 6, 10 ** 6)}, "not a check"),
    "complex": ({"weights/head.bias": torch.zeros(262, dtype=torch.complex64)}, "not a check"),
    "sparse": ({"weights/head.bias": torch.zeros(262).to_sparse()}, "not a checkpoint"),
    "bool": ({"weights/head.bias": torch.zeros(262, dtype=torch.bool)}, "not a checkpoint"),
    "nested": ({"weights/head.bias": torch.nested.nested_tensor([torch.zeros(3)])}, "checkpoint"),
    "meta": ({"weights/head.bias": torch.zeros(262, device="meta")}, "checkpoint"),
    "with gradient": ({"colors/bins": torch.nn.Parameter(torch.zeros(262, 2))}, "not a check"),
    "beyond float32": ({"weights/head.bias": torch.ones(262).double() * 1e300}, "not finite"),
    "wrong shape": ({"weights/head.bias": torch.zeros(3, 3)}, "as at head.bias"),
    "no tensor": ({"weights/head.bias": "text"}, "'weights'"),
    "number as name": ({"weights": {5: torch.zeros(3)}}, "'weights'"),
    "long name": ({"weights": {"x" * 5 * 10 ** 7: torch.zeros(3)}}, "checkpoint"),
    "long words": ({"training": {"note": ["x" * 100 + str(i) for i in range(10 ** 5)]}}, "not a"),
    "laughs": ({"training": {"note": LAUGHS}}, "not a checkpoint"),
    "format": ({"format": 1}, "'format'"), "format of many": ({"format": torch.zeros(3)}, "'format'"),
    "no model": ({"model": {}}, "'model'"), "list": ({"weights": [1]}, "'weights'"),
    "mean_ab": ({"mean_ab": torch.zeros(3)}, "'mean_ab'"),
    "no mean_ab": ({"mean_ab": None}, "'mean_ab'"),
    "encoder": ({"model": MODEL | {"encoder": "fcn_resnet50"}}, "'model'"),
    "stages": ({"model": MODEL | {"stages": 9}}, "'model'"),
    "huge network": ({"model": MODEL | {"stages": 10 ** 9}}, "'model'"),
    "truth": ({"model": MODEL | {"stages": True}}, "'model'"),
    "another network": ({"model": MODEL | {"decoder": "plain"}}, "blocks"),
    "more keys": ({"model": MODEL | {"backdoor": 1}}, "'model'"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_wrong_with_a_checkpoint_is_said_in_a_line_soon(kind, checkpoints, tmp_path):
    contents, (change, said) = read_checkpoint(checkpoints["bins"]), ODD[kind]
    for key, value in change.items():
        place, _, name = key.partition("/")
        contents[place] = contents[place] | {name: value} if name else value
    torch.save(contents, tmp_path / "bad.tar")
    begin = time.monotonic()
    with pytest.raises(ColorizeError, match=said) as error:
        load_checkpoint(tmp_path / "bad.tar")
    assert time.monotonic() - begin < 20 and len(str(error.value)) < 500
    assert "bad.tar" in str(error.value) and "\n" not in str(error.value)


def rewrite(source: Path, target: Path, pickled=None, compression=zipfile.ZIP_STORED) -> None:
    """A copy of a checkpoint, its records compressed or its pickle another."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for record in old.infolist():
            own = pickled if record.filename.endswith("data.pkl") and pickled else None
            new.writestr(record.filename, own or old.read(record))


@pytest.mark.parametrize("kind", ["trap", "hidden trap", "list", "deep", "deep dict", "deflated",
                                  "old bomb", "cut", "picture", "folder", "empty", "absent"])
def test_what_is_no_checkpoint_is_one_line_and_nothing_runs(kind, checkpoints, tmp_path):
    path, good = tmp_path / "strange.tar", checkpoints["bins"]
    if kind == "picture":
        made_photo(0).save(path, "PNG")
    elif kind == "folder":
        path.mkdir()
    elif kind in ("empty", "cut"):
        path.write_bytes(good.read_bytes()[:10 ** 6] if kind == "cut" else b"")
    elif kind == "deflated":
        rewrite(good, path, compression=zipfile.ZIP_DEFLATED)
    elif kind == "old bomb":  # before zip archives; it took a minute and 3 GB
        path.write_bytes(b"\x80\x02" + b"]" * 3 * 10 ** 7 + b".")
    elif kind == "deep":  # a list in a list, 10,000 times
        rewrite(good, path, b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b".")
    elif kind == "deep dict":
        rewrite(good, path, b"\x80\x02" + b"}K\x01" * 9_999 + b"}" + b"s" * 9_999 + b".")
    elif kind != "absent":
        trap = Trap(tmp_path / "executed")
        torch.save({"trap": trap, "list": [1, 2], "hidden trap": read_checkpoint(good)
                    | {"training": {"note": trap}}}[kind], path)
    begin = time.monotonic()
    with pytest.raises(ColorizeError) as error:
        load_checkpoint(path)
    assert time.monotonic() - begin < 20 and not (tmp_path / "executed").exists()
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------- a start

def start(model, init):
    """As train begins."""
    source, contents = starting_point(init, model.arguments["encoder"])
    return source, initialize(model, source, contents)


def test_initializing_takes_what_matches(checkpoints, tmp_path, monkeypatch):
    source, _ = load_checkpoint(checkpoints["bins"])
    model = ColorNet(stages=2, head="ab")  # another head, one block more
    words, trained = start(model, str(checkpoints["bins"]))
    assert "blocks.4.0.weight" in trained and "head.weight" not in trained
    assert words == str(checkpoints["bins"])
    assert torch.equal(model.blocks["4"][0].weight, source.blocks["4"][0].weight)

    encoder = torchvision.models.resnet18().state_dict()
    halved = {name: w.half() if w.ndim > 1 else w for name, w in encoder.items()}
    torch.save(halved, tmp_path / "encoder.pth")
    assert "encoder.conv1.weight" in start(model, str(tmp_path / "encoder.pth"))[1]
    taken = model.encoder.state_dict()["conv1.weight"]
    assert torch.equal(taken, encoder["conv1.weight"].half().float())

    torch.save(encoder, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "encoder.conv1.weight" in start(model, str(tmp_path / "old.pth"))[1]

    # what a state dict holds besides is not taken for a checkpoint's
    torch.save({"other": torch.zeros(2), "colors": 5}, tmp_path / "other.pth")
    with pytest.raises(ColorizeError, match="none of its tensors"):
        start(model, str(tmp_path / "other.pth"))
    assert start(model, "none") == ("random weights", set())


def test_a_changed_byte_among_the_weights_is_noticed(checkpoints, tmp_path):
    data = bytearray(Path(checkpoints["bins"]).read_bytes())
    data[len(data) // 2] ^= 0x3F
    (tmp_path / "changed.tar").write_bytes(data)
    with pytest.raises(ColorizeError, match="changed.tar: .* damaged"):
        load_checkpoint(tmp_path / "changed.tar")


def test_a_damaged_checkpoint_is_no_start(checkpoints, tmp_path):
    contents = read_checkpoint(checkpoints["bins"])
    del contents["colors"]["saturation"]
    torch.save(contents, tmp_path / "old.tar")
    with pytest.raises(ColorizeError, match="old.tar.*'colors'"):
        start(ColorNet(stages=2), str(tmp_path / "old.tar"))


def test_a_checkpoint_of_another_encoder_is_no_start(checkpoints):
    with pytest.raises(ColorizeError, match="its encoder is resnet18, not vgg11; add --encoder"):
        start(ColorNet("vgg11", stages=2), str(checkpoints["bins"]))


def test_auto_starts_from_the_shipped_checkpoint_if_its_encoder_fits(checkpoints, monkeypatch):
    monkeypatch.setattr(basic_model, "PRETRAINED", checkpoints["ab"])
    assert "head.weight" in start(ColorNet(stages=2), "auto")[1]
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, weights: torch.nn.Linear(1, 1))
    source, contents = starting_point("auto", "vgg11")
    assert source == "ImageNet's vgg11" and list(contents) == ["weights"]


def test_a_deeper_network_starts_with_the_stages_it_shares(checkpoints):
    """Blocks are named by stride: what was at stride 4 stays at stride 4."""
    model = ColorNet(stages=3, head="bins")
    source = load_checkpoint(checkpoints["bins"])[0]
    trained = start(model, str(checkpoints["bins"]))[1]
    assert "blocks.4.0.weight" in trained and not any("blocks.8." in name for name in trained)
    assert torch.equal(model.blocks["4"][3].weight, source.blocks["4"][3].weight)


def test_imagenet_weights_that_cannot_be_fetched_are_an_error_in_one_line(monkeypatch):
    get_model = torchvision.models.get_model

    def unreachable(name, weights=None):
        if weights:
            raise urllib.error.URLError("no network")
        return get_model(name)
    monkeypatch.setattr(torchvision.models, "get_model", unreachable)
    with pytest.raises(ColorizeError, match="ImageNet.*--init none") as error:
        start(ColorNet(stages=2), "imagenet")
    assert "\n" not in str(error.value)
