"""Training: objectives, the loop, resuming, history and curves.

    python main.py train                       # data/input -> checkpoints/best_model.tar
    python main.py train --init imagenet       # the plain network: an ab head, by MSE
    python main.py train --data mine --out mine/model --loss bins --epochs 50
    python main.py train --resume auto         # go on where it was cut
    torchrun --nproc_per_node=4 main.py train  # several devices
"""

import contextlib
import math
import os
import shlex
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
import torchvision
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from basic_model import (AB_SCALE, DECODERS, ColorNet, Discriminator, all_stored_ab,
                         bins_prior, choose_device, color_bins, initialize, read_checkpoint,
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
TEMPERATURE, SATURATION = 0.5, 1.1
L1_WEIGHT = 100.0   # beside the adversarial loss (Isola et al. 2017, section 3.3)
D_LR, D_BETAS = 1e-4, (0.5, 0.999)  # half their rate, as the generator comes trained
NOISE = 0.2         # on the discriminator's -1..1, or it wins early (Sonderby et al. 2017)
BAD_STEPS = 10      # non-finite losses in a row that end a run
# may differ between a run and its resumption; every other setting, and the ranks, may not
FREE_ON_RESUME = {"data", "out", "epochs", "init", "device", "workers", "save_minutes"}


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


def realness_loss(logits: torch.Tensor, real: float) -> torch.Tensor:
    """Cross-entropy of a discriminator's logits with real (1) or made (0)."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def distribute(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, its gradients averaged over the ranks where there are several."""
    if world_size() == 1:
        return network
    return DistributedDataParallel(network, [device] if device.type == "cuda" else None)


# ---------------------------------------------------------------------- schedules and means

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


class Means:
    """Named running means of which several ranks make one; each rank has the same names."""

    def __init__(self, *names: str):
        self.sums = {name: [0.0, 0] for name in names}  # total, photographs

    def add(self, count: int, **totals) -> None:
        """Totals over `count` photographs."""
        for name, total in totals.items():
            before, n = self.sums[name]
            self.sums[name] = [before + float(total), n + count]

    def over_ranks(self, device: torch.device) -> dict[str, float]:
        """The mean over all ranks of each name that was counted."""
        sums = torch.tensor(list(self.sums.values()), dtype=torch.float64)
        if distributed.is_initialized():
            sums = sums.to(device)  # nccl sums on GPUs only
            distributed.all_reduce(sums)
        return {name: total / n for name, (total, n) in zip(self.sums, sums.tolist()) if n}


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

    settings: of settle, nothing left open. start: contents of the checkpoint to start from,
    or {}; with a key `resume`, those of a last.tar, it goes on.
    """

    def __init__(self, settings: dict, start: dict, manifests: dict, device: torch.device):
        self.settings, self.device = settings, device
        self.amp = use_bf16(settings["amp"], device)
        self.fingerprint = manifests["train"]["fingerprint"]
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.world = world_size()
        self.open_photographs(manifests)
        self.make_network(start)
        self.make_optimizers()
        names = ["d_loss", "d_real", "d_fake"] if self.discriminator else []
        self.means = Means("loss", *names)
        self.step, self.history, self.best = 0, [], math.inf  # the lowest val_loss
        self.skipped, self.bad = 0, 0  # non-finite steps, and those in a row
        self.failed, self.saved = {}, time.monotonic()  # writes; when last.tar was written
        self.samples = len(self.train_data) // self.world * self.world  # equal shares
        self.steps_per_epoch = -(-self.samples // (settings["batch_size"] * self.world))
        self.total = self.steps_per_epoch * settings["epochs"]  # what the schedules span
        # a validation loss would bring a gan back to its start, and --final has none
        self.last_is_best = settings["final"] or settings["loss"] == "gan"
        if "resume" in start:
            self.restore(start["resume"])

    def open_photographs(self, manifests: dict) -> None:
        """Datasets of train and val, and the names of the classes."""
        s, self.classes = self.settings, class_names(manifests["train"])
        if s["class_weight"] and not self.classes:
            raise ColorizeError(f"--class_weight: {s['data']}/train has no class folders; "
                                "make some, or leave the flag out")
        number = {name: i for i, name in enumerate(self.classes)}  # -1: of none

        def opened(*splits, **options):
            labels = [number.get(label, -1) for split in splits
                      for *_, label in manifests[split]["photographs"]]
            arrays = [Path(s["data"], "processed", f"{split}.npy") for split in splits]
            return ColorizeData(arrays, labels, s["size"], limit=s["limit"], **options)
        self.train_data = opened(*["train", "val"][:1 + s["final"]], train=True,
                                 film=s["film"], seed=s["seed"])
        self.val_data = None if s["final"] else opened("val")
        if self.val_data is not None and not len(self.val_data):
            raise ColorizeError(f"{s['data']}/val: no usable photograph to validate with; "
                                "add some, or train without: --final")

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
            lr=s["lr"], weight_decay=s["weight_decay"])
        self.discriminator = None
        if s["loss"] == "gan":
            self.discriminator = Discriminator().to(self.device)
            self.parallel_discriminator = distribute(self.discriminator, self.device)
            self.d_optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=D_LR,
                                                 betas=D_BETAS)

    def batches(self, dataset: ColorizeData, first: int, last: int, skip: int = 0):
        """Batches (lab, labels), this rank's share of samples first..last after `skip`."""
        together = self.settings["batch_size"] * self.world
        cuda = self.device.type == "cuda"
        # ranks take turns: together they see the batches that one alone would
        shares = [list(range(start + self.rank, min(start + together, last), self.world))
                  for start in range(first, last, together)]
        workers = self.settings["workers"]
        if workers is None:  # on a CPU they would take its cores from the network
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
        totals = {name: value * len(lab) for name, value in measured.items()}
        self.means.add(len(lab), **totals)

    def skip_step(self) -> None:
        """A loss or gradient is not finite: undo what the step did to batch norm."""
        self.skipped, self.bad = self.skipped + 1, self.bad + 1
        for buffer, good in zip(self.model.buffers(), self.ema.module.buffers()):
            buffer.copy_(good)  # the average's are those of the last good step
        say(f"step {self.step}: the loss is not finite; skipped ({self.skipped} so far)")
        if self.bad == BAD_STEPS:
            raise ColorizeError(f"the loss was not finite {BAD_STEPS} times in a row; "
                                "start from the best one, --init, with a lower --lr")

    def discriminator_step(self, L, ab, made, rate: float) -> dict:
        """The discriminator's step: L (N, 1, H, W), the true and the made ab, CIE units."""
        # noise that fades out over the first half of the run, from seed and step alone
        seed = (self.settings["seed"] * 1_000_003 + self.step) * self.world + self.rank
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((2 * len(L), 3, *L.shape[-2:]), generator=generator)
        noise = noise.to(self.device) * NOISE * max(0.0, 1 - 2 * self.step / self.total)
        # real and made in one batch, or its batch norm would tell them apart
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.parallel_discriminator(
                torch.cat([L, L]), torch.cat([ab, made]), noise)
        real, fake = logits.float().chunk(2)
        loss = (realness_loss(real, 1.0) + realness_loss(fake, 0.0)) / 2
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
        return realness_loss(logits, 1.0)

    @torch.no_grad()
    def validate(self) -> dict:
        """Means over the validation photographs, for the averaged weights."""
        if self.val_data is None:
            return {}
        model = self.ema.module.eval()
        pictures = ["distance", "psnr", "colorfulness", "true"]
        means = Means("val_loss", "mse", *pictures, "accuracy")
        for lab, labels in self.batches(self.val_data, 0, len(self.val_data)):
            lab, n = decode_lab(lab.to(self.device)), len(lab)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                output, scenes = model(lab[:, :1], with_scenes=True)
            ab = model.decode(output, lab.shape[-2:])  # what inference would show
            loss = self.objective(model, output, lab[:, 1:]) * self.objective.unit
            means.add(n, val_loss=loss * n, mse=F.mse_loss(ab, lab[:, 1:]) * n)
            means.add(n, **dict(zip(pictures, picture_scores(lab.cpu(), ab.cpu()))))
            if scenes is not None:
                right = (scenes.argmax(1).cpu() == labels)[labels >= 0]
                means.add(len(right), accuracy=right.sum())
        scores = means.over_ranks(self.device)
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
                "sums": self.means.sums, "skipped": self.skipped,
                **{key: part.state_dict() for key, part in self.parts().items()}}
            self.saved = time.monotonic()  # tried, at least: no second try at each step
        try:
            save_checkpoint(Path(self.settings["out"], name), self.model,
                            self.ema.module.state_dict(), **extra)
            self.failed.pop(name, None)
        except ColorizeError as error:  # a full disk may have room again an epoch later
            self.failed[name] = str(error)
            say(f"not saved, what was there stays: {error}")

    def parts(self) -> dict:
        """What has a state that is resumed, by its key in last.tar."""
        parts = {"weights": self.model, "average": self.ema, "optimizer": self.optimizer}
        if self.discriminator is not None:
            parts |= {"discriminator": self.discriminator, "d_optimizer": self.d_optimizer}
        return parts

    def save_when_due(self) -> None:
        """last.tar, of hundreds of megabytes, where an epoch may take seconds."""
        if time.monotonic() - self.saved >= self.settings["save_minutes"] * 60:
            self.save("last.tar")

    def restore(self, state: dict) -> None:
        """Take up a run where last.tar left it; a malformed one raises many kinds."""
        for name, part in self.parts().items():
            if isinstance(part, torch.optim.Optimizer):  # its own groups, moments that fit
                groups = part.state_dict()["param_groups"]
                part.load_state_dict(
                    {"state": state[name]["state"], "param_groups": groups})
                for weight, moments in part.state.items():
                    if any(moments[key].shape != weight.shape
                           for key in ("exp_avg", "exp_avg_sq")) or moments["step"].ndim:
                        raise ValueError
            else:
                part.load_state_dict(state[name])
        self.best, self.skipped = float(state["best"]), int(state["skipped"])
        self.step = int(state["step"])
        self.means.sums = {name: [float(total), int(n)] for name in self.means.sums
                           for total, n in [state["sums"][name]]}
        self.history = [{name: int(x) if name in ("epoch", "step") else float(x)
                         for name, x in row.items()} | {"epoch": int(row["epoch"])}
                        for row in state["history"]]
        # the step lies in or at the end of the epoch after the last one of the history
        if not self.history[-1]["epoch"] * self.steps_per_epoch <= self.step <= self.total:
            raise ValueError

    def run(self) -> None:
        """Train to the last epoch; when asked to stop, finish the step, save and leave."""
        stop = []
        # clusters announce the end by TERM, HUP or USR1; what is ignored (nohup) stays so
        numbers = {getattr(signal, name, signal.SIGTERM)  # Windows has not all of them
                   for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")}
        handlers = {number: signal.signal(number, lambda number, _: stop.append(number))
                    for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
        try:
            if not self.history:  # the start competes: training may not help
                self.finish_epoch({"epoch": 0, "step": 0} | self.validate())
                self.save("last.tar")
                for error in self.failed.values():  # better now than after hours
                    raise ColorizeError(error)
            for epoch in range(self.history[-1]["epoch"], self.settings["epochs"]):
                self.run_epoch(epoch, stop)
        except (RuntimeError, MemoryError) as error:
            # on a CPU it is a RuntimeError like any other, but for its text
            if not (isinstance(error, (torch.OutOfMemoryError, MemoryError))
                    or "DefaultCPUAllocator" in str(error)):
                raise
            smaller = max(self.settings["batch_size"] // 2, 1)
            raise ColorizeError(f"the {self.device.type} ran out of memory; try "
                                f"--batch_size {smaller}, or a smaller --size") from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.save("last.tar")

    def run_epoch(self, epoch: int, stop: list) -> None:
        """One epoch, from wherever in it the step stands, and what follows it."""
        self.train_mode()
        # samples are numbered through all epochs ; done are batches of this one
        done, first = self.step - epoch * self.steps_per_epoch, epoch * len(self.train_data)
        batches = self.batches(self.train_data, first, first + self.samples, done)
        seen, waiting, start = 0, 0.0, time.monotonic()
        label, asked = f"epoch {epoch + 1}/{self.settings['epochs']}", start
        for lab, labels in batches if self.rank else progress(batches, len(batches), label):
            waiting += time.monotonic() - asked  # for the photographs
            self.train_step(lab, labels)
            seen += len(lab) * self.world
            # the signal may have reached one rank only
            stopped = max_over_ranks(stop[0] if stop else 0, self.device)
            if stopped:
                self.save("last.tar")
                say(f"stopped at step {self.step}; go on with --resume auto")
                raise SystemExit(128 + stopped)  # as a shell counts signals
            if self.step % self.steps_per_epoch:  # else after the validation
                self.save_when_due()
            asked = time.monotonic()
        elapsed = max(time.monotonic() - start, 1e-9)
        rate = self.settings["lr"] * learning_rate(self.step - 1, self.total)
        row = {"epoch": epoch + 1, "step": self.step, "lr": rate}
        row |= self.means.over_ranks(self.device) | self.validate()
        row |= {"images_per_second": seen / elapsed, "waiting": waiting / elapsed}
        self.means = Means(*self.means.sums)  # the same names, from zero
        self.finish_epoch(row)
        self.save_when_due()

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
        path, first = Path(self.settings["out"], "best_model.tar"), self.history[0]
        lost = not (self.last_is_best or math.isfinite(self.best))
        if lost or path.name in self.failed or not path.exists():
            reason = self.failed.get(path.name, "no epoch had a finite validation loss")
            raise ColorizeError(f"{path} does not hold this training's best: {reason}")
        now = self.history[-1]
        if not self.last_is_best:
            now = next((r for r in self.history if r.get("val_loss") == self.best), first)
        scores = [f"{name} {now[name]:.4g} ({first[name]:.4g} at the start)"
                  for name in ("val_loss", "color_ratio")
                  if math.isfinite(now.get(name, math.nan) + first.get(name, math.nan))]
        hint = "" if now["epoch"] else (": training did not help; try a lower --lr, "
                                        "--encoder_share 0 or more photographs")
        return ", ".join([f"{path}: epoch {now['epoch']}", *scores]) + hint


# ------------------------------------------------------------------------------ the command

def head_of(settings: dict, start: dict) -> str:
    """Bins for their own loss; else the start's, so that regressions fit its bins' mean."""
    model = {"head": "bins"} if settings["loss"] == "bins" else start.get("model", {})
    return model.get("head", "ab")


def settle(settings: dict) -> tuple[dict, dict]:
    """Nothing left open: the settings, and the contents of the checkpoint to start from.

    FlagError where flags contradict each other.
    """
    s = dict(settings)
    start = starting_checkpoint(s["init"], s["encoder"])
    start.pop("resume", None)  # of a last.tar, only the weights are wanted
    model = {"head": head_of(s, start)} | {
        name: s[name] for name in ("encoder", "decoder", "stages")}
    # each weight of the colours has a trained one to start from (classes may be new)
    trained = model.items() <= start.get("model", {}).items()
    if s["lr"] is None:
        s["lr"] = TRAINED_LR if trained else FRESH_LR
    if s["decoder"] not in DECODERS or s["loss"] not in OBJECTIVES:
        raise FlagError(f"--decoder is one of {', '.join(DECODERS)}, "
                        f"--loss one of {', '.join(OBJECTIVES)}")
    if s["loss"] != "bins" and s["rebalance"] != 1:
        raise FlagError(f"--rebalance goes with --loss bins, not {s['loss']}")
    if s["loss"] == "gan" and not trained:
        raise FlagError("--loss gan needs a trained generator: name one with --init PATH, "
                        "and the --encoder, --decoder and --stages that it has")
    if s["init"] == "none" and s["encoder_share"] == 0:
        raise FlagError("--encoder_share 0 would keep a random encoder, by --init none")
    return s, start


def settle_resumed(path: Path, flags: dict) -> tuple[dict, dict]:
    """The same of a last.tar, whose settings go on; flags that were given must agree."""
    contents, defaults = read_checkpoint(path), plain(train.__kwdefaults__)
    training = contents.get("training", {})
    old, ranks, wrong = training.get("settings"), world_size(), ""
    if "resume" not in contents:
        wrong = "it holds no training to go on with, as a last.tar does"
    elif not (isinstance(old, dict) and old.keys() == flags.keys()
              and all(fits(old[name], train.__annotations__[name]) for name in old)):
        wrong = "its settings are not of this program"
    elif training.get("ranks") != ranks:
        wrong = f"it was trained on {training.get('ranks')} ranks, not {ranks}; use as many"
    if wrong:
        raise ColorizeError(f"--resume {path}: {wrong}, or start anew with --init {path}")
    # a flag that is at its default was not given, as far as one can tell
    given = {name: value for name, value in flags.items() if value != defaults[name]}
    for name, value in given.items():
        fewer = name == "epochs" and value < old[name]  # these would change its past
        if old[name] != value and (name not in FREE_ON_RESUME or fewer):
            raise ColorizeError(f"--resume {path}: it was trained with --{name} "
                                f"{old[name]}, not {value}; or start with --init {path}")
    if given.get("epochs", 0) > old["epochs"]:
        say(f"--epochs {given['epochs']} instead of {old['epochs']}: the learning rate "
            "follows the longer schedule from here on")
    # it goes on where its file lies, so that a folder can be moved
    return old | {"out": str(path.parent)} | given | {"init": old["init"]}, contents


def fits(value, kind) -> bool:
    """Whether a setting read from a file is of its flag's type, and no negative number."""
    if get_origin(kind) is Literal:  # a choice
        return value in get_args(kind)
    kind = str if kind is Path else kind
    if type(value) is int and not isinstance(value, kind):
        value = float(value)  # 1 where 1.0 is meant
    return isinstance(value, kind) and not (isinstance(value, (int, float)) and value < 0)


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
    except BlockingIOError:
        raise ColorizeError(f"--out {out}: another training writes there now; wait for its "
                            "end, or name another folder") from None
    except OSError as error:
        raise ColorizeError(f"--out {out}: cannot be written ({error.strerror}); "
                            "name another folder") from None
    for name in ("best_model.tar", "last.tar", "history.csv", "curves.png", "preview.png"):
        for left in out.glob(f".{name}.*.part"):  # of a run that was killed
            left.unlink(missing_ok=True)
    there = [path for path in (out / "last.tar", out / "best_model.tar") if path.exists()]
    if there and not goes_on:
        epochs = "several"
        with contextlib.suppress(ColorizeError):  # or damaged, but not ours to overwrite
            epochs = read_checkpoint(there[0]).get("training", {}).get("epoch", epochs)
        remedy = "--resume auto, or " * (out / "last.tar").exists() + "another --out"
        raise ColorizeError(f"--out {out}: holds a training of {epochs} epochs: {remedy}")
    return lock


def join_ranks(device: torch.device) -> int:
    """This process's number among those that torchrun started; 0 where there is one."""
    if "RANK" not in os.environ:
        return 0
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        # hours: the first rank builds the arrays while the others wait
        distributed.init_process_group(backend, timeout=timedelta(hours=6))
    except (ValueError, RuntimeError):
        raise ColorizeError("RANK is set but the ranks cannot find each other (WORLD_SIZE, "
                            "MASTER_ADDR, MASTER_PORT); start them with torchrun, or unset "
                            "RANK") from None
    return distributed.get_rank()


def train(*, data: Path = Path("data/input"), out: Path = Path("checkpoints"),
          resume: str | None = None, limit: int | None = None, final: bool = False,
          init: str = "auto", encoder: str = "resnet18",
          decoder: Literal["unet", "plain"] = "unet", stages: Literal[2, 3, 4] = 4,
          loss: Literal["mse", "l1", "huber", "bins", "gan"] = "mse",
          rebalance: float = 1.0, class_weight: float = 0.0, epochs: int = 10,
          batch_size: int = 16, size: int = 256, film: bool = False,
          lr: float | None = None, encoder_share: float = 0.1,
          weight_decay: float = 0.01, seed: int = 0,
          device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
          amp: Literal["auto", "bf16", "off"] = "auto", workers: int | None = None,
          save_minutes: float = 5.0) -> None:
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
    weight_decay: AdamW's (0..10)
    The machine:
    seed: of order, crops, weights, noise (0..2147483647)
    device: where to compute
    amp: bf16 arithmetic; auto: where the hardware has it
    workers: processes that make batches (0..999)
    save_minutes: write last.tar this often (0..)
    """
    flags = plain(locals())
    device, out = choose_device(device), Path(out)
    last = out / "last.tar" if resume == "auto" else resume and Path(resume)
    if resume == "auto" and not last.exists():
        say(f"nothing to resume in {out}: starting anew")
        last = None
    try:
        rank = join_ranks(device)
        settings, start = settle_resumed(last, flags) if last else settle(flags)
        # held in a name until the end of the training
        lock = None if rank else claim(Path(settings["out"]), bool(last))
        manifests = None if rank else prepare(Path(settings["data"]))
        if distributed.is_initialized():
            distributed.barrier()  # the other ranks find the arrays made
        manifests = manifests or prepare(Path(settings["data"]))
        fingerprint = manifests["train"]["fingerprint"]
        if last and start["training"].get("fingerprint") != fingerprint:
            raise ColorizeError(f"--resume {last}: the photographs have changed since; "
                                f"start anew with --init {last}")
        try:
            training = Training(settings, start, manifests, device)
        except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError,
                RuntimeError):  # what a malformed file can raise; a good one none of them
            if not last:
                raise
            raise ColorizeError(f"--resume {last}: what it holds is damaged; "
                                f"start anew with --init {last}") from None
        if rank == 0:
            head = "an ab head" if head_of(settings, start) == "ab" else "a bins head"
            mean = "the mean of " * (head == "a bins head" and settings["loss"] != "bins")
            say(f"training {settings['loss']} on {mean}{head} of {settings['encoder']}, "
                f"starting from {training.start}" + f"; resumed {last} at step "
                f"{training.step} of {training.total}" * bool(last))
            say(f"settings: {as_command(settings)}")
            say(f"{len(training.train_data)} photographs, {training.world} x {device}, "
                f"{'bf16' if training.amp else 'float32'}")
        training.run()
        if rank == 0:
            print(training.verdict())
            lock.close()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit("type: python main.py train")
