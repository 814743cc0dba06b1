"""Training: objectives, the loop, resuming, history and curves.

    python main.py train                            # data/input -> checkpoints/best_model.tar
    python main.py train --data my_photos --epochs 50 --loss bins
    python main.py train --resume auto              # go on where it was cut
    torchrun --nproc_per_node=4 main.py train       # several devices
"""

import math
import os
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from basic_model import (AB_SCALE, ColorNet, Discriminator, all_stored_ab, choose_device, color_bins,
                         bins_prior, initialize, read_tensors, save_checkpoint,
                         soft_encode, starting_checkpoint, use_bf16)
from colorize_data import ColorizeData, class_names, count_colors, decode_lab, prepare
from photo import ColorizeError, FlagError, progress, say
from evaluate import draw_curves, draw_preview, picture_scores, write_csv

HUBER_DELTA = 11.0  # ab units: quadratic below, linear above
EMA_DECAY = 0.999   # of the averaged weights, which are the ones validated and shipped
MAX_NORM = 1.0      # longer gradients are clipped
BAD_STEPS = 10      # non-finite losses in a row that end a run
COLLAPSE = 0.1      # a discriminator's mean loss under this has stopped to teach
# these may differ between a run and its resumption; every other setting, and the ranks, may not
FREE_ON_RESUME = {"data", "out", "epochs", "resume", "init", "device", "workers", "save_minutes"}


# -------------------------------------------------------------------------------- objectives

REGRESSIONS = {  # of the error in ab/110; and the factor that brings the value back to ab units
    "mse": (F.mse_loss, AB_SCALE ** 2),
    "l1": (F.l1_loss, AB_SCALE),
    "huber": (partial(F.huber_loss, delta=HUBER_DELTA / AB_SCALE), AB_SCALE ** 2),
}


def regression_loss(name: str, ab: torch.Tensor, true_ab: torch.Tensor,
                    chroma_weight: float = 0.0) -> torch.Tensor:
    """Mean loss of ab against true_ab (N, 2, H, W), CIE units in, computed on ab/110 in float32.

    chroma_weight k: each pixel counts 1 + k*chroma/110 times.
    """
    loss = REGRESSIONS[name][0](ab.float() / AB_SCALE, true_ab / AB_SCALE, reduction="none")
    if chroma_weight:
        loss = loss * (1 + chroma_weight * true_ab.norm(dim=1, keepdim=True) / AB_SCALE)
    return loss.mean()


def scene_loss(scenes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the classes, photographs without one (-1) left out (Iizuka et al. 2016)."""
    total = F.cross_entropy(scenes.float(), labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


def rarity_weights(prior: torch.Tensor, rebalance: float) -> torch.Tensor:
    """Class weights 1/((1-r)*prior + r/Q), mean 1 under the prior (Zhang et al. 2016, eq. 4)."""
    weights = 1 / ((1 - rebalance) * prior + rebalance / len(prior))
    return weights / (prior * weights).sum()


class BinsLoss(nn.Module):
    """Cross-entropy of logits (N, Q, ceil(H/4), ceil(W/4)) with soft-encoded ab (N, 2, H, W).

    Each place counts by the rarity of its nearest bin (Zhang et al. 2016, eq. 2).
    """

    def __init__(self, bins: torch.Tensor, prior: torch.Tensor, rebalance: float):
        super().__init__()
        nearest, weights = soft_encode(all_stored_ab(), bins)
        self.register_buffer("nearest", nearest)
        self.register_buffer("weights", weights)
        self.register_buffer("rarity", rarity_weights(prior, rebalance))

    def forward(self, logits: torch.Tensor, ab: torch.Tensor) -> torch.Tensor:
        ab = F.avg_pool2d(ab, 4, ceil_mode=True, count_include_pad=False).round().long() + 128
        key = ab[:, 0] * 256 + ab[:, 1]
        nearest, soft = (table[key].permute(0, 3, 1, 2) for table in (self.nearest, self.weights))
        log_probability = torch.log_softmax(logits.float(), dim=1).gather(1, nearest)
        return (-(soft * log_probability).sum(dim=1) * self.rarity[nearest[:, 0]]).mean()


# --------------------------------------------------------------------------------- schedules

def learning_rate(step: int, total: int, peak: float, warm_up: int) -> float:
    """Linear warm-up to the peak, then half a cosine to zero after the last step."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(total - warm_up, 1)))


def ema_update(averaged: list, current: list, updates) -> None:
    """averaged += (1 - d)(current - averaged), d = min(EMA_DECAY, (1 + t)/(10 + t)) at update t."""
    t = int(updates)
    torch._foreach_lerp_(averaged, current, 1 - min(EMA_DECAY, (1 + t) / (10 + t)))


# ---------------------------------------------------------------------------------- the run

class Training:
    """A run in progress: networks, averages, optimizers, counters; learns, validates, saves."""

    def __init__(self, settings: dict, device: torch.device, amp: bool, manifests: dict,
                 resumed: dict | None = None):
        self.settings, self.device, self.amp, self.manifests = settings, device, amp, manifests
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        self.open_photographs()
        self.make_network(resumed)
        self.make_optimizers()
        self.step, self.history, self.best = 0, [], math.inf
        self.sums, self.skipped, self.bad_in_a_row = {}, 0, 0
        self.samples = len(self.train_data) // self.world * self.world  # equal shares for ranks
        self.steps_per_epoch = -(-self.samples // (settings["batch_size"] * self.world))
        self.total = self.steps_per_epoch * settings["epochs"]
        if resumed:
            self.restore(resumed["resume"])

    def open_photographs(self) -> None:
        """Datasets of train and val, and the names of the classes."""
        s, self.classes = self.settings, class_names(self.manifests["train"])
        if s["class_weight"] and not self.classes:
            raise ColorizeError(f"--class_weight: {s['data']}/train has no class folders; put each "
                                "scene's photographs in a folder of its own, or leave the flag out")
        number = {name: i for i, name in enumerate(self.classes)}

        def opened(splits, **options):
            labels = [number.get(label, -1) for split in splits
                      for *_, label in self.manifests[split]["photographs"]]
            arrays = [Path(s["data"], "processed", f"{split}.npy") for split in splits]
            return ColorizeData(arrays, labels, s["size"], limit=s["limit"], **options)
        self.train_data = opened(["train", "val"] if s["final"] else ["train"], train=True,
                                 crop=s["crop"], film=s["film"], seed=s["seed"])
        self.val_data = None if s["final"] else opened(["val"])
        if not s["final"] and not len(self.val_data):
            raise ColorizeError(f"no usable photograph to validate with in {s['data']}/val (or set "
                                "aside from train); add some, or train without: --final")

    def make_network(self, resumed: dict | None) -> None:
        """The network with its starting weights, and their average; settles what was left open."""
        s = self.settings
        # a checkpoint of ours brings its head and colours: regressions then fit the bins' mean
        before = resumed or starting_checkpoint(s["init"], s["encoder"])
        head = "bins" if s["loss"] == "bins" else before.get("model", {}).get("head", "ab")
        colors = before.get("colors", {"bins": color_bins(), "temperature": 1.0, "saturation": 1.0})
        for name in ("temperature", "saturation"):
            s[name] = colors[name] if s[name] is None else s[name]
        if resumed:
            prior, self.mean_ab = colors.get("prior"), resumed["mean_ab"]
        else:
            histogram, mean_ab = count_colors(self.train_data)
            prior = bins_prior(histogram, colors["bins"])
            self.mean_ab = torch.from_numpy(mean_ab).float()
        colors |= {"prior": prior, "temperature": s["temperature"], "saturation": s["saturation"]}
        torch.manual_seed(s["seed"])
        self.model = ColorNet(s["encoder"], s["decoder"], head, s["stages"],
                              len(self.classes) if s["class_weight"] else 0, colors)
        if resumed:
            self.start = resumed["training"]["start"]
            self.trained = set(resumed["training"]["trained"])
        else:
            self.start, self.trained = initialize(self.model, s["init"], before)
        if s["lr"] is None:  # gentle where all was trained before
            fresh = {name for name, _ in self.model.named_parameters()} - self.trained
            s["lr"] = 1e-3 if fresh else 2e-4
        if s["freeze_bn"] == "auto":
            known = any(name.startswith("encoder.") for name in self.trained)
            s["freeze_bn"] = "encoder" if known else "none"
        if s["freeze_encoder"]:
            self.model.encoder.requires_grad_(False)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.ema = AveragedModel(self.model, multi_avg_fn=ema_update)
        self.bins_loss, self.unit = None, 1.0  # the unit brings a loss back to ab units
        if s["loss"] == "bins":
            self.bins_loss = BinsLoss(colors["bins"], prior, s["rebalance"]).to(self.device)
        else:
            self.regression = "l1" if s["loss"] == "gan" else s["loss"]
            self.unit = REGRESSIONS[self.regression][1]

    def make_optimizers(self) -> None:
        """AdamW of the network and, for a gan, the discriminator with its own."""
        s = self.settings
        self.parallel = self.distribute(self.model)
        self.optimizer = torch.optim.AdamW(self.parameter_groups(), lr=s["lr"],
                                           weight_decay=s["weight_decay"])
        self.discriminator = None
        if s["loss"] == "gan":
            self.discriminator = Discriminator().to(self.device, memory_format=torch.channels_last)
            self.parallel_discriminator = self.distribute(self.discriminator)
            self.d_optimizer = torch.optim.AdamW(self.discriminator.parameters(),
                                                 lr=s["lr_discriminator"], betas=(0.5, 0.999))

    def parameter_groups(self) -> list[dict]:
        """Trainable weights: fresh ones at the full rate, those trained before at a share of it."""
        groups = {1.0: []}
        for name, parameter in self.model.named_parameters():
            share = self.settings["encoder_lr" if name.startswith("encoder.") else "decoder_lr"]
            if parameter.requires_grad:
                groups.setdefault(share if name in self.trained else 1.0, []).append(parameter)
        return [{"params": group, "scale": share} for share, group in groups.items() if group]

    def distribute(self, network: nn.Module) -> nn.Module:
        """The network, its gradients averaged over the ranks where there are several."""
        if self.world == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, devices)

    def train_mode(self) -> None:
        """Training mode, but for the batch norms that keep their statistics."""
        self.model.train()
        if self.settings["freeze_bn"] == "all":
            self.model.apply(lambda m: m.eval() if isinstance(m, nn.BatchNorm2d) else None)
        if self.settings["freeze_bn"] == "encoder" or self.settings["freeze_encoder"]:
            self.model.encoder.eval()

    def batches(self, dataset: ColorizeData, first: int, last: int, skip: int = 0):
        """Batches (lab, labels) of this rank's share of samples first..last, from batch skip on."""
        together = self.settings["batch_size"] * self.world
        shares = [list(range(start + self.rank, min(start + together, last), self.world))
                  for start in range(first, last, together)]
        return torch.utils.data.DataLoader(
            dataset, batch_sampler=[share for share in shares[skip:] if share], collate_fn=tuple,
            num_workers=self.settings["workers"], pin_memory=self.device.type == "cuda")

    def rate(self, step: int) -> float:
        """The learning rate of a step as a share of its peak."""
        return learning_rate(step, self.total, 1.0, min(500, max(self.total // 20, 1)))

    def objective(self, output: torch.Tensor, ab: torch.Tensor) -> torch.Tensor:
        """The loss of the network's output (logits for bins, else ab) against the true ab."""
        if self.bins_loss is not None:
            return self.bins_loss(output, ab)
        return regression_loss(self.regression, output, ab, self.settings["chroma_weight"])

    def train_step(self, lab: torch.Tensor, labels: torch.Tensor) -> None:
        """One step on one batch of stored Lab (N, 3, H, W) and class numbers (N,)."""
        s = self.settings
        lab = decode_lab(lab.to(self.device, non_blocking=True))
        lab = lab.contiguous(memory_format=torch.channels_last)
        L, ab = lab[:, :1], lab[:, 1:]
        rate = self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * s["lr"] * group["scale"]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            output, scenes = self.parallel(L, with_scenes=True)
        if s["loss"] != "bins":
            output = self.model.decode(output, ab.shape[-2:])
        loss = self.objective(output, ab)
        measured = {"loss": loss.detach() * self.unit}
        if self.discriminator is not None:
            measured |= self.discriminator_step(L, ab, output.detach(), rate)
            loss = s["l1_weight"] * loss + self.adversarial_loss(L, output)
        if scenes is not None:
            loss = loss + s["class_weight"] * scene_loss(scenes, labels.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trainable, MAX_NORM)
        self.step += 1
        if not torch.isfinite(norm + loss.detach()):
            self.skip_step()
            return
        self.bad_in_a_row = 0
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        for name, value in measured.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + float(value) * len(lab), count + len(lab)

    def skip_step(self) -> None:
        """A non-finite loss or gradient: leave the weights, undo what it did to batch norm."""
        self.skipped += 1
        self.bad_in_a_row += 1
        for buffer, good in zip(self.model.buffers(), self.ema.module.buffers()):
            buffer.copy_(good)
        say(f"step {self.step}: the loss is not finite; skipped ({self.skipped} so far)")
        if self.bad_in_a_row == BAD_STEPS:
            raise ColorizeError(f"the loss was not finite {BAD_STEPS} times in a row; go on from "
                                "the last good checkpoint with --init, a lower --lr or --amp off")

    def discriminator_step(self, L, ab, made, rate: float) -> dict:
        """The discriminator's step; its input noise fades out over the first half of the run.

        L (N, 1, H, W), the true ab and the made one (N, 2, H, W), CIE units.
        """
        seed = (self.settings["seed"] * 1_000_003 + self.step) * self.world + self.rank
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((2 * len(L), 3, *L.shape[-2:]), generator=generator).to(self.device)
        noise = noise * 0.2 * max(0.0, 1 - 2 * self.step / self.total)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.parallel_discriminator(torch.cat([L, L]), torch.cat([ab, made]), noise)
        real, fake = logits.float().chunk(2)
        loss = (F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
                + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))) / 2
        self.d_optimizer.param_groups[0]["lr"] = rate * self.settings["lr_discriminator"]
        self.d_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.discriminator.parameters(), MAX_NORM)
        if torch.isfinite(norm):
            self.d_optimizer.step()
        return {"d_loss": loss.detach(), "d_real": real.detach().sigmoid().mean(),
                "d_fake": fake.detach().sigmoid().mean()}

    def adversarial_loss(self, L, made) -> torch.Tensor:
        """The generator's adversarial loss; the discriminator's weights get no gradient."""
        self.discriminator.requires_grad_(False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.discriminator(L, made).float()
        self.discriminator.requires_grad_(True)
        return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))

    @torch.no_grad()
    def validate(self) -> dict:
        """Means over the validation photographs for the averaged weights, equal on every rank."""
        model = self.ema.module.eval()
        names = ["n", "loss", "mse", "distance", "psnr", "color", "true_color", "labelled", "right"]
        sums = torch.zeros(len(names), dtype=torch.float64)
        for lab, labels in self.batches(self.val_data, 0, len(self.val_data)):
            lab = decode_lab(lab.to(self.device))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                output, scenes = model(lab[:, :1], with_scenes=True)
            ab = model.decode(output, lab.shape[-2:])
            loss = self.objective(output if self.bins_loss else ab, lab[:, 1:]) * self.unit
            mse = F.mse_loss(ab, lab[:, 1:])
            labels = labels.to(self.device)
            right = 0 if scenes is None else ((scenes.argmax(1) == labels) & (labels >= 0)).sum()
            sums += torch.tensor([len(lab), loss * len(lab), mse * len(lab), 0, 0, 0, 0,
                                  (labels >= 0).sum(), right], dtype=torch.float64)
            sums[3:7] += torch.tensor(picture_scores(lab.cpu(), ab.cpu()), dtype=torch.float64)
        if self.world > 1:
            sums = sums.to(self.device)
            distributed.all_reduce(sums)
        n = dict(zip(names, sums.tolist()))
        scores = {name: n[name] / n["n"] for name in ("loss", "mse", "distance", "psnr")}
        scores = {"val_loss": scores.pop("loss")} | scores
        scores["colorfulness"] = n["color"] / max(n["true_color"], 1e-9)
        if self.model.scenes is not None:
            scores["accuracy"] = n["right"] / max(n["labelled"], 1)
        return scores

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """gray | prediction | truth for the same eight validation photographs every time."""
        numbers = np.linspace(0, len(self.val_data) - 1, min(8, len(self.val_data))).astype(int)
        lab = decode_lab(self.val_data.__getitems__(numbers.tolist())[0])
        draw_preview(path, lab, self.ema.module.eval().predict(lab[:, :1].to(self.device)))


    def save(self, name: str) -> None:
        """Write best_model.tar (the averaged weights) or last.tar (and all that resuming needs)."""
        if self.rank:
            return
        extra = {"mean_ab": self.mean_ab, "classes": self.classes if self.model.scenes else []}
        extra["training"] = {  # what a reader needs to make it again
            "settings": self.settings, "ranks": self.world, "start": self.start,
            "trained": sorted(self.trained), "epoch": self.step // self.steps_per_epoch,
            "step": self.step, "photographs": len(self.train_data),
            "amp": "bf16" if self.amp else "off",
            "fingerprint": self.manifests["train"]["fingerprint"],
            "scores": self.history[-1] if self.history else {},
            "torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
        if name == "last.tar":
            extra["resume"] = {
                "weights": self.model.state_dict(), "average": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(), "step": self.step,
                "history": self.history, "best": self.best, "sums": self.sums,
                "skipped": self.skipped}
            if self.discriminator is not None:
                extra["resume"] |= {"discriminator": self.discriminator.state_dict(),
                                    "d_optimizer": self.d_optimizer.state_dict()}
        path = Path(self.settings["out"], name)
        try:
            save_checkpoint(path, self.model, self.ema.module.state_dict(), **extra)
        except ColorizeError as error:
            say(f"not saved, the previous one stays: {error}")

    def restore(self, state: dict) -> None:
        """Take up a run where last.tar left it."""
        self.model.load_state_dict(state["weights"])
        self.ema.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.d_optimizer.load_state_dict(state["d_optimizer"])
        self.step, self.history, self.best = state["step"], state["history"], state["best"]
        self.sums, self.skipped = state["sums"], state["skipped"]

    def run(self) -> None:
        """Train to the last epoch; on SIGINT and SIGTERM render the step, save and leave."""
        stop = []
        handlers = {number: signal.signal(number, lambda number, _: stop.append(number))
                    for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for epoch in range(len(self.history), self.settings["epochs"]):
                self.run_epoch(epoch, stop)
        except torch.OutOfMemoryError:
            smaller = max(self.settings["batch_size"] // 2, 1)
            raise ColorizeError(f"the {self.device.type} ran out of memory; "
                                f"try --batch_size {smaller}") from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def run_epoch(self, epoch: int, stop: list) -> None:
        """One epoch, from wherever in it the step stands; then validation, log, pictures, saves."""
        self.train_mode()
        done, first = self.step - epoch * self.steps_per_epoch, epoch * len(self.train_data)
        batches = self.batches(self.train_data, first, first + self.samples, done)
        start = saved = time.monotonic()
        seen, waiting, asked = 0, 0.0, time.monotonic()
        label = f"epoch {epoch + 1}"
        for lab, labels in batches if self.rank else progress(batches, len(batches), label):
            waiting += time.monotonic() - asked
            self.train_step(lab, labels)
            seen += len(lab) * self.world
            stopped = self.max_over_ranks(stop[0] if stop else 0)
            if stopped:
                self.save("last.tar")
                say(f"stopped at step {self.step}; go on with --resume auto")
                raise SystemExit(128 + stopped)
            due = time.monotonic() - saved >= self.settings["save_minutes"] * 60
            if due and self.step % self.steps_per_epoch:
                self.save("last.tar")
                saved = time.monotonic()
            asked = time.monotonic()
        elapsed = time.monotonic() - start
        rate = self.settings["lr"] * self.rate(self.step - 1)
        row = {"epoch": epoch + 1, "step": self.step, "lr": rate}
        row |= self.means() | ({} if self.settings["final"] else self.validate())
        row |= {"images_per_second": seen / elapsed, "waiting": waiting / elapsed}
        self.sums = {}
        self.finish_epoch(row)

    def max_over_ranks(self, number: int) -> int:
        """The max_over_ranks of the ranks' numbers: all stop, or fail, at the same step."""
        if self.world == 1:
            return number
        shared = torch.tensor(number, device=self.device)
        distributed.all_reduce(shared, distributed.ReduceOp.MAX)
        return int(shared)

    def means(self) -> dict:
        """The epoch's mean of each measured value so far, over all ranks."""
        sums = torch.tensor(list(self.sums.values()), dtype=torch.float64).reshape(-1, 2)
        if self.world > 1:
            sums = sums.to(self.device)
            distributed.all_reduce(sums)
        return {name: total / max(n, 1) for name, (total, n) in zip(self.sums, sums.tolist())}

    def finish_epoch(self, row: dict) -> None:
        """Best or not; log, checkpoints, history and pictures."""
        self.history.append(row)
        # a validation loss would bring a gan back to its start; --final has none: the last is best
        last_is_best = self.settings["final"] or self.settings["loss"] == "gan"
        is_best = last_is_best or row["val_loss"] < self.best
        self.best = row.get("val_loss", self.best) if is_best else self.best
        if self.rank:
            return
        if row.get("d_loss", 1) < COLLAPSE:
            say(f"the discriminator wins (loss {row['d_loss']:.3f}): it no longer teaches; "
                "lower --lr_discriminator or raise --l1_weight")
        out = Path(self.settings["out"])
        log = {name: value for name, value in row.items() if name != "waiting"}
        say("  ".join(f"{name} {value:.4g}" for name, value in log.items()) + "  best" * is_best)
        if is_best:
            self.save("best_model.tar")
        self.save("last.tar")
        write_csv(out / "history.csv", self.history)
        draw_curves(out / "curves.png", self.history)
        if not self.settings["final"]:
            self.preview(out / "preview.png")


# ------------------------------------------------------------------------------- the command

def read_resumable(path: Path, settings: dict, fingerprint: str) -> dict:
    """last.tar's contents; ColorizeError if its settings or photographs are others than these."""
    contents = read_tensors(path)
    training = contents.get("training")
    if not isinstance(contents.get("resume"), dict) or not isinstance(training, dict):
        raise ColorizeError(f"--resume {path}: it holds no training to go on with; "
                            "name a last.tar, or start from its weights with --init")
    old = training["settings"]
    for name, value in list(settings.items()):
        if value is None or value == "auto" and name == "freeze_bn":  # left open
            settings[name] = old.get(name)
        elif name not in FREE_ON_RESUME and name in old and old[name] != value:
            raise ColorizeError(f"--resume {path}: it was trained with --{name} {old[name]}, "
                                f"not {value}; give the same, or start anew with --init {path}")
    if training["fingerprint"] != fingerprint:
        raise ColorizeError(f"--resume {path}: the photographs have changed since; "
                            f"start anew with --init {path}")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if training.get("ranks", ranks) != ranks:
        raise ColorizeError(f"--resume {path}: it was trained on {training['ranks']} ranks, not "
                            f"{ranks}; use as many, or start anew with --init {path}")
    if settings["epochs"] < old["epochs"]:
        raise ColorizeError(f"--resume {path}: it was trained for --epochs {old['epochs']}, not "
                            f"{settings['epochs']}; fewer would change its past")
    if settings["epochs"] > old["epochs"]:
        say(f"--epochs {settings['epochs']} instead of {old['epochs']}: the learning rate follows "
            "the longer schedule from here on")
    return contents


RANGES = {"epochs": (1, 1e6), "batch_size": (1, 1e6), "lr": (1e-9, 10), "size": (64, 256),
          "limit": (1, 1e9), "encoder_lr": (0, 10), "decoder_lr": (0, 10), "weight_decay": (0, 10),
          "rebalance": (0, 1), "temperature": (0.01, 10), "saturation": (0, 4),
          "chroma_weight": (0, 1e3), "class_weight": (0, 1e3), "l1_weight": (0, 1e6),
          "lr_discriminator": (1e-9, 10), "seed": (0, 2**31), "workers": (0, 999),
          "save_minutes": (0, 1e6)}


def check_settings(s: dict) -> None:
    """FlagError for values and combinations that make no sense."""
    for name, (low, high) in RANGES.items():
        if s[name] is not None and not low <= s[name] <= high:
            raise FlagError(f"--{name} {s[name]}: must be {low:g}..{high:g}")
    of_bins = s["rebalance"], s["temperature"], s["saturation"]
    if s["loss"] != "bins" and of_bins != (1, None, None):
        raise FlagError("--rebalance, --temperature and --saturation go with --loss bins, "
                        f"not {s['loss']}")
    if s["loss"] == "bins" and s["chroma_weight"]:
        raise FlagError("--chroma_weight goes with the regressions; with bins use --rebalance")
    if s["loss"] == "gan" and s["init"] in ("none", "imagenet"):
        raise FlagError("--loss gan starts from a trained generator: name one with --init PATH")


def train(*, data: Path = Path("data/input"), out: Path = Path("checkpoints"), epochs: int = 20,
          batch_size: int = 16, lr: float | None = None, size: int = 256,
          loss: Literal["mse", "l1", "huber", "bins", "gan"] = "mse", encoder: str = "resnet18",
          decoder: Literal["unet", "plain", "dense"] = "unet", stages: Literal[2, 3, 4] = 4,
          init: str = "auto", resume: str | None = None, limit: int | None = None,
          final: bool = False, freeze_encoder: bool = False,
          freeze_bn: Literal["auto", "none", "encoder", "all"] = "auto",
          encoder_lr: float = 0.1, decoder_lr: float = 0.2, weight_decay: float = 0.01,
          crop: bool = True, film: bool = False, rebalance: float = 1.0,
          temperature: float | None = None, saturation: float | None = None,
          chroma_weight: float = 0.0, class_weight: float = 0.0, l1_weight: float = 100.0,
          lr_discriminator: float = 1e-4, seed: int = 0,
          device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
          amp: Literal["auto", "bf16", "off"] = "auto", workers: int | None = None,
          save_minutes: float = 5.0) -> None:
    """Train a colorizer on a folder of photographs and save OUT/best_model.tar.

    data: holds train/ and val/ (or a tenth of train is set aside)
    out: gets best_model.tar, last.tar, history.csv and pictures
    epochs: times that each photograph is seen
    batch_size: photographs a step, on each device
    lr: peak learning rate of fresh weights; 1e-3, or 2e-4 where there are none
    size: side in pixels of the square crops that the network sees, 64..256
    loss: objective; bins: classes of colour, gan: adversarial with l1
    encoder: torchvision's: resnet18..152, vgg11..19(_bn), mobilenet_v2
    decoder: unet: encoder's features joined, plain: none, dense: all stages
    stages: the encoder ends at stride 8, 16 or 32
    init: auto (shipped checkpoint, else imagenet), imagenet, none, file
    resume: auto or a last.tar: go on exactly where it stopped
    limit: use this many photographs
    final: train on train and val together, keep the last epoch
    freeze_encoder: train the decoder alone
    freeze_bn: whose batch norm keeps its statistics; auto: a trained encoder's
    encoder_lr: rate of an encoder that was trained before, as a share of lr
    decoder_lr: the same for the rest of the network
    weight_decay: AdamW's
    crop: train on random resized crops rather than whole squares
    film: make the input as films of other colour sensitivity saw it, with grain
    rebalance: bins: 1 none, towards 0 rare colours count more
    temperature: bins: of the mean that makes the colour; else init's, or 1
    saturation: bins: factor on that mean, likewise
    chroma_weight: k: a pixel counts 1 + k chroma/110 times (mse, l1, huber, gan)
    class_weight: of telling the class (by folder) as well; 0.0033 is usual
    l1_weight: gan: weight of l1 beside the adversarial loss
    lr_discriminator: gan: its peak learning rate
    seed: of order, augmentation, initialization and noise
    device: where to compute
    amp: bf16 arithmetic; auto: where the hardware has it
    workers: processes that make batches; 0 on a CPU, up to 8 beside a GPU
    save_minutes: write last.tar this often within an epoch; 0: after each step
    """
    settings = {name: str(value) if isinstance(value, Path) else value  # plain, for checkpoints
                for name, value in locals().items()}
    check_settings(settings)
    device = choose_device(device)
    out = Path(out)
    last = out / "last.tar" if resume == "auto" else resume and Path(resume)
    if resume == "auto" and not last.exists():
        say(f"nothing to resume in {out}: starting anew")
        last = None
    if workers is None:
        settings["workers"] = min(8, (os.cpu_count() or 2) - 1) if device.type == "cuda" else 0
    if "RANK" in os.environ:  # under torchrun
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                       timeout=timedelta(hours=6))
    rank = int(os.environ.get("RANK", 0))
    try:
        if rank == 0:
            prepare(data)
        if "RANK" in os.environ:
            distributed.barrier()
        manifests = prepare(data)
        resumed = None
        if last:
            resumed = read_resumable(last, settings, manifests["train"]["fingerprint"])
        training = Training(settings, device, use_bf16(amp, device), manifests, resumed)
        if rank == 0:
            say("settings: " + " ".join(f"--{name} {value}" for name, value in settings.items()))
            say(f"{len(training.train_data)} photographs, {training.world} x {device}, "
                f"{'bf16' if training.amp else 'float32'}, starting from {training.start}"
                + f"; resumed {last} at step {training.step} of {training.total}" * bool(last))
        training.run()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    if rank == 0:
        last_is_best = final or loss == "gan"
        what = "the last epoch" if last_is_best else f"best validation loss {training.best:.4g}"
        print(f"{out / 'best_model.tar'}: {what}")
