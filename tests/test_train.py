"""Objectives, the loop, resuming, kills, ranks."""

import errno
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import ROOT

from basic_model import bins_prior, color_bins, load_checkpoint, read_tensors
from colorize_data import ColorizeData, count_colors, prepare
from photo import ColorizeError, FlagError
from train import (BinsLoss, Training, ema_update, learning_rate, regression_loss,
                   scene_loss, train)

TINY = {"size": 64, "stages": 2, "init": "none", "epochs": 2, "batch_size": 3, "device": "cpu"}


def run(photos, out, **flags):
    """A small training; returns last.tar's contents."""
    train(data=photos, out=out, **TINY | flags)
    return read_tensors(out / "last.tar")


def same_weights(one: dict, other: dict) -> bool:
    weights, others = one["resume"]["weights"], other["resume"]["weights"]
    return all(torch.equal(w, others[name]) for name, w in weights.items())


# -------------------------------------------------------------------------------- objectives

def test_regressions_are_the_textbook_ones_on_ab_over_110():
    ab, true = (np.random.default_rng(seed).uniform(-60, 60, (2, 2, 3, 4)) for seed in (0, 1))
    error, chroma = np.abs(ab - true) / 110, np.hypot(true[:, :1], true[:, 1:])
    huber = np.where(error < 0.1, error ** 2 / 2, 0.1 * (error - 0.05))
    for name, expected in (("mse", error ** 2), ("l1", error), ("huber", huber)):
        for k in (0.0, 2.0):
            weighted = (expected * (1 + k * chroma / 110)).mean()
            loss = regression_loss(name, torch.tensor(ab), torch.tensor(true), k)
            assert loss.item() == pytest.approx(weighted, rel=1e-5)


def test_bins_loss_is_the_cross_entropy_against_the_soft_encoding():
    bins = color_bins()
    prior = torch.softmax(torch.randn(len(bins), generator=torch.Generator().manual_seed(0)), 0)
    logits = torch.randn(1, len(bins), 1, 1, generator=torch.Generator().manual_seed(1))
    a, b = 23.0, -14.0
    distance = np.hypot(*(bins.numpy() - [a, b]).T)
    nearest = np.argsort(distance)[:5]
    soft = np.exp(-distance[nearest] ** 2 / 50)
    soft /= soft.sum()
    log_probability = torch.log_softmax(logits[0, :, 0, 0], 0).numpy()
    rarity = 1 / (0.5 * prior.numpy() + 0.5 / len(bins))
    rarity /= (prior.numpy() * rarity).sum()
    expected = -(soft * log_probability[nearest]).sum() * rarity[nearest[0]]
    ab = torch.tensor([a, b]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    assert BinsLoss(bins, prior, 0.5)(logits, ab).item() == pytest.approx(expected, rel=1e-4)


def test_photographs_without_a_class_do_not_count_for_the_classes():
    scenes = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    expected = math.log(1 + math.exp(-2))
    assert scene_loss(scenes, torch.tensor([0, -1])).item() == pytest.approx(expected)
    assert scene_loss(scenes, torch.tensor([-1, -1])).item() == 0


def test_color_statistics_are_counts(photos):
    prepare(photos)
    data = ColorizeData([photos / "processed" / "train.npy"])
    histogram, mean_ab = count_colors(data)
    prior = bins_prior(histogram, color_bins())
    stored = np.load(photos / "processed" / "train.npy")[:, ::4, ::4].reshape(-1, 3).astype(float)
    assert prior.sum().item() == pytest.approx(1, abs=1e-5)
    mean = stored[:, 1:].mean(axis=0) - 128
    assert (prior[:, None] * color_bins()).sum(dim=0).numpy() == pytest.approx(mean, abs=1.0)
    L = np.rint(stored[:, 0] / 2.55).astype(int)
    for value in (40, 60):
        expected = stored[L == value, 1:].mean(axis=0) - 128
        assert mean_ab[value] == pytest.approx(expected, abs=0.5)


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 100, 2.0, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0, abs=1e-12)


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


# ----------------------------------------------------------------------------------- the loop

@pytest.mark.parametrize("loss", ["mse", "l1", "huber", "bins", "gan"])
def test_each_objective_lowers_its_own_loss_and_its_checkpoint_colours(loss, photos, tmp_path,
                                                                       checkpoints):
    history = run(photos, tmp_path, loss=loss, epochs=6, limit=4, batch_size=4, lr=3e-3, crop=False,
                  init=str(checkpoints["ab"]), class_weight=0.1)["resume"]["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert "accuracy" in history[-1] and ("d_real" in history[-1]) == (loss == "gan")
    model, _ = load_checkpoint(tmp_path / "best_model.tar")
    with torch.no_grad():
        assert model.predict(torch.full((1, 1, 40, 40), 50.0)).isfinite().all()


def test_four_photographs_are_learnt_by_heart(photos, tmp_path):
    history = run(photos, tmp_path, epochs=40, limit=4, batch_size=4, crop=False,
                  lr=5e-3)["resume"]["history"]
    assert history[0]["loss"] > 300 and history[-1]["loss"] < 100  # mean squared error in ab units


def test_a_run_writes_what_it_promises_and_best_is_a_copy(photos, tmp_path, capsys):
    contents = run(photos, tmp_path, epochs=3)
    assert {path.name for path in tmp_path.iterdir()} == {
        "best_model.tar", "last.tar", "history.csv", "curves.png", "preview.png"}
    history = contents["resume"]["history"]
    assert (tmp_path / "history.csv").read_text().count("\n") == 4
    assert contents["resume"]["best"] == min(row["val_loss"] for row in history)
    best = read_tensors(tmp_path / "best_model.tar")["training"]
    assert best["scores"]["val_loss"] == contents["resume"]["best"]
    assert {"epoch", "step", "lr", "loss", "val_loss", "mse", "distance", "psnr",
            "colorfulness"} <= set(history[0])
    # both in ab units squared
    assert history[0]["val_loss"] == pytest.approx(history[0]["mse"], rel=0.02)
    assert Image.open(tmp_path / "preview.png").size == (6 * 164 + 4, 2 * 180 + 4)
    assert contents["training"]["settings"]["epochs"] == 3 and contents["training"]["step"] == 9
    assert "best_model.tar" in capsys.readouterr().out


def test_best_is_not_the_last_when_it_gets_worse(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "validate", lambda self: {"val_loss": self.step})
    run(photos, tmp_path)
    best, last = (read_tensors(tmp_path / name) for name in ("best_model.tar", "last.tar"))
    assert best["training"]["step"] == 3 and last["training"]["step"] == 6
    assert not torch.equal(best["weights"]["head.weight"], last["weights"]["head.weight"])


def test_final_trains_on_all_and_keeps_the_last(photos, tmp_path):
    contents = run(photos, tmp_path, final=True)
    assert contents["training"]["photographs"] == 12
    best = read_tensors(tmp_path / "best_model.tar")
    assert best["training"]["step"] == contents["training"]["step"]


def made_training(photos, tmp_path, **flags):
    settings = train.__kwdefaults__ | TINY | {"data": photos, "out": tmp_path, "workers": 0} | flags
    training = Training(settings, torch.device("cpu"), False, prepare(photos))
    training.train_mode()
    return training


def test_adversarial_steps_leave_the_other_network_alone(photos, tmp_path, checkpoints):
    training = made_training(photos, tmp_path, loss="gan", init=str(checkpoints["ab"]))
    lab = torch.rand(2, 3, 64, 64) * 100
    generator = {k: v.clone() for k, v in training.model.named_parameters()}
    training.discriminator_step(lab[:, :1], lab[:, 1:], -lab[:, 1:], 1.0)
    assert all(torch.equal(v, generator[k]) for k, v in training.model.named_parameters())
    judge = {k: v.clone() for k, v in training.discriminator.named_parameters()}
    training.d_optimizer.zero_grad()
    training.adversarial_loss(lab[:, :1], training.model(lab[:, :1])).backward()
    assert all(torch.equal(v, judge[k]) and v.grad is None
               for k, v in training.discriminator.named_parameters())
    assert any(p.grad.any() for p in training.model.parameters())


@pytest.mark.parametrize("flags, frozen, still", [
    ({"freeze_encoder": True}, "encoder.", "encoder."), ({"freeze_bn": "all"}, "nothing", ""),
    ({"freeze_bn": "encoder"}, "nothing", "encoder."), ({}, "nothing", "nothing")])
def test_what_is_frozen_stays(flags, frozen, still, photos, tmp_path):
    training = made_training(photos, tmp_path, **flags)
    before = {k: v.clone() for k, v in training.model.state_dict().items()}
    for lab, labels in training.batches(training.train_data, 0, 6):
        training.train_step(lab, labels)
    after = training.model.state_dict()
    for name, value in before.items():
        if "running" in name:
            assert torch.equal(value, after[name]) == name.startswith(still), name
        elif name.startswith(frozen):
            assert torch.equal(value, after[name]), name
    assert not torch.equal(before["blocks.0.0.weight"], after["blocks.0.0.weight"])


def test_fresh_weights_learn_fast_and_trained_ones_slowly(photos, tmp_path, checkpoints):
    training = made_training(photos, tmp_path, init=str(checkpoints["ab"]), loss="bins",
                             encoder_lr=0.1, decoder_lr=0.2)
    scales = {id(p): g["scale"] for g in training.optimizer.param_groups for p in g["params"]}
    found = {name: scales[id(p)] for name, p in training.model.named_parameters()}
    expected = {"encoder.conv1.weight": 0.1, "blocks.0.0.weight": 0.2, "head.weight": 1.0}
    assert {name: found[name] for name in expected} == expected


def test_a_regression_from_a_bins_checkpoint_fits_its_mean_and_keeps_its_colours(photos, tmp_path,
                                                                                 checkpoints):
    contents = run(photos, tmp_path, init=str(checkpoints["bins"]), epochs=1)
    assert contents["model"]["head"] == "bins" and contents["training"]["settings"]["lr"] == 2e-4
    # the last of three steps, one of them warm-up: half of the peak, whatever the groups' shares
    assert contents["resume"]["history"][0]["lr"] == pytest.approx(1e-4)
    before = read_tensors(checkpoints["bins"])
    assert contents["colors"]["temperature"] == before["colors"]["temperature"]
    assert not torch.equal(contents["weights"]["head.weight"], before["weights"]["head.weight"])


# -------------------------------------------------------------------------------------- trust

def stop_at(step, monkeypatch):
    """SIGTERM comes to this process while the given step runs."""
    learn = Training.train_step

    def interrupted(self, lab, labels):
        learn(self, lab, labels)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(Training, "train_step", interrupted)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_resumed_run_equals_the_whole_one_bit_for_bit(step, photos, tmp_path, monkeypatch):
    flags = {"loss": "bins", "film": True}
    whole = run(photos, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stop_at(step, patch)
        run(photos, tmp_path / "cut", **flags)
    assert stopped.value.code == 143
    assert read_tensors(tmp_path / "cut" / "last.tar")["resume"]["step"] == step
    resumed = run(photos, tmp_path / "cut", resume="auto", **flags)
    assert same_weights(whole, resumed)
    keys = ("epoch", "step", "lr", "loss", "val_loss", "psnr")
    for one, other in zip(whole["resume"]["history"], resumed["resume"]["history"], strict=True):
        assert [one[k] for k in keys] == [other[k] for k in keys]


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
    ({"batch_size": 4}, "--batch_size 3, not 4"), ({"loss": "l1"}, "--loss mse, not l1"),
    ({"epochs": 1}, "--epochs 2"), ({"data": "other"}, "photographs have changed")])
def test_resuming_names_the_setting_that_differs(change, said, photos, tmp_path):
    run(photos, tmp_path / "out")
    if "data" in change:
        shutil.copytree(photos, tmp_path / "other")
        (tmp_path / "other" / "train" / "round" / "1.png").unlink()
        change = {"data": tmp_path / "other"}
    with pytest.raises(ColorizeError, match=said):
        train(**{"data": photos, "out": tmp_path / "out"} | TINY | {"resume": "auto"} | change)


def test_resuming_on_another_number_of_ranks_is_refused(photos, tmp_path, monkeypatch):
    run(photos, tmp_path, epochs=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ColorizeError, match="1 ranks, not 2"):
        run(photos, tmp_path, resume="auto", epochs=2)


def test_longer_epochs_are_allowed_and_said(photos, tmp_path, capsys):
    run(photos, tmp_path, epochs=1)
    assert len(run(photos, tmp_path, resume="auto", epochs=2)["resume"]["history"]) == 2
    assert "--epochs 2 instead of 1" in capsys.readouterr().err


def test_a_model_is_no_training_to_resume(photos, tmp_path, checkpoints):
    with pytest.raises(ColorizeError, match="--init"):
        run(photos, tmp_path, resume=str(checkpoints["ab"]))


def poison(monkeypatch, rows):
    """The photographs in the given rows of the array become NaN."""
    sample = ColorizeData.__getitem__

    def poisoned(self, n):
        lab, label = sample(self, n)
        bad = self.train and self.row(n) in rows
        return lab.float() * (float("nan") if bad else 1), label
    monkeypatch.setattr(ColorizeData, "__getitem__", poisoned)


def test_a_step_that_is_not_finite_is_skipped_and_harms_nothing(photos, tmp_path, monkeypatch,
                                                                capsys):
    poison(monkeypatch, {5})
    contents = run(photos, tmp_path)
    assert contents["resume"]["skipped"] == 2
    assert capsys.readouterr().err.count("not finite; skipped") == 2
    assert all(w.isfinite().all() for w in contents["resume"]["weights"].values())
    assert math.isfinite(contents["resume"]["history"][-1]["val_loss"])


def test_ten_bad_steps_in_a_row_end_the_run_with_advice(photos, tmp_path, monkeypatch):
    good = run(photos, tmp_path, epochs=1)
    poison(monkeypatch, set(range(8)))
    with pytest.raises(ColorizeError, match="10 times in a row.*--lr"):
        run(photos, tmp_path, epochs=5, resume="auto")
    assert same_weights(good, read_tensors(tmp_path / "last.tar"))


def test_a_full_disk_leaves_the_previous_checkpoint_and_the_run_goes_on(photos, tmp_path,
                                                                        monkeypatch, capsys):
    run(photos, tmp_path, epochs=1)
    before = (tmp_path / "best_model.tar").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        train(data=photos, out=tmp_path, **TINY | {"epochs": 3, "resume": "auto"})
    assert (tmp_path / "best_model.tar").read_bytes() == before
    assert read_tensors(tmp_path / "last.tar")["resume"]["step"] == 3
    assert "the disk is full" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_out_of_memory_names_a_batch_size(photos, tmp_path, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(Training, "train_step", exhausted)
    with pytest.raises(ColorizeError, match="--batch_size 4"):
        run(photos, tmp_path, batch_size=8)


@pytest.mark.parametrize("flags, said", [
    ({"epochs": 0}, "--epochs 0"), ({"batch_size": -1}, "--batch_size"),
    ({"size": 300}, "--size 300: must be 64..256"), ({"workers": -1}, "--workers"),
    ({"rebalance": 2.0}, "--rebalance"), ({"temperature": 0.0}, "--temperature"),
    ({"temperature": 0.5}, "--loss bins"), ({"limit": 0}, "--limit"), ({"lr": -1.0}, "--lr"),
    ({"loss": "bins", "chroma_weight": 1.0}, "--chroma_weight"), ({"loss": "gan"}, "--init PATH")])
def test_settings_that_make_no_sense_are_named(flags, said, photos, tmp_path):
    with pytest.raises(FlagError, match=said):
        run(photos, tmp_path, **flags)


def test_class_weight_needs_class_folders(photos, tmp_path):
    for path in photos.glob("train/*/*.png"):
        (tmp_path / "train").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "train")
    shutil.copytree(photos / "val", tmp_path / "val")
    with pytest.raises(ColorizeError, match="--class_weight"):
        run(tmp_path, tmp_path / "out", class_weight=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_a_cuda_that_is_not_there_is_said(photos, tmp_path):
    with pytest.raises(ColorizeError, match="--device cuda"):
        run(photos, tmp_path, device="cuda")


def command(photos, out, *flags, launcher=()):
    """The command line of a small training."""
    return [sys.executable, *launcher, str(ROOT / "main.py"), "train", "--data", str(photos),
            "--out", str(out), "--size", "64", "--stages", "2", "--init", "none",
            "--device", "cpu", "--batch_size", "3", *flags]


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def finish(line) -> None:
    """Run a command line to its end."""
    subprocess.run(line, env=ONE_THREAD, check=True, capture_output=True, timeout=120)


def test_kill_9_at_any_moment_leaves_checkpoints_that_load_and_go_on(photos, tmp_path):
    """COLORIZE_KILLS=50 for more; the resumed run's weights equal an uninterrupted one's."""
    prepare(photos)
    flags = ["--epochs", "8", "--save_minutes", "0"]
    finish(command(photos, tmp_path / "whole", *flags))
    cut, moments = tmp_path / "cut", random.Random(0)
    for _ in range(int(os.environ.get("COLORIZE_KILLS", 5))):
        process = subprocess.Popen(command(photos, cut, *flags, "--resume", "auto"), env=ONE_THREAD,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for line in process.stderr:  # wait for the training proper, then let chance decide
            if line.startswith("settings"):
                break
        time.sleep(moments.uniform(0, 1.0))
        process.kill()
        process.wait()
        for path in cut.glob("*.tar"):
            read_tensors(path)
    finish(command(photos, cut, *flags, "--resume", "auto"))
    whole = read_tensors(tmp_path / "whole" / "last.tar")
    assert same_weights(whole, read_tensors(cut / "last.tar"))
    load_checkpoint(cut / "best_model.tar")


def test_two_ranks_do_the_work_of_one(photos, tmp_path):
    """Half the batch on each of two CPU ranks, batch norm frozen: the same 20 steps."""
    prepare(photos)
    flags = ["--epochs", "10", "--freeze_bn", "all", "--amp", "off"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    one = command(photos, tmp_path / "one", *flags, "--batch_size=4")
    two = command(photos, tmp_path / "two", *flags, "--batch_size=2", launcher=torchrun)
    for line in (one, two):
        line.remove("--batch_size"), line.remove("3")
        finish(line)
    one, two = (read_tensors(tmp_path / name / "last.tar")["resume"] for name in ("one", "two"))
    assert one["step"] == two["step"] == 20
    for column in ("loss", "val_loss", "psnr"):
        assert two["history"][-1][column] == pytest.approx(one["history"][-1][column], rel=0.01)
