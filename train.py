"""Training: objectives, the loop, resuming, history and curves.

    python main.py train                       # data/input -> checkpoints/best_model.tar
    python main.py train --init imagenet       # the plain network: an ab head, by MSE
    python main.py train --data mine --out mine/model --loss bins --epochs 50
    python main.py train --resume auto         # go on where it was cut
    torchrun --nproc_per_node=4 main.py train  # several devices
"""

import math
import os
import shlex
import signal
import sys
import time
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torchvision
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from basic_model import (AB_SCALE, ColorNet, Discriminator, all_stored_ab, bins_prior,
                         choose_device, color_bins, initialize, read_checkpoint,
                         save_checkpoint, soft_encode, starting_checkpoint, use_bf16)
from colorize_data import ColorizeData, class_names, count_colors, decode_lab, prepare
from evaluate import draw_curves, draw_preview, picture_scores, write_csv
from photo import ColorizeError, FlagError, progress, say

try:
    import fcntl
except ImportError:  # Windows: two trainings into one folder are not noticed there
    fcntl = None

FRESH_LR, TRAINED_LR = 1e-3, 4e-5  # AdamW's own; where all was trained: larger, it forgets
EMA_DECAY = 0.999   # of the averaged weights, which are the ones validated and shipped
MAX_NORM = 1.0      # longer gradients are clipped, so that one odd batch does no harm
HUBER_DELTA = 11.0  # ab units, a tenth of the scale: quadratic below, linear above
# of the mean that makes the colour of bins; measured against T 1 and 0.25 (README)
TEMPERATURE, SATURATION = 0.6, 1.45
L1_WEIGHT = 100.0   # beside the adversarial loss (Isola et al. 2017, section 3.3)
D_LR, D_BETAS = 1e-4, (0.5, 0.999)  # half their rate, as the generator comes trained
BAD_STEPS = 10      # non-finite losses in a row that end a run
SAVE_SECONDS = 300  # between two writes of last.tar, of hundreds of megabytes
# clusters announce the end by TERM, HUP or USR1; Windows has not all of them
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
           if hasattr(signal, name)]
# may differ between a run and its resumption; every other setting, and the ranks, may not
FREE_ON_RESUME = {"data", "out", "device"}


# ------------------------------------------------------------------------------- objectives

class Regression(nn.Module):
    """Mean error of ab, of an ab head or of the mean colour of a bins head; on ab/110."""

    def __init__(self, error, unit: float):
        super().__init__()
        self.error, self.unit = error, unit  # from the loss back to ab units

    def forward(self, model, output: torch.Tensor, ab: torch.Tensor) -> torch.Tensor:
        made = model.decode(output, ab.shape[-2:])  # (N, 2, H, W), CIE units, float32
        return self.error(made / AB_SCALE, ab / AB_SCALE)


class BinsLoss(nn.Module):
    """Cross-entropy of logits (N, Q, H/4, W/4) with the soft encoding of ab (N, 2, H, W).

    Each place counts by the rarity of its nearest bin (Zhang et al. 2016, eq. 2).
    """

    unit = 1.0  # nats stay nats

    def __init__(self, bins: torch.Tensor, prior: torch.Tensor, rebalance: float):
        super().__init__()
        # a table over all 65,536 stored ab: to search the nearest bins in each step is slow
        nearest, weights = soft_encode(all_stored_ab(), bins)
        self.register_buffer("nearest", nearest)
        self.register_buffer("weights", weights)
        self.register_buffer("rarity", rarity_weights(prior, rebalance))

    def forward(self, model, logits: torch.Tensor, ab: torch.Tensor) -> torch.Tensor:
        ab = F.avg_pool2d(ab, 4, ceil_mode=True, count_include_pad=False)
        a, b = (ab.round().long() + 128).unbind(dim=1)
        key = a * 256 + b
        # rows of the table, (N, h, w, 5), to the logits' layout, (N, 5, h, w)
        nearest, soft = (t[key].permute(0, 3, 1, 2) for t in (self.nearest, self.weights))
        log_probability = torch.log_softmax(logits.float(), dim=1).gather(1, nearest)
        return (-(soft * log_probability).sum(dim=1) * self.rarity[nearest[:, 0]]).mean()


def rarity_weights(prior: torch.Tensor, rebalance: float) -> torch.Tensor:
    """Weights 1/((1-r)*prior + r/Q), mean 1 under the prior (Zhang et al. 2016, eq. 4)."""
    weights = 1 / ((1 - rebalance) * prior + rebalance / len(prior))
    return weights / (prior * weights).sum()


OBJECTIVES = {  # --loss: what makes objective(model, output, true ab); a new one goes here
    "mse": lambda model, rebalance: Regression(F.mse_loss, AB_SCALE ** 2),
    "l1": lambda model, rebalance: Regression(F.l1_loss, AB_SCALE),
    "huber": lambda model, rebalance: Regression(
        partial(F.huber_loss, delta=HUBER_DELTA / AB_SCALE), AB_SCALE ** 2),
    "bins": lambda model, rebalance: BinsLoss(model.bins, model.prior, rebalance),
    # the discriminator's part is added in train_step
    "gan": lambda model, rebalance: Regression(F.l1_loss, AB_SCALE),
}


def scene_loss(scenes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the classes, where there is one, not -1 (Iizuka et al. 2016)."""
    total = F.cross_entropy(scenes.float(), labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


# ---------------------------------------------------------------------- schedules and ranks

def learning_rate(step: int, total: int) -> float:
    """As a share of its peak: linear warm-up, then half a cosine to zero."""
    warm_up = min(500, max(total // 20, 1))  # while the averages in Adam fill
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(total - warm_up, 1)))


def ema_update(averaged: list, current: list, updates) -> None:
    """averaged += (1 - d)(current - averaged), d = min(EMA_DECAY, (1 + t)/(10 + t))."""
    t = int(updates)  # a fixed decay would ship the random start of a short training
    torch._foreach_lerp_(averaged, current, 1 - min(EMA_DECAY, (1 + t) / (10 + t)))


def rank_and_world() -> tuple[int, int]:
    """This process's number among those that train together, and how many they are."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def distribute(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, its gradients averaged over the ranks where there are several."""
    if not distributed.is_initialized():
        return network
    return DistributedDataParallel(network, [device] if device.type == "cuda" else None)


def means_over_ranks(sums: Counter) -> dict[str, float]:
    """Each rank's sums over its `photographs` to the means over those of all ranks."""
    every = [sums]
    if distributed.is_initialized():
        every *= distributed.get_world_size()
        distributed.all_gather_object(every, sums)
    total = Counter()
    for sums in every:
        total.update(sums)  # adds
    count = total.pop("photographs", 0)
    return {name: value / count for name, value in total.items()}


def max_over_ranks(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers: all stop at the same step, or none."""
    if not distributed.is_initialized():
        return number
    shared = torch.tensor(number, device=device)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return int(shared)


# ---------------------------------------------------------------------------------- the run

class Training:
    """A run in progress: networks, averages, optimizers, counters; it learns and saves.

    settings: nothing left open. start: contents of the checkpoint to start from, or {};
    with a key `resume`, those of a last.tar, it goes on.
    """

    def __init__(self, settings: dict, start: dict, manifests: dict, device: torch.device):
        self.settings, self.device = settings, device
        self.amp = use_bf16(settings["amp"], device)
        self.fingerprint = manifests["train"]["fingerprint"]
        self.rank, self.world = rank_and_world()
        self.open_photographs(manifests)
        self.make_network(start)
        self.make_optimizers()
        self.step, self.history, self.best = 0, [], math.inf  # the lowest val_loss
        self.sums = Counter()  # of this epoch's steps, over the photographs seen
        self.bad, self.saved = 0, time.monotonic()  # steps in a row; when last.tar was
        self.samples = len(self.train_data) // self.world * self.world  # equal shares
        self.steps_per_epoch = -(-self.samples // (settings["batch_size"] * self.world))
        self.total = self.steps_per_epoch * settings["epochs"]  # what the schedules span
        # a validation loss would bring a gan back to its start, and --final has none
        self.last_is_best = settings["final"] or settings["loss"] == "gan"

    def open_photographs(self, manifests: dict) -> None:
        """Datasets of train and val, and the names of the classes."""
        s, self.classes = self.settings, class_names(manifests["train"])
        if s["class_weight"] and not self.classes:
            raise ColorizeError(f"--class_weight: {s['data']}/train has no class folders; "
                                "make some, or leave the flag out")
        number = {name: i for i, name in enumerate(self.classes)}
        rows = {split: [number.get(label, -1)  # -1: of none
                        for *_, label in manifest["photographs"]]
                for split, manifest in manifests.items()}
        arrays = {split: Path(s["data"], "processed", f"{split}.npy") for split in rows}
        names = ["train", "val"] if s["final"] else ["train"]
        self.train_data = ColorizeData(
            [arrays[name] for name in names], sum((rows[name] for name in names), []),
            s["size"], train=True, film=s["film"], seed=s["seed"], limit=s["limit"])
        self.val_data = None
        if not s["final"]:
            if not rows["val"]:
                raise ColorizeError(f"{s['data']}/val: no usable photograph to validate "
                                    "with; add some, or train without: --final")
            self.val_data = ColorizeData([arrays["val"]], size=s["size"], limit=s["limit"])

    def make_network(self, start: dict) -> None:
        """The network with its starting weights, their average, and the objective."""
        s, resumed = self.settings, "resume" in start
        # bins are part of what a checkpoint learnt: they stay as they are
        colors = start.get("colors") or {"bins": color_bins(), "temperature": TEMPERATURE,
                                         "saturation": SATURATION}
        if resumed:
            self.mean_ab = start["mean_ab"]
        else:  # prior and mean are of these photographs, whatever the start was trained on
            histogram, mean_ab = count_colors(self.train_data)
            colors = colors | {"prior": bins_prior(histogram, colors["bins"])}
            self.mean_ab = torch.from_numpy(mean_ab).float()
        torch.manual_seed(s["seed"])  # of the weights that start random
        self.model = ColorNet(s["encoder"], s["decoder"], head_of(s, start), s["stages"],
                              len(self.classes) if s["class_weight"] else 0, colors)
        if resumed:
            self.start, trained = (start["training"][name] for name in ("start", "trained"))
        else:
            self.start, trained = initialize(self.model, s["init"], start)
        self.trained = set(trained)  # names of the weights that did not start random
        if s["encoder_share"] == 0:  # no gradients for it either: a step is a fifth faster
            self.model.encoder.requires_grad_(False)
        # with bf16, 2.3 times as fast as float32 and channels first (README)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.ema = AveragedModel(self.model, multi_avg_fn=ema_update)  # copies the buffers
        self.objective = OBJECTIVES[s["loss"]](self.model, s["rebalance"]).to(self.device)

    def make_optimizers(self) -> None:
        """AdamW of the network and, for a gan, the discriminator with its own."""
        s, groups = self.settings, {}
        for name, parameter in self.model.named_parameters():
            # features from a million photographs should change little for a few more
            slow = name.startswith("encoder.") and name in self.trained
            if parameter.requires_grad:
                groups.setdefault(s["encoder_share"] if slow else 1.0, []).append(parameter)
        self.parallel = distribute(self.model, self.device)
        self.optimizer = torch.optim.AdamW(
            # "scale" is ours: train_step makes the group's rate of it
            [{"params": group, "scale": share} for share, group in groups.items()],
            lr=s["lr"])
        # by its key in last.tar, what has a state that is resumed
        self.parts = {"weights": self.model, "average": self.ema,
                      "optimizer": self.optimizer}
        self.discriminator = None
        if s["loss"] == "gan":
            self.discriminator = Discriminator().to(self.device)
            self.parallel_discriminator = distribute(self.discriminator, self.device)
            self.d_optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=D_LR,
                                                 betas=D_BETAS)
            self.parts |= {"discriminator": self.discriminator,
                           "d_optimizer": self.d_optimizer}

    def batches(self, dataset: ColorizeData, first: int, last: int, skip: int = 0):
        """Batches (lab, labels), this rank's share of samples first..last after `skip`."""
        together = self.settings["batch_size"] * self.world
        cuda = self.device.type == "cuda"
        # ranks take turns: together they see the batches that one alone would
        shares = [list(range(start + self.rank, min(start + together, last), self.world))
                  for start in range(first, last, together)]
        # on a CPU, workers would take its cores from the network
        workers = min(8, (os.cpu_count() or 2) - 1) if cuda else 0
        return torch.utils.data.DataLoader(
            dataset, batch_sampler=[share for share in shares[skip:] if share],
            collate_fn=tuple, num_workers=workers, pin_memory=cuda)

    def train_mode(self) -> None:
        """Training mode, but for the batch norms of an encoder that was trained before."""
        self.model.train()
        # on more photographs than these: its statistics are the better ones
        if any(name.startswith("encoder.") for name in self.trained):
            self.model.encoder.eval()

    def train_step(self, lab: torch.Tensor, labels: torch.Tensor) -> None:
        """One step on a batch of stored Lab (N, 3, H, W), uint8, and class numbers (N,)."""
        # bytes travel to the device, a quarter of the traffic; there they become CIE units
        lab = decode_lab(lab.to(self.device, non_blocking=True))
        lab = lab.contiguous(memory_format=torch.channels_last)
        L, ab = lab[:, :1], lab[:, 1:]  # (N, 1, H, W) and (N, 2, H, W)
        # the rate is a function of the step, set by hand: a scheduler's state would be one
        # more thing to save, and to get wrong when a run goes on for more epochs
        rate = learning_rate(self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.settings["lr"] * group["scale"]
        # bf16 in the network alone; losses are float32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            output, scenes = self.parallel(L, with_scenes=True)  # ab, or logits of bins
        loss = self.objective(self.model, output, ab)
        measured = {"loss": loss.detach() * self.objective.unit}
        if self.discriminator is not None:
            made = self.model.decode(output, ab.shape[-2:])
            # the discriminator moves first, by what the network made before this step
            measured |= self.discriminator_step(L, ab, made.detach(), rate)
            loss = L1_WEIGHT * loss + self.adversarial_loss(L, made)
        if scenes is not None:
            scene = scene_loss(scenes, labels.to(self.device))
            loss = loss + self.settings["class_weight"] * scene
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # and, on several ranks, the mean of all gradients
        trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trainable, MAX_NORM)
        self.step += 1
        # the norm is of gradients averaged over the ranks: they skip a step together
        if not torch.isfinite(norm + loss.detach()):
            return self.skip_step()
        self.bad = 0
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        # times the batch: the last one of an epoch is smaller
        self.sums.update({name: float(x) * len(lab) for name, x in measured.items()})
        self.sums["photographs"] += len(lab)

    def skip_step(self) -> None:
        """A loss or gradient is not finite: undo what the step did to batch norm."""
        self.bad += 1
        for buffer, good in zip(self.model.buffers(), self.ema.module.buffers()):
            buffer.copy_(good)  # the average's are those of the last good step
        say(f"step {self.step}: the loss is not finite; skipped")
        if self.bad == BAD_STEPS:
            raise ColorizeError(f"the loss was not finite {BAD_STEPS} times in a row; "
                                "start from the best one, --init, with a lower --lr")

    def discriminator_step(self, L, ab, made, rate: float) -> dict:
        """The discriminator's step: L (N, 1, H, W), the true and the made ab, CIE units."""
        # real and made in one batch, or its batch norm would tell them apart
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.parallel_discriminator(torch.cat([L, L]), torch.cat([ab, made]))
        real, fake = logits.float().chunk(2)
        # softplus: the cross-entropy with real (of -logits) and with made
        loss = (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
        self.d_optimizer.param_groups[0]["lr"] = rate * D_LR
        self.d_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.discriminator.parameters(), MAX_NORM)
        if torch.isfinite(norm):
            self.d_optimizer.step()
        # d_real and d_fake near 1 and 0: it wins, and no longer teaches
        return {"d_loss": loss.detach(), "d_real": real.detach().sigmoid().mean(),
                "d_fake": fake.detach().sigmoid().mean()}

    def adversarial_loss(self, L, made) -> torch.Tensor:
        """How far the made ab (N, 2, H, W) is from being taken for real."""
        # gradients pass through the discriminator to the network but leave nothing in it
        self.discriminator.requires_grad_(False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.discriminator(L, made).float()
        self.discriminator.requires_grad_(True)
        return F.softplus(-logits).mean()

    @torch.no_grad()
    def validate(self) -> dict:
        """Means over the validation photographs, for the averaged weights."""
        if self.val_data is None:
            return {}
        model, sums = self.ema.module.eval(), Counter()
        for lab, _ in self.batches(self.val_data, 0, len(self.val_data)):
            lab, n = decode_lab(lab.to(self.device)), len(lab)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                output = model(lab[:, :1])
            ab = model.decode(output, lab.shape[-2:])  # what inference would show
            loss = self.objective(model, output, lab[:, 1:]) * self.objective.unit
            sums.update({"photographs": n, "val_loss": float(loss) * n,
                         "mse": float(F.mse_loss(ab, lab[:, 1:])) * n})
            sums.update(dict(zip(("distance", "psnr", "colorfulness", "true"),
                                 picture_scores(lab.cpu(), ab.cpu()))))
        scores = means_over_ranks(sums)
        # the means' ratio, as in evaluate's table
        scores["color_ratio"] = scores.pop("colorfulness") / max(scores.pop("true"), 1e-9)
        return scores

    def save(self, name: str) -> None:
        """Write best_model.tar, of averaged weights, or last.tar, to go on from."""
        if self.rank:
            return
        classes = self.classes if self.model.scenes else []
        extra = {"mean_ab": self.mean_ab, "classes": classes, "training": {
            # what a reader needs to make it again
            "settings": self.settings, "ranks": self.world, "start": self.start,
            "trained": sorted(self.trained), "epoch": self.step // self.steps_per_epoch,
            "step": self.step, "photographs": len(self.train_data),
            "amp": "bf16" if self.amp else "off", "fingerprint": self.fingerprint,
            "scores": self.history[-1] if self.history else {},  # of the epoch just ended
            "torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}}
        if name == "last.tar":
            extra["resume"] = {
                "step": self.step, "history": self.history, "best": self.best,
                "sums": dict(self.sums),
                **{key: part.state_dict() for key, part in self.parts.items()}}
            self.saved = time.monotonic()
        save_checkpoint(Path(self.settings["out"], name), self.model,
                        self.ema.module.state_dict(), **extra)

    def restore(self, state: dict) -> None:
        """Take up a run where last.tar left it; a malformed one raises many kinds."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.history, self.best = (state[k] for k in ("step", "history", "best"))
        self.sums = Counter(state["sums"])
        epochs = [row["epoch"] for row in self.history]
        # the step lies in or at the end of the epoch after the last one of the history
        if epochs != list(range(epochs[0], epochs[0] + len(epochs))) \
                or not epochs[-1] * self.steps_per_epoch <= self.step <= self.total:
            raise ValueError

    def run(self) -> None:
        """Train to the last epoch; when asked to stop, finish the step, save and leave."""
        self.stop = []  # numbers of the signals that came; ignored ones (nohup) stay so
        handlers = {number: signal.signal(number, lambda n, _: self.stop.append(n))
                    for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
        try:
            if not self.history:  # the start competes: training may not help
                self.finish_epoch({"epoch": 0, "step": 0} | self.validate())
                self.save("last.tar")  # a full disk is better found now than after hours
            for epoch in range(self.history[-1]["epoch"], self.settings["epochs"]):
                self.run_epoch(epoch)
            self.save("last.tar")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def run_epoch(self, epoch: int) -> None:
        """One epoch, from wherever in it the step stands, and what follows it."""
        self.train_mode()
        # samples are numbered through all epochs; done are batches of this one
        done, first = self.step - epoch * self.steps_per_epoch, epoch * len(self.train_data)
        batches = self.batches(self.train_data, first, first + self.samples, done)
        seen, waiting, start = 0, 0.0, time.monotonic()
        label, asked = f"epoch {epoch + 1}/{self.settings['epochs']}", start
        for lab, labels in batches if self.rank else progress(batches, len(batches), label):
            waiting += time.monotonic() - asked  # for the photographs
            self.train_step(lab, labels)
            seen += len(lab) * self.world
            # the signal may have reached one rank only
            stopped = max_over_ranks(self.stop[0] if self.stop else 0, self.device)
            if stopped or time.monotonic() - self.saved >= SAVE_SECONDS:
                self.save("last.tar")
            if stopped:
                say(f"stopped at step {self.step}; go on with --resume auto")
                raise SystemExit(128 + stopped)  # as a shell counts signals
            asked = time.monotonic()
        elapsed = max(time.monotonic() - start, 1e-9)
        rate = self.settings["lr"] * learning_rate(self.step - 1, self.total)
        row = {"epoch": epoch + 1, "step": self.step, "lr": rate}
        row |= means_over_ranks(self.sums) | self.validate()
        row |= {"images_per_second": seen / elapsed, "waiting": waiting / elapsed}
        self.sums = Counter()
        self.finish_epoch(row)

    def finish_epoch(self, row: dict) -> None:
        """Best or not; log, best_model.tar, history and pictures."""
        self.history.append(row)
        loss = row.get("val_loss", math.nan)  # NaN is under nothing, so never the best
        is_best = row["epoch"] > 0 if self.last_is_best else loss < self.best
        self.best = loss if is_best else self.best
        if self.rank:
            return
        log = "  ".join(f"{name} {x:.4g}" for name, x in row.items() if name != "waiting")
        say(log + "  best" * is_best)
        if is_best:
            self.save("best_model.tar")
        out = Path(self.settings["out"])
        try:
            write_csv(out / "history.csv", self.history)
            if row["epoch"] > 0:  # one point is no curve
                draw_curves(out / "curves.png", self.history)
            if self.val_data:  # the same eight photographs every time, from all of them
                numbers = sorted({i * len(self.val_data) // 8 for i in range(8)})
                lab = decode_lab(self.val_data.__getitems__(numbers)[0])
                with torch.no_grad():
                    ab = self.ema.module.eval().predict(lab[:, :1].to(self.device))
                draw_preview(out / "preview.png", lab, ab)
        except ColorizeError as error:  # pictures are not worth a training
            say(str(error))

    def verdict(self) -> str:
        """What best_model.tar holds, and whether training helped; or ColorizeError."""
        path, best = Path(self.settings["out"], "best_model.tar"), self.history[-1]
        if not (self.last_is_best or math.isfinite(self.best)):
            raise ColorizeError(f"{path}: not written: no epoch had a finite validation "
                                "loss; try a lower --lr")
        if not self.last_is_best:
            best = next(row for row in self.history if row["val_loss"] == self.best)
        scores = [f"{name} {best[name]:.4g} ({self.history[0][name]:.4g} at the start)"
                  for name in ("val_loss", "color_ratio") if name in best]
        hint = "" if best["epoch"] else (": training did not help; try a lower --lr, "
                                         "--encoder_share 0 or more photographs")
        return ", ".join([f"{path}: epoch {best['epoch']}", *scores]) + hint


# ------------------------------------------------------------------------------ the command

def head_of(settings: dict, start: dict) -> str:
    """Bins for their own loss; else the start's, so that regressions fit its bins' mean."""
    model = {"head": "bins"} if settings["loss"] == "bins" else start.get("model", {})
    return model.get("head", "ab")


def settle(settings: dict) -> tuple[dict, dict]:
    """Nothing left open: the settings, and the contents of the checkpoint to start from.

    FlagError where flags contradict each other.
    """
    s, start = dict(settings), starting_checkpoint(settings["init"], settings["encoder"])
    start.pop("resume", None)  # of a last.tar, only the weights are wanted
    model = {"head": head_of(s, start)} | {
        name: s[name] for name in ("encoder", "decoder", "stages")}
    # each weight of the colours has a trained one to start from (classes may be new)
    trained = model.items() <= start.get("model", {}).items()
    if s["lr"] is None:
        s["lr"] = TRAINED_LR if trained else FRESH_LR
    if s["loss"] != "bins" and s["rebalance"] != 1:
        raise FlagError(f"--rebalance goes with --loss bins, not {s['loss']}")
    if s["loss"] == "gan" and not trained:
        raise FlagError("--loss gan needs a trained generator: name one with --init PATH, "
                        "and the --encoder, --decoder and --stages that it has")
    return s, start


def settle_resumed(path: Path, flags: dict, training: dict) -> dict:
    """The settings in last.tar, which go on; a flag that was given must agree with them."""
    # the ranks are no flag, but another number of them makes other batches
    old = training["settings"] | {"ranks": training["ranks"]}
    for name, value in (flags | {"ranks": rank_and_world()[1]}).items():
        longer = name == "epochs" and value > old[name]
        # a flag that is at its default was not given, as far as one can tell
        if value in (old[name], plain(train.__kwdefaults__).get(name, old)):
            continue
        if not longer and name not in FREE_ON_RESUME:
            raise ColorizeError(f"--resume {path}: it was trained with {name} {old[name]}, "
                                f"not {value}; or start with --init {path}")
        old[name] = value
    del old["ranks"]
    return old | {"out": str(path.parent)}  # it goes on where its file lies


def plain(flags: dict) -> dict:
    """Flags as checkpoints keep them: paths as words."""
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in flags.items() if name != "resume"}


def as_command(settings: dict) -> str:
    """The settings in force as a command that can be pasted."""
    words = [f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}"
             for name, value in settings.items() if not (value is None or value is False)]
    return " ".join(["python main.py train", *words])


def claim(out: Path, goes_on: bool):
    """Take OUT for this training alone, while the file returned stays open."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
        if fcntl:  # the system lets go of it when this process ends, however it does
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ColorizeError(f"--out {out}: another training writes there, or it cannot be "
                            f"written ({error.strerror}); name another folder") from None
    made = (out / "last.tar").exists() or (out / "best_model.tar").exists()
    if made and not goes_on:
        raise ColorizeError(f"--out {out}: holds a training: --resume auto, or "
                            "another --out")
    return lock


def train(*, data: Path = Path("data/input"), out: Path = Path("checkpoints"),
          resume: str | None = None, limit: int | None = None, final: bool = False,
          init: str = "auto", encoder: str = "resnet18",
          decoder: Literal["unet", "plain"] = "unet", stages: Literal[2, 3, 4] = 4,
          loss: Literal["mse", "l1", "huber", "bins", "gan"] = "mse",
          rebalance: float = 1.0, class_weight: float = 0.0, epochs: int = 10,
          batch_size: int = 16, size: int = 256, film: bool = False,
          lr: float | None = None, encoder_share: float = 0.1, seed: int = 0,
          device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
          amp: Literal["auto", "bf16", "off"] = "auto") -> None:
    """Train a colorizer on a folder of photographs and save OUT/best_model.tar.

    Photographs and results:
    data: holds train/ and val/ (else a tenth of train)
    out: gets best_model.tar, last.tar, history
    resume: auto, or a last.tar: go on where it stopped
    limit: use this many photographs (1..)
    final: train on train and val together, keep the last epoch
    The network:
    init: auto (the shipped), imagenet, none, or a file
    encoder: torchvision's: resnet18, vgg16_bn, ...
    decoder: unet: the encoder's features joined, plain: none
    stages: the encoder ends at stride 8, 16 or 32
    What it learns:
    loss: bins: colour classes, gan: l1 + adversarial
    rebalance: bins: under 1, rare colours count more (0..1)
    class_weight: of telling the class folder, say 0.0033 (0..1000)
    How long and how fast:
    epochs: times that each photograph is seen (1..)
    batch_size: photographs a step, on each device (1..)
    size: side in pixels of the crops it sees (64..256)
    film: vary L as old films did: sensitivity, grain
    lr: peak rate; 1e-3, or 4e-5 if all was trained (1e-9..10)
    encoder_share: of lr, for a trained encoder; 0: frozen (0..10)
    The machine:
    seed: of order, crops and fresh weights (0..2147483647)
    device: where to compute
    amp: bf16 arithmetic; auto: where the hardware has it
    """
    flags = plain(locals())
    device = choose_device(device)
    path = Path(out, "last.tar") if resume == "auto" else resume and Path(resume)
    if resume == "auto" and not path.exists():
        say(f"nothing to resume in {out}: starting anew")
        path = None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun's
        # hours: the first rank builds the arrays while the others wait
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                       timeout=timedelta(hours=6))
    try:
        training, lock = start_training(flags, path, device)
        training.run()
        if training.rank == 0:
            say(training.verdict(), result=True)
            lock.close()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def start_training(flags: dict, path: Path | None, device: torch.device):
    """The training that the flags, or the last.tar at path, describe; its folder's lock."""
    rank, lock = rank_and_world()[0], None
    try:
        start = read_checkpoint(path) if path else {}
        if path:
            settings = settle_resumed(path, flags, start["training"])
        else:
            settings, start = settle(flags)
        if rank == 0:
            lock = claim(Path(settings["out"]), bool(path))
            manifests = prepare(Path(settings["data"]))
        if distributed.is_initialized():
            distributed.barrier()  # the other ranks find the arrays made
        if rank:
            manifests = prepare(Path(settings["data"]))
        training = Training(settings, start, manifests, device)
        if path and start["training"]["fingerprint"] != training.fingerprint:
            raise ColorizeError(f"--resume {path}: the photographs have changed since; "
                                f"start anew with --init {path}")
        if path:
            training.restore(start["resume"])
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError,
            RuntimeError) as error:  # what a malformed file raises; a good one none of them
        if not path or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ColorizeError(f"--resume {path}: no last.tar of this program, or damaged; "
                            f"start anew with --init {path}") from None
    if rank == 0:
        head = {"ab": "an ab", "bins": "a bins"}[training.model.arguments["head"]]
        mean = "the mean of " * (head == "a bins" and settings["loss"] != "bins")
        say(f"training {settings['loss']} on {mean}{head} head of {settings['encoder']}, "
            f"starting from {training.start}: {len(training.train_data)} photographs, "
            f"{training.world} x {device}, {'bf16' if training.amp else 'float32'}")
        say(f"settings: {as_command(settings)}")
    return training, lock


if __name__ == "__main__":
    print("type: python main.py train", file=sys.stderr)
    raise SystemExit(2)
