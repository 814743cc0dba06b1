"""Objectives, the loop, resuming, kills, ranks."""

import errno
import math
import os
import random
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import ROOT

import main
import train as module
from basic_model import (ColorNet, bins_prior, color_bins, load_checkpoint,
                         read_checkpoint, save_checkpoint)
from colorize_data import ColorizeData, count_colors, prepare
from photo import ColorizeError, FlagError
from train import (OBJECTIVES, Training, ema_update, learning_rate, means_over_ranks,
                   train)

TINY = {"size": 64, "stages": 2, "init": "none", "epochs": 2, "batch_size": 3,
        "device": "cpu"}


def run(photos, out, **flags):
    """A small training; returns last.tar's contents."""
    train(data=photos, out=out, **TINY | flags)
    return read_checkpoint(out / "last.tar")


def same_weights(one: dict, other: dict) -> bool:
    weights, others = one["resume"]["weights"], other["resume"]["weights"]
    return all(torch.equal(w, others[name]) for name, w in weights.items())


# ------------------------------------------------------------------------------- objectives

def test_regressions_are_the_textbook_ones_on_ab_over_110():
    ab, true = np.random.default_rng(0).uniform(-60, 60, (2, 2, 2, 3, 4))
    error = np.abs(ab - true) / 110
    huber = np.where(error < 0.1, error ** 2 / 2, 0.1 * (error - 0.05))
    model = ColorNet(stages=2)  # its head is ab: the output is the colour
    for name, expected in (("mse", error ** 2), ("l1", error), ("huber", huber),
                           ("gan", error)):
        loss = OBJECTIVES[name](model)[0](model, torch.tensor(ab), torch.tensor(true))
        assert loss.item() == pytest.approx(expected.mean(), rel=1e-5)


def test_a_regression_on_bins_is_of_their_mean_colour_in_ab_units_squared(checkpoints):
    model, _ = load_checkpoint(checkpoints["bins"])
    logits = torch.full((1, len(model.bins), 2, 2), -50.0)
    logits[:, 7] = 50.0  # all is the colour of one bin
    true = torch.zeros(1, 2, 8, 8)
    objective, unit = OBJECTIVES["mse"](model)
    squared = (model.bins[7] * model.saturation).square().mean().item()
    assert objective(model, logits, true).item() * unit == pytest.approx(squared)


def test_bins_loss_is_the_cross_entropy_against_the_soft_encoding():
    bins = color_bins()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, len(bins), 1, 1, generator=generator)
    a, b = 23.0, -14.0
    distance = np.hypot(*(bins.numpy() - [a, b]).T)
    nearest = np.argsort(distance)[:5]
    soft = np.exp(-distance[nearest] ** 2 / 50)
    soft /= soft.sum()
    log_probability = torch.log_softmax(logits[0, :, 0, 0], 0).numpy()
    expected = -(soft * log_probability[nearest]).sum()
    ab = torch.tensor([a, b]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    model = ColorNet(stages=2, head="bins")
    loss = OBJECTIVES["bins"](model)[0](model, logits, ab)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_color_statistics_are_counts(photos):
    prepare(photos)
    data = ColorizeData(photos / "processed" / "train.npy")
    histogram, mean_ab = count_colors(data)
    prior = bins_prior(histogram, color_bins())
    stored = np.load(photos / "processed" / "train.npy")[:, ::4, ::4]
    stored = stored.reshape(-1, 3).astype(float)
    assert prior.sum().item() == pytest.approx(1, abs=1e-5)
    mean = stored[:, 1:].mean(axis=0) - 128
    found = (prior[:, None] * color_bins()).sum(dim=0).numpy()
    assert found == pytest.approx(mean, abs=1.0)
    L = np.rint(stored[:, 0] / 2.55).astype(int)
    for value in (40, 60):
        expected = stored[L == value, 1:].mean(axis=0) - 128
        assert mean_ab[value] == pytest.approx(expected, abs=0.5)


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 200) for step in range(201)]  # a twentieth is warm-up
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[105] == pytest.approx(0.5) and rates[200] == pytest.approx(0, abs=1e-12)


def test_means_are_over_the_photographs_counted_and_of_none_there_is_none():
    sums = Counter(loss=3 * 2.0, photographs=3)
    sums.update(loss=6.0, photographs=1)
    assert means_over_ranks(sums) == {"loss": 3.0} and means_over_ranks(Counter()) == {}


def test_ema_follows_fast_at_first_and_buffers_are_copied():
    averaged, expected = [torch.tensor([1.0])], 1.0
    for t in range(5):
        ema_update(averaged, [torch.tensor([2.0 + t])], t)
        decay = (1 + t) / (10 + t)
        expected = decay * expected + (1 - decay) * (2.0 + t)
        assert averaged[0].item() == pytest.approx(expected)
    ema_update(averaged, [torch.tensor([expected + 100])], 10 ** 6)
    assert averaged[0].item() == pytest.approx(expected + 0.1, abs=1e-3)
    network = torch.nn.BatchNorm2d(2)
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=ema_update)
    for _ in range(3):
        network(torch.randn(4, 2, 3, 3) + 5)
        average.update_parameters(network)
    assert torch.equal(average.module.running_mean, network.running_mean)


# --------------------------------------------------------------------------------- the loop

@pytest.fixture
def whole_squares(monkeypatch):
    """No crops: the same pixels every time, which few steps can learn by heart."""
    def resized(self, lab, random):
        size = self.size, self.size
        return torch.nn.functional.interpolate(lab[None].float(), size)[0].byte()
    monkeypatch.setattr(ColorizeData, "augment", resized)


@pytest.mark.parametrize("loss", ["mse", "l1", "huber", "bins", "gan"])
def test_each_objective_lowers_its_own_loss_and_its_checkpoint_colours(
        loss, photos, tmp_path, checkpoints, whole_squares):
    # against a discriminator the loss wavers: smaller steps
    history = run(photos, tmp_path, loss=loss, epochs=6, limit=4, batch_size=4,
                  lr=5e-4 if loss == "gan" else 3e-3,
                  init=str(checkpoints["ab"]))["resume"]["history"]
    assert history[-1]["loss"] < history[1]["loss"]  # 0 is the start, before any step
    assert ("d_loss" in history[-1]) == (loss == "gan")
    model, _ = load_checkpoint(tmp_path / "best_model.tar")
    with torch.no_grad():
        assert model.predict(torch.full((1, 1, 40, 40), 50.0)).isfinite().all()


def test_four_photographs_are_learnt_by_heart(photos, tmp_path, whole_squares):
    contents = run(photos, tmp_path, epochs=40, limit=4, batch_size=4, lr=5e-3)
    history = contents["resume"]["history"]  # mean squared errors in ab units
    assert history[1]["loss"] > 300 and history[-1]["loss"] < 100


def test_a_run_writes_what_it_promises_and_best_is_a_copy(photos, tmp_path, capsys):
    contents = run(photos, tmp_path, epochs=3)
    assert {path.name for path in tmp_path.iterdir()} == {
        "best_model.tar", "last.tar", "history.csv", "curves.png", "preview.png", ".lock"}
    history = contents["resume"]["history"]
    assert (tmp_path / "history.csv").read_text().count("\n") == 5  # a heading, the start
    best = read_checkpoint(tmp_path / "best_model.tar")["training"]
    # of a random start, which does not compete, only the epochs
    assert best["scores"]["val_loss"] == min(row["val_loss"] for row in history[1:])
    assert {"epoch", "step", "lr", "loss", "val_loss", "distance", "psnr",
            "color_ratio"} <= set(history[1])
    # an ab head starts gray: its error is the photographs' own colour, in units squared
    stored = np.load(photos / "processed" / "val.npy")[..., 1:].astype(float) - 128
    assert history[0]["val_loss"] == pytest.approx((stored ** 2).mean(), rel=0.05)
    assert Image.open(tmp_path / "preview.png").size == (6 * 164 + 4, 2 * 180 + 4)
    training = contents["training"]
    assert training["settings"]["epochs"] == 3 and training["step"] == 9
    assert "best_model.tar" in capsys.readouterr().out


def test_best_is_not_the_last_when_it_gets_worse(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "validate", lambda self: {
        "val_loss": abs(self.step - 3), "color_ratio": 1.0})
    run(photos, tmp_path)
    best = read_checkpoint(tmp_path / "best_model.tar")
    last = read_checkpoint(tmp_path / "last.tar")
    assert best["training"]["step"] == 3 and last["training"]["step"] == 6
    assert not torch.equal(best["weights"]["head.weight"], last["weights"]["head.weight"])


def better_and_better(training) -> dict:
    """In place of validate: every epoch is the best so far."""
    return {"val_loss": 50.0 - training.step, "color_ratio": 1.0}


def made_training(photos, tmp_path, **flags):
    """A training before its first step."""
    flags = TINY | {"data": str(photos), "out": str(tmp_path), "amp": "off"} | flags
    settings = {**train.__kwdefaults__, **flags}
    return Training(settings, torch.device("cpu"))


def first_step(training, batch=3):
    """Takes it; returns the weights that it found."""
    before = {name: w.clone() for name, w in training.model.state_dict().items()}
    for lab in training.batches(training.train_data, range(batch)):
        training.train_step(lab)
    return before


def test_each_adversarial_loss_teaches_one_network_alone(photos, tmp_path, checkpoints):
    training = made_training(photos, tmp_path, loss="gan", init=str(checkpoints["ab"]))
    lab = torch.rand(2, 3, 64, 64) * 100
    made = training.model(lab[:, :1])
    losses = training.adversarial_losses(lab[:, :1], lab[:, 1:], made)
    for loss, taught in zip(losses, (training.model, training.discriminator)):
        for network in (training.model, training.discriminator):
            network.zero_grad()
        loss.backward()
        for network in (training.model, training.discriminator):
            grads = [p.grad for p in network.parameters() if p.grad is not None]
            assert any(grad.any() for grad in grads) == (network is taught)


@pytest.mark.parametrize("trained, share, kept, still", [
    (False, 0.1, False, False), (True, 0.1, False, True), (True, 0.0, True, True)])
def test_a_trained_encoder_keeps_its_batch_norm_and_at_share_0_its_weights(
        trained, share, kept, still, photos, tmp_path, checkpoints):
    init = str(checkpoints["ab"]) if trained else "none"
    training = made_training(photos, tmp_path, init=init, encoder_share=share, lr=1e-2)
    before = first_step(training)
    after = training.model.state_dict()
    same = {name: torch.equal(value, after[name]) for name, value in before.items()}
    assert not same["head.weight"] and not same["bottleneck.1.running_mean"]
    assert same["encoder.bn1.running_mean"] == still
    assert same["encoder.conv1.weight"] == kept
    assert (training.model.encoder.conv1.weight.grad is None) == kept  # and costs no time


def test_an_encoder_with_random_layers_is_not_taken_for_a_trained_one(
        photos, tmp_path, checkpoints):
    init = str(checkpoints["ab"])  # ends at stride 8
    deeper = {"init": init, "stages": 3, "encoder_share": 0.0}
    training = made_training(photos, tmp_path, **deeper)
    before = first_step(training)
    after = training.model.state_dict()
    for name in ("encoder.bn1.running_mean", "encoder.conv1.weight"):
        assert not torch.equal(before[name], after[name])
    assert len({group["peak"] for group in training.optimizer.param_groups}) == 1
    contents = run(photos, tmp_path / "out", epochs=1, **deeper)
    assert contents["training"]["trained"] is False
    contents = run(photos, tmp_path / "same", epochs=1, init=init)
    assert contents["training"]["trained"] is True


def test_a_resumed_encoder_is_as_trained_as_it_was(photos, tmp_path, checkpoints):
    for init, trained in ((str(checkpoints["ab"]), True), ("none", False)):
        out = tmp_path / str(trained)
        run(photos, out, epochs=1, init=init)
        flags = {**train.__kwdefaults__, "out": str(out)}
        del flags["resume"], flags["typed"]
        training = module.resume_training(out / "last.tar", flags, torch.device("cpu"))
        assert training.trained == trained == (not training.model.encoder.training)


def test_the_rate_of_each_weight_follows_the_schedule_and_a_trained_encoders_share(
        photos, tmp_path, checkpoints):
    training = made_training(photos, tmp_path, init=str(checkpoints["ab"]), loss="bins",
                             encoder_share=0.25, lr=0.008, epochs=20)
    first_step(training)
    rates = {id(p): g["lr"] for g in training.optimizer.param_groups for p in g["params"]}
    found = {name: rates[id(p)] for name, p in training.model.named_parameters()}
    # 60 steps, 3 of them warm-up: the first at a third of the peak
    assert found["encoder.conv1.weight"] == pytest.approx(0.008 / 3 / 4)
    assert found["head.weight"] == found["context.weight"] == pytest.approx(0.008 / 3)
    fresh = made_training(photos, tmp_path / "fresh", encoder_share=0.25)
    assert len({group["peak"] for group in fresh.optimizer.param_groups}) == 1


def test_the_networks_flags_are_its_arguments_and_fresh_bins_have_readmes_colours(
        photos, tmp_path):
    asked = {"encoder": "resnet34", "decoder": "plain", "stages": 3}
    model = made_training(photos, tmp_path, loss="bins", **asked).model
    assert asked.items() <= model.arguments.items()
    assert (model.temperature, model.saturation) == (0.6, 1.33)


def test_each_loss_is_measured_in_its_own_unit(photos, tmp_path):
    """Of a gray guess for made photographs: their ab is 25 units long, about 20 in each."""
    found = {loss: made_training(photos, tmp_path / loss, loss=loss).validate()["val_loss"]
             for loss in ("mse", "l1", "huber", "bins")}
    assert 200 < found["mse"] < 600 and 10 < found["l1"] < 25 and 4 < found["bins"] < 7
    assert found["l1"] * 5 < found["huber"] < found["mse"] / 2


def test_batches_have_the_size_and_number_asked_for_and_validation_is_as_stored(
        photos, tmp_path):
    training = made_training(photos, tmp_path, size=96, batch_size=5, limit=7)
    assert next(training.batches(training.train_data, range(7))).shape == (5, 3, 96, 96)
    assert (len(training.train_data), training.steps_per_epoch) == (7, 2)
    other = made_training(photos, tmp_path / "b", size=96, batch_size=5, limit=7, seed=1)
    lab = next(other.batches(other.train_data, range(7)))
    assert not torch.equal(lab, next(training.batches(training.train_data, range(7))))
    training = made_training(photos, tmp_path / "whole", size=256, limit=3)
    assert len(training.train_data) == len(training.val_data) == 3
    lab = next(training.batches(training.val_data, range(3)))
    stored = np.load(photos / "processed" / "val.npy")[training.val_data.chosen]
    stored = (stored.astype(float) - [0, 128, 128]) / [2.55, 1, 1]
    assert lab.permute(0, 2, 3, 1).numpy() == pytest.approx(stored, abs=1e-4)


def test_what_a_layer_drops_is_a_function_of_the_step(photos, tmp_path):
    weights = []
    for noise in (1, 2):
        training = made_training(photos, tmp_path / str(noise))
        training.model.bottleneck.append(torch.nn.Dropout(0.5))
        torch.manual_seed(noise)
        first_step(training)
        weights.append(training.model.head.weight)
    assert torch.equal(*weights)


def test_the_averaged_weights_are_those_that_are_validated(photos, tmp_path):
    training = made_training(photos, tmp_path)
    start = training.validate()["val_loss"]
    torch.nn.init.constant_(training.model.head.bias, 1.0)  # 110 ab units off
    assert training.validate()["val_loss"] == start
    torch.nn.init.constant_(training.ema.module.head.bias, 1.0)
    assert training.validate()["val_loss"] > start + 1000


def test_a_gan_keeps_its_last_epoch_not_the_one_closest_to_its_start(
        photos, tmp_path, checkpoints, monkeypatch):
    monkeypatch.setattr(Training, "validate", lambda self: {
        "val_loss": 5.0 + self.step, "color_ratio": 1.0})
    run(photos, tmp_path, loss="gan", init=str(checkpoints["ab"]), epochs=1)
    assert read_checkpoint(tmp_path / "best_model.tar")["training"]["scores"]["epoch"] == 1


def test_a_gan_weighs_l1_and_teaches_its_discriminator_at_a_rate_of_its_own(
        photos, tmp_path, checkpoints, monkeypatch):
    monkeypatch.setattr(module, "L1_WEIGHT", 0.0)
    training = made_training(photos, tmp_path, loss="gan", init=str(checkpoints["ab"]))
    before = training.discriminator.layers[0].weight.clone()
    first_step(training)
    assert training.model.head.weight.grad.any()  # of the adversarial loss alone
    assert not torch.equal(before, training.discriminator.layers[0].weight)
    assert [(g["lr"], *g["betas"]) for g in training.optimizer.param_groups][2] == (
        1e-4, 0.5, 0.999)
    monkeypatch.setattr(Training, "adversarial_losses",
                        lambda self, L, ab, made: (0 * made.sum(), 0 * made.sum()))
    first_step(training)
    assert not training.model.head.weight.grad.any()  # and without it there is none


def test_long_gradients_are_clipped(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_NORM", 1e-3)
    training = made_training(photos, tmp_path)
    first_step(training)
    squares = sum(p.grad.square().sum() for p in training.model.parameters())
    assert squares.sqrt().item() == pytest.approx(1e-3, rel=0.01)


def test_film_changes_the_lightness_of_some_and_the_colour_of_none(photos, tmp_path):
    plain, film = (next(training.batches(training.train_data, range(8)))
                   for training in (made_training(photos, tmp_path, film=f, batch_size=8)
                                    for f in (False, True)))
    assert torch.equal(plain[:, 1:], film[:, 1:])
    changed = (plain[:, 0] != film[:, 0]).flatten(1).any(dim=1)
    assert changed.any() and not changed.all()


@pytest.mark.parametrize("amp, kind", [("bf16", torch.bfloat16), ("off", torch.float32)])
def test_amp_is_the_arithmetic_of_the_network(amp, kind, photos, tmp_path):
    training, seen = made_training(photos, tmp_path, amp=amp), []
    training.model.bottleneck.register_forward_hook(
        lambda module, given, made: seen.append(made.dtype))
    first_step(training)
    assert seen == [kind]


def test_the_averaged_weights_are_those_that_are_shipped(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "validate", better_and_better)
    resume = run(photos, tmp_path)["resume"]
    shipped = read_checkpoint(tmp_path / "best_model.tar")["weights"]["head.weight"]
    assert torch.equal(shipped, resume["average"]["module.head.weight"].half())
    assert not torch.equal(shipped, resume["weights"]["head.weight"].half())
    assert resume["average"]["n_averaged"] == 6  # steps


@pytest.mark.parametrize("seconds, times", [(0, 8), (3600, 2)])
def test_last_tar_is_written_every_so_many_seconds_and_at_both_ends(
        seconds, times, photos, tmp_path, monkeypatch):
    names = []

    def counted(path, *args, **extra):
        names.append(path.name)
        save_checkpoint(path, *args, **extra)
    monkeypatch.setattr(module, "save_checkpoint", counted)
    monkeypatch.setattr(module, "SAVE_SECONDS", seconds)
    run(photos, tmp_path)  # two epochs of three steps
    assert names.count("last.tar") == times


def test_a_regression_from_a_bins_checkpoint_fits_its_mean_and_keeps_its_colours(
        photos, tmp_path, checkpoints, capsys):
    contents = run(photos, tmp_path, init=str(checkpoints["bins"]), epochs=1)
    assert contents["model"]["head"] == "bins"
    assert contents["training"]["settings"]["lr"] == module.TRAINED_LR
    # the last of three steps, one of them warm-up: half of the peak, whatever the shares
    assert contents["resume"]["history"][1]["lr"] == pytest.approx(module.TRAINED_LR / 2)
    before = read_checkpoint(checkpoints["bins"])
    assert contents["colors"]["temperature"] == before["colors"]["temperature"]
    now, then = (c["weights"]["head.weight"] for c in (contents, before))
    assert not torch.equal(now, then)
    prior = [c["colors"]["prior"] for c in (contents, before)]  # of these photographs
    assert not torch.equal(*prior) and contents["mean_ab"].any()
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("training the bins head of resnet18 by mse")
    assert f"starting from {checkpoints['bins']}" in first


def test_from_an_encoders_weights_mse_trains_an_ab_head(photos, tmp_path, checkpoints,
                                                        capsys):
    encoder = {name.removeprefix("encoder."): w for name, w in load_checkpoint(
        checkpoints["ab"])[0].state_dict().items() if name.startswith("encoder.")}
    torch.save(encoder, tmp_path / "encoder.pth")
    contents = run(photos, tmp_path / "out", init=str(tmp_path / "encoder.pth"), epochs=1)
    assert contents["model"]["head"] == "ab"
    assert contents["training"]["settings"]["lr"] == module.FRESH_LR
    assert "training the ab head of resnet18 by mse" in capsys.readouterr().err


def test_the_settings_line_is_a_command_that_does_the_same(photos, tmp_path, capsys):
    contents = run(photos, tmp_path / "a folder", epochs=1, film=True, limit=6)
    lines = capsys.readouterr().err.splitlines()
    line = next(line for line in lines if "settings: " in line)
    words = shlex.split(line.removeprefix("settings: python main.py "))
    given = main.parse(words[1:], main.read_command("train")[1])
    assert words[0] == "train" and given["film"] is True and "lr" in given
    settings = train.__kwdefaults__ | given
    del settings["resume"], settings["typed"]
    assert settings == contents["training"]["settings"]


@pytest.mark.parametrize("flags, said", [
    ({"loss": "mze"}, "--loss mze: choose one of mse, l1, huber, bins, gan"),
    ({"decoder": "net"}, "--decoder net: choose one of unet, plain"),
    ({"encoder": "resnet"}, "--encoder resnet: choose one of resnet18")])
def test_what_is_in_no_list_is_refused_before_anything_is_written(flags, said, tmp_path):
    with pytest.raises(FlagError, match=said):
        train(data=tmp_path, out=tmp_path / "out", **flags)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- does training help at all

def test_the_start_competes_and_it_is_said_that_training_did_not_help(
        photos, tmp_path, checkpoints, monkeypatch, capsys):
    monkeypatch.setattr(Training, "validate",
                        lambda self: {"val_loss": 5.0 + self.step, "color_ratio": 1.0})
    contents = run(photos, tmp_path, init=str(checkpoints["ab"]))
    best, start = (read_checkpoint(path) for path in (tmp_path / "best_model.tar",
                                                      checkpoints["ab"]))
    assert contents["resume"]["history"][0]["epoch"] == 0
    assert best["training"]["scores"]["epoch"] == 0
    assert torch.equal(best["weights"]["head.weight"], start["weights"]["head.weight"])
    assert "epoch 0, val_loss 5 (5 at the start)" in (out := capsys.readouterr().out)
    assert "training did not help" in out


def test_it_is_said_how_much_training_helped(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Training, "validate", better_and_better)
    run(photos, tmp_path)
    out = capsys.readouterr().out
    assert "epoch 2, val_loss 44 (50 at the start)" in out and "did not help" not in out
    assert "val_loss -12.0% on 4 photographs" in out


def test_values_that_are_not_finite_are_never_announced(photos, tmp_path, monkeypatch,
                                                        capsys):
    monkeypatch.setattr(Training, "validate", lambda self: {"val_loss": math.nan})
    with pytest.raises(ColorizeError, match="best_model.tar.*no epoch had a finite"):
        run(photos, tmp_path)
    assert capsys.readouterr().out == "" and not (tmp_path / "best_model.tar").exists()


def test_a_best_that_could_not_be_written_fails_the_command(photos, tmp_path, monkeypatch,
                                                            capsys):
    def refuse(path, *args, **extra):
        if path.name == "best_model.tar" and extra["training"]["scores"]["epoch"] > 0:
            raise ColorizeError(f"{path}: cannot be written (the disk is full)")
        save_checkpoint(path, *args, **extra)
    monkeypatch.setattr(module, "save_checkpoint", refuse)
    monkeypatch.setattr(Training, "validate", better_and_better)
    with pytest.raises(ColorizeError, match="the disk is full"):
        run(photos, tmp_path)
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------ trust

def stop_at(step, monkeypatch, number=signal.SIGTERM):
    """A signal comes to this process while the given step runs."""
    learn = Training.train_step

    def interrupted(self, lab):
        learn(self, lab)
        if self.step == step:
            os.kill(os.getpid(), number)
    monkeypatch.setattr(Training, "train_step", interrupted)
    # where the tests run under nohup, hang-ups are ignored, which training would respect
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)


@pytest.mark.parametrize("step, number", [(1, signal.SIGTERM), (3, signal.SIGUSR1),
                                          (5, signal.SIGHUP)])
def test_a_resumed_run_equals_the_whole_one_bit_for_bit(step, number, photos, tmp_path,
                                                        monkeypatch):
    flags = {"loss": "bins", "film": True}
    whole = run(photos, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stop_at(step, patch, number)
        run(photos, tmp_path / "cut", **flags)
    assert stopped.value.code == 128 + number
    assert read_checkpoint(tmp_path / "cut" / "last.tar")["training"]["step"] == step
    resumed = run(photos, tmp_path / "cut", resume="auto", **flags)
    assert same_weights(whole, resumed)
    keys = ("epoch", "step", "lr", "loss", "val_loss", "psnr")  # the start has no loss yet
    rows = whole["resume"]["history"], resumed["resume"]["history"]
    for one, other in zip(*rows, strict=True):
        assert [one.get(k) for k in keys] == [other.get(k) for k in keys]


def test_ctrl_c_while_a_stop_is_awaited_stops_at_once_and_a_second_hang_up_does_not(
        photos, tmp_path, monkeypatch):
    def asked_twice(self, lab):
        for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        asked.append(number)
        os.kill(os.getpid(), signal.SIGINT)
    asked = []
    monkeypatch.setattr(Training, "train_step", asked_twice)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path)
    assert asked == [signal.SIGTERM]


def test_workers_leave_signals_to_the_main_process():
    code = ("import os, signal, torch, train\n"
            "class Data(torch.utils.data.Dataset):\n"
            "    def __len__(self): return 4\n"
            "    def __getitem__(self, n):\n"
            "        for number in train.SIGNALS: os.kill(os.getpid(), number)\n"
            "        return n\n"
            "loader = torch.utils.data.DataLoader(Data(), num_workers=1,\n"
            "                                     worker_init_fn=train.ignore_signals)\n"
            "print([int(n) for n in loader])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, env=ONE_THREAD,
                          capture_output=True)
    assert done.stdout == "[0, 1, 2, 3]\n", done.stderr


def test_a_gan_resumes_with_its_discriminator(photos, tmp_path, monkeypatch, checkpoints):
    flags = {"loss": "gan", "init": str(checkpoints["ab"])}
    whole = run(photos, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(2, patch)
        run(photos, tmp_path / "cut", **flags)
    resumed = run(photos, tmp_path / "cut", resume="auto", **flags)
    assert same_weights(whole, resumed)
    assert all(torch.equal(w, resumed["resume"]["discriminator"][k])
               for k, w in whole["resume"]["discriminator"].items())


def test_the_seed_is_the_run(photos, tmp_path):
    one, two = (run(photos, tmp_path / name, seed=3, epochs=1) for name in "ab")
    other = run(photos, tmp_path / "c", seed=4, epochs=1)
    assert same_weights(one, two) and not same_weights(one, other)


@pytest.mark.parametrize("change, said", [
    ({"batch_size": 4}, "batch_size 3, not 4"), ({"loss": "l1"}, "loss mse, not l1"),
    ({"epochs": 1}, "epochs 2, not 1"),
    ({"data": "other"}, "the photographs have changed")])
def test_resuming_names_the_setting_that_differs(change, said, photos, tmp_path):
    run(photos, tmp_path / "out")
    if "data" in change:
        shutil.copytree(photos, tmp_path / "other")
        (tmp_path / "other" / "train" / "round" / "1.png").unlink()
        change = {"photos": tmp_path / "other"}
    with pytest.raises(ColorizeError, match=said):
        run(**{"photos": photos, "out": tmp_path / "out", "resume": "auto"} | change)


def test_resume_alone_goes_on_with_the_settings_in_the_checkpoint(photos, tmp_path,
                                                                  monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(2, patch)
        run(photos, tmp_path, loss="l1", film=True, epochs=3)
    train(out=tmp_path, resume="auto")
    contents = read_checkpoint(tmp_path / "last.tar")
    assert contents["training"]["settings"]["loss"] == "l1"
    assert contents["training"]["step"] == 9


def test_a_second_training_into_a_folder_that_holds_one_is_refused(photos, tmp_path):
    run(photos, tmp_path, epochs=1)
    before = (tmp_path / "best_model.tar").read_bytes()
    with pytest.raises(ColorizeError, match="holds a training: go on by --resume auto, or begin in another"):
        run(photos, tmp_path, epochs=1, seed=1)
    assert (tmp_path / "best_model.tar").read_bytes() == before
    (tmp_path / "last.tar").unlink()
    with pytest.raises(ColorizeError, match="holds a training: begin in another"):
        run(photos, tmp_path, epochs=1, resume="auto")  # of which there is nothing left


def test_two_trainings_at_once_cannot_write_into_one_folder(photos, tmp_path):
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
            "from train import claim; lock = claim(Path(sys.argv[2]), False)\n"
            "print('mine', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code, ROOT, tmp_path], text=True,
                          stdout=subprocess.PIPE, env=ONE_THREAD) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ColorizeError, match="another training writes there"):
            module.claim(tmp_path, False)
        other.kill()
    module.claim(tmp_path, False).close()  # no lock outlives a kill


def test_an_out_that_cannot_be_written_is_found_before_the_first_step(photos, tmp_path,
                                                                      monkeypatch):
    monkeypatch.setattr(Training, "train_step", None)
    (tmp_path / "file").touch()
    with pytest.raises(ColorizeError, match="--out .*cannot be written"):
        run(photos, tmp_path / "file")

    def full(path, *args, **extra):  # there is room for a model, not for all of a training
        if path.name == "last.tar":
            raise ColorizeError(f"{path}: cannot be written (the disk is full)")
    monkeypatch.setattr(module, "save_checkpoint", full)
    with pytest.raises(ColorizeError, match="the disk is full"):
        run(photos, tmp_path / "out")


def test_pictures_that_cannot_be_written_do_not_end_a_training(photos, tmp_path, capsys):
    (tmp_path / "curves.png").mkdir()
    assert run(photos, tmp_path)["training"]["step"] == 6
    assert "curves.png: cannot be written" in capsys.readouterr().err


def spoil(contents: dict, where: str, value) -> None:
    """contents with one place changed; without a value it is taken out."""
    *path, last = where.split("/")
    for key in path:
        contents = contents[int(key) if key.isdigit() and key not in contents else key]
    last = int(last) if last.isdigit() else last
    contents.pop(last) if value is None else contents.__setitem__(last, value)


@pytest.mark.parametrize("where, value", [
    ("training/settings", None), ("training/settings", [1]),
    ("training/settings/film", None),
    ("training/settings/batch_size", 0), ("training/ranks", None),
    ("training/fingerprint", None), ("training/start", None),
    ("resume/weights", [1]), ("resume/weights/head.weight", torch.zeros(3)),
    ("resume/average", {}), ("resume/optimizer", {"state": 3}), ("training/step", "x"),
    ("training/step", 10 ** 9), ("resume/history", []), ("resume/history/0/epoch", None),
    ("training/trained", None)])
def test_a_malformed_last_tar_is_named_in_one_line(where, value, cut, tmp_path):
    path = tmp_path / "last.tar"
    contents = torch.load(cut, weights_only=True)
    spoil(contents, where, value)
    torch.save(contents, path)
    with pytest.raises(ColorizeError, match=r"^(--resume )?\S*last\.tar: .*\Z"):
        train(out=tmp_path, resume=str(path))


@pytest.fixture(scope="module")
def cut(photos, tmp_path_factory):
    """The last.tar of a training of one epoch that could go on for another."""
    out = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop_at(4, patch)
        run(photos, out)
    return out / "last.tar"


def test_resuming_on_another_number_of_ranks_is_refused(cut, tmp_path):
    contents = torch.load(cut, weights_only=True)
    contents["training"]["ranks"] = 2
    torch.save(contents, tmp_path / "last.tar")
    with pytest.raises(ColorizeError, match="last.tar: it ran on 2 devices, not 1: start as many"):
        train(out=tmp_path, resume="auto")


def test_without_its_best_epoch_a_training_is_not_resumed(photos, tmp_path):
    run(photos, tmp_path, epochs=1)
    (tmp_path / "best_model.tar").unlink()  # or last.tar alone was copied here
    with pytest.raises(ColorizeError, match="last.tar: copy its best_model.tar beside it"):
        train(out=tmp_path, resume="auto", epochs=2)


def test_a_finished_training_says_how_it_goes_on(photos, tmp_path, capsys):
    run(photos, tmp_path, epochs=1)
    assert "to go on" not in capsys.readouterr().err
    run(photos, tmp_path, epochs=1, resume="auto")
    assert "its 1 epochs are done; to go on give more --epochs" in capsys.readouterr().err
    assert len(run(photos, tmp_path, resume="auto", epochs=2)["resume"]["history"]) == 3


def test_a_flag_that_was_typed_must_agree_even_where_it_is_the_default(cut, capsys):
    folder = str(cut.parent)
    assert main.main(["train", "--out", folder, "--resume", "auto", "--size", "256"]) == 1
    assert "trained with size 64, not 256: leave that out" in capsys.readouterr().err


def test_a_random_start_is_never_the_best_model(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Training, "validate",
                        lambda self: {"val_loss": 5.0 + self.step, "color_ratio": 1.0})
    run(photos, tmp_path, init="none")
    assert read_checkpoint(tmp_path / "best_model.tar")["training"]["scores"]["epoch"] == 1
    assert "epoch 1, val_loss 8 (5 at the start)" in capsys.readouterr().out


def test_a_training_by_a_loss_that_was_removed_since_names_it(cut, monkeypatch):
    monkeypatch.delitem(module.OBJECTIVES, "mse")
    with pytest.raises(FlagError, match="--loss mse: choose one of l1"):
        train(out=cut.parent, resume="auto")


def test_a_model_is_no_training_to_resume(photos, checkpoints):
    with pytest.raises(ColorizeError, match="no last.tar of this program.*--init"):
        run(photos, checkpoints["ab"].parent, resume=str(checkpoints["ab"]))


def poison(monkeypatch, rows):
    """The photographs in the given rows of the array become NaN."""
    sample = ColorizeData.__getitem__

    def poisoned(self, n):
        bad = self.train and self.row(n) in rows
        return sample(self, n).float() * (float("nan") if bad else 1)
    monkeypatch.setattr(ColorizeData, "__getitem__", poisoned)


def test_a_step_that_is_not_finite_is_skipped_and_harms_nothing(
        photos, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {5})
    contents = run(photos, tmp_path)
    assert capsys.readouterr().err.count("not finite; skipped") == 2
    assert all(w.isfinite().all() for w in contents["resume"]["weights"].values())
    assert math.isfinite(contents["resume"]["history"][-1]["val_loss"])


def test_ten_bad_steps_in_a_row_end_the_run_with_advice(photos, tmp_path, monkeypatch):
    good = run(photos, tmp_path, epochs=1)
    poison(monkeypatch, set(range(8)))
    with pytest.raises(ColorizeError, match="10 times in a row.*--lr"):
        run(photos, tmp_path, epochs=5, resume="auto")
    assert same_weights(good, read_checkpoint(tmp_path / "last.tar"))


def test_a_full_disk_ends_the_run_in_one_line_and_resuming_goes_on(
        photos, tmp_path, monkeypatch):
    whole = run(photos, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(2, patch)
        run(photos, tmp_path / "cut")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(ColorizeError, match="the disk is full"):
            run(photos, tmp_path / "cut", resume="auto")
    assert not list((tmp_path / "cut").glob("*.part"))
    assert same_weights(whole, run(photos, tmp_path / "cut", resume="auto"))


@pytest.mark.parametrize("flags, said", [
    ({"loss": "gan"}, "--init PATH"),
    ({"loss": "gan", "init": "none", "encoder": "resnet34"}, "--init PATH")])
def test_flags_that_contradict_each_other_are_named(flags, said, photos, tmp_path):
    with pytest.raises(FlagError, match=said):
        run(photos, tmp_path, **flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_a_cuda_that_is_not_there_is_said(photos, tmp_path):
    with pytest.raises(ColorizeError, match="--device cuda"):
        run(photos, tmp_path, device="cuda")


def command(photos, out, *flags, launcher=()):
    """The command line of a small training."""
    return [sys.executable, *launcher, str(ROOT / "main.py"), "train",
            "--data", str(photos), "--out", str(out), "--size", "64",
            "--stages", "2", "--init", "none", "--device", "cpu",
            "--batch_size", "3", *flags]


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def finish(line) -> None:
    """Run a command line to its end."""
    subprocess.run(line, env=ONE_THREAD, check=True, capture_output=True, timeout=120)


def test_kill_9_at_any_moment_leaves_checkpoints_that_load_and_go_on(photos, tmp_path):
    """COLORIZE_KILLS=50 for more; in the end the weights are an uninterrupted run's."""
    prepare(photos)
    eager = tmp_path / "eager.py"  # last.tar at every step
    eager.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                     "import main, train; train.SAVE_SECONDS = 0\n"
                     "sys.exit(main.main(sys.argv[1:]))\n")

    def eagerly(out, *flags):
        line = command(photos, out, "--epochs", "4", *flags)
        return [str(eager) if word == str(ROOT / "main.py") else word for word in line]
    finish(eagerly(tmp_path / "whole"))
    cut, moments = tmp_path / "cut", random.Random(0)
    for _ in range(int(os.environ.get("COLORIZE_KILLS", 3))):
        process = subprocess.Popen(
            eagerly(cut, "--resume", "auto"), env=ONE_THREAD, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for line in process.stderr:  # wait for the training proper, then let chance decide
            if line.startswith(("epoch", "settings")):
                break
        time.sleep(moments.uniform(0, 1.0))
        process.kill()
        process.wait()
        for path in cut.glob("*.tar"):
            read_checkpoint(path)
    finish(eagerly(cut, "--resume", "auto"))
    whole = read_checkpoint(tmp_path / "whole" / "last.tar")
    assert same_weights(whole, read_checkpoint(cut / "last.tar"))
    load_checkpoint(cut / "best_model.tar")


def test_two_ranks_do_the_work_of_one(photos, tmp_path):
    """Half the batch on each of two CPU ranks, batch norm frozen: the same 20 steps."""
    prepare(photos)
    frozen = tmp_path / "frozen.py"  # batch norm would see half the batch on each
    frozen.write_text("import sys, torch\n"
                      "torch.nn.BatchNorm2d.train = lambda self, mode=True: self\n"
                      "off = property(lambda _: False, lambda *_: None)\n"
                      "torch.nn.BatchNorm2d.training = off\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\n"
                      "import main; sys.exit(main.main(sys.argv[1:]))\n")
    flags = ["--epochs", "10", "--amp", "off"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    one = command(photos, tmp_path / "one", *flags, "--batch_size=4")
    two = command(photos, tmp_path / "two", *flags, "--batch_size=2", launcher=torchrun)
    for line in (one, two):
        line.remove("--batch_size"), line.remove("3")
        line[line.index(str(ROOT / "main.py"))] = str(frozen)
        finish(line)
    one, two = (read_checkpoint(tmp_path / name / "last.tar")["resume"]
                for name in ("one", "two"))
    assert one["history"][-1]["step"] == two["history"][-1]["step"] == 20
    for column in ("loss", "val_loss", "psnr"):
        first, second = (each["history"][-1][column] for each in (one, two))
        assert second == pytest.approx(first, rel=0.01)


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("names", [{"RANK": "1"}, {"RANK": "x"}, {"WORLD_SIZE": "2"}])
def test_ranks_are_those_of_torchrun_and_not_of_a_stray_variable(names, launched, monkeypatch):
    own = {"TORCHELASTIC_RUN_ID": "7", "WORLD_SIZE": "4", "RANK": "3"} if launched else names
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    found = runpy.run_path(str(ROOT / "basic_model.py"), run_name="a copy")
    assert (found["WORLD"], found["RANK"]) == ((4, 3) if launched else (1, 0))


def test_a_training_is_not_resumed_into_another_folder_than_was_asked(cut, tmp_path):
    before = cut.read_bytes()
    with pytest.raises(FlagError, match="leave out --out"):
        train(out=tmp_path / "elsewhere", resume=str(cut), epochs=3)
    assert cut.read_bytes() == before and not list(tmp_path.iterdir())
