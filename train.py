"""Training: objectives, the loop, resuming, history and curves.

    python main.py train                       # data/input -> checkpoints/best_model.tar
    python main.py train --init imagenet       # the plain network: an ab head, by MSE
    python main.py train --data mine --out mine/model --loss bins --epochs 50
    python main.py train --resume auto         # go on where it was cut
    torchrun --nproc_per_node=4 main.py train  # several devices
"""

import atexit
import math
import os
import shlex
import signal
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
from torch.optim.swa_utils import AveragedModel

from basic_model import (AB_SCALE, DECODERS, ENCODERS, ColorNet, Discriminator,
                         all_stored_ab, bins_prior, choose_device, color_bins, initialize,
                         read_checkpoint, save_checkpoint, soft_encode,
                         starting_checkpoint, use_bf16)
from colorize_data import ColorizeData, count_colors, decode_lab, prepare
from evaluate import draw_curves, draw_preview, picture_scores, write_csv
from photo import ColorizeError, FlagError, progress, say

FRESH_LR, TRAINED_LR = 1e-3, 4e-5  # AdamW's own; where all was trained: larger, it forgets
EMA_DECAY = 0.999   # of the averaged weights, which are the ones validated and shipped
MAX_NORM = 1.0      # longer gradients are clipped, so that one odd batch does no harm
HUBER_DELTA = 11.0  # ab units, a tenth of the scale: quadratic below, linear above
TEMPERATURE, SATURATION = 0.6, 1.45  # of bins' mean colour; T 1 and 0.25: README
L1_WEIGHT = 100.0   # beside the adversarial loss (Isola et al. 2017, section 3.3)
D_LR, D_BETAS = 1e-4, (0.5, 0.999)  # half their rate, as the generator comes trained
BAD_STEPS = 10      # non-finite losses in a row that end a run
SAVE_SECONDS = 300  # between two writes of last.tar, of hundreds of megabytes
# clusters announce the end by TERM, HUP or USR1; Windows has not all of them
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
           if hasattr(signal, name)]
# torchrun starts so many processes, ranks, and numbers them; without it a stray RANK would
# wait for others for ever
LAUNCHED = distributed.is_torchelastic_launched()
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
RANK = int(os.environ["RANK"]) if LAUNCHED else 0


# ------------------------------------------------------------------------------- objectives

def regression(error: nn.Module, power: int):
    """Mean error of ab, of an ab head or of the mean colour of a bins head; on ab/110."""
    def loss(model, output, ab):
        made = model.decode(output, ab.shape[-2:])  # (N, 2, H, W), CIE units, float32
        return error(made / AB_SCALE, ab / AB_SCALE)
    return loss, AB_SCALE ** power


def cross_entropy(bins: torch.Tensor):
    """Of logits (N, Q, H/4, W/4) with softly encoded ab (Zhang et al. 2016, eq. 2)."""
    # tables over all 65,536 stored ab: to search the nearest bins in each step is slow
    tables = [table.to(bins.device) for table in soft_encode(all_stored_ab(), bins.cpu())]

    def loss(model, logits, ab):
        ab = F.avg_pool2d(ab, 4, ceil_mode=True, count_include_pad=False)
        a, b = (ab.round().long() + 128).unbind(dim=1)
        # rows of the tables, (N, h, w, 5), to the logits' layout, (N, 5, h, w)
        nearest, soft = (table[a * 256 + b].permute(0, 3, 1, 2) for table in tables)
        log_probability = torch.log_softmax(logits.float(), dim=1).gather(1, nearest)
        return -(soft * log_probability).sum(dim=1).mean()
    return loss, 1.0  # nats stay nats


# of the model: loss(model, output, true ab (N, 2, H, W)), and the factor by which it is
# reported, from ab/110 (as are thresholds) to ab units. A new --loss is one entry here
OBJECTIVES = {
    "mse": lambda model: regression(nn.MSELoss(), 2),
    "l1": lambda model: regression(nn.L1Loss(), 1),
    "huber": lambda model: regression(nn.HuberLoss(delta=HUBER_DELTA / AB_SCALE), 2),
    "bins": lambda model: cross_entropy(model.bins),
    "gan": lambda model: regression(nn.L1Loss(), 1),  # train_step adds the adversarial part
}


# ---------------------------------------------------------------------- schedules and ranks

def learning_rate(step: int, total: int) -> float:
    """As a share of its peak: linear warm-up, then half a cosine to zero."""
    warm_up = min(500, max(total // 20, 1))  # while the averages in Adam fill
    angle = math.pi * max(step - warm_up, 0) / max(total - warm_up, 1)
    return min((step + 1) / warm_up, 1) * (0.5 * (1 + math.cos(angle)))


def ema_update(averaged: list, current: list, updates) -> None:
    """averaged += (1 - d)(current - averaged), d = min(EMA_DECAY, (1 + t)/(10 + t))."""
    t = int(updates)  # a fixed decay would ship the random start of a short training
    torch._foreach_lerp_(averaged, current, 1 - min(EMA_DECAY, (1 + t) / (10 + t)))


def all_ranks(value) -> list:
    """The value that each rank has, in their order; every rank must ask."""
    values = [value] * WORLD
    if WORLD > 1:
        distributed.all_gather_object(values, value)
    return values


def means_over_ranks(sums: Counter) -> dict[str, float]:
    """Each rank's sums over its `photographs` to the means over those of all ranks."""
    total = Counter()
    for each in all_ranks(sums):
        total.update(each)  # adds
    count = total.pop("photographs", 0)
    return {name: value / count for name, value in total.items()}


def distribute(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, its gradients averaged over the ranks where there are several."""
    own = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, own) if WORLD > 1 else network


class Training:
    """A run in progress: networks, averages, optimizers, counters; it learns and saves.

    start: contents of the checkpoint to start from, or {}; resumed: it is a last.tar.
    """

    def __init__(self, settings: dict, start: dict, device: torch.device, resumed=False):
        self.settings, self.device, self.out = settings, device, Path(settings["out"])
        self.amp = use_bf16(settings["amp"], device)
        self.lock = RANK == 0 and claim(self.out, resumed)
        self.open_photographs()
        self.make_network(start, resumed)
        self.make_optimizers()
        self.step, self.history = 0, []  # its first row is the start
        self.sums = Counter()  # of this epoch's steps, over the photographs seen
        self.bad, self.stop = 0, 0  # non-finite steps in a row; the signal that came
        self.saved = time.monotonic()  # when last.tar was
        self.samples = len(self.train_data) // WORLD * WORLD  # of an epoch: equal shares
        self.steps_per_epoch = -(-self.samples // (settings["batch_size"] * WORLD))
        self.total = self.steps_per_epoch * settings["epochs"]  # what the schedules span

    def open_photographs(self) -> None:
        """The datasets of train and val; arrays that are missing are made."""
        s, folder = self.settings, Path(self.settings["data"])
        # the first rank makes them while the others wait for its answer
        manifests = all_ranks(prepare(folder) if RANK == 0 else None)[0]
        self.fingerprint = manifests["train"]["fingerprint"]
        if not s["final"] and not manifests["val"]["photographs"]:
            raise ColorizeError(f"{folder}/val: no usable photograph to validate with; "
                                "add some, or train without: --final")
        arrays = [folder / "processed" / f"{split}.npy" for split in ("train", "val")]
        dataset = partial(ColorizeData, size=s["size"], limit=s["limit"])
        self.train_data = dataset(arrays if s["final"] else arrays[:1], train=True,
                                  film=s["film"], seed=s["seed"])
        self.val_data = None if s["final"] else dataset(arrays[1:])

    def make_network(self, start: dict, resumed: bool) -> None:
        """The network with its starting weights, their average, and the objective."""
        s = self.settings
        # bins are part of what a checkpoint learnt: they stay as they are
        colors = start.get("colors") or {"bins": color_bins(), "temperature": TEMPERATURE,
                                         "saturation": SATURATION}
        # prior and mean are of these photographs, whatever the start was trained on
        histogram, mean_ab = count_colors(self.train_data)
        colors = colors | {"prior": bins_prior(histogram, colors["bins"])}
        self.mean_ab = torch.from_numpy(mean_ab).float()
        # other losses fit the head that they find, of bins the mean colour
        head = "bins" if s["loss"] == "bins" else start.get("model", {}).get("head", "ab")
        asked = {"encoder": s["encoder"], "decoder": s["decoder"], "head": head,
                 "stages": s["stages"]}
        complete = asked.items() <= start.get("model", {}).items()  # all come trained
        if s["loss"] == "gan" and not complete:
            raise FlagError("--loss gan needs a trained generator: name one by --init "
                            "PATH, with its --encoder, --decoder and --stages")
        if s["lr"] is None:
            self.settings = s | {"lr": TRAINED_LR if complete else FRESH_LR}
        torch.manual_seed(s["seed"])  # of the weights that start random
        self.model = ColorNet(**asked, colors=colors)
        if resumed:
            self.start, trained = (start["training"][name] for name in ("start", "trained"))
        else:
            self.start, trained = initialize(self.model, s["init"], start)
        self.trained = set(trained)  # names of the weights that did not start random
        if any(name.startswith("encoder.") for name in trained):
            self.model.encoder.eval()  # its batch norms know more photographs than these
        if s["encoder_share"] == 0:  # no gradients for it either: a step is a fifth faster
            self.model.encoder.requires_grad_(False)
        # convolutions are faster so, on CPUs and on GPUs
        self.model.to(self.device, memory_format=torch.channels_last)
        self.ema = AveragedModel(self.model, multi_avg_fn=ema_update)  # copies the buffers
        self.objective, self.unit = OBJECTIVES[s["loss"]](self.model)

    def make_optimizers(self) -> None:
        """AdamW of the network and, for a gan, the discriminator with its own."""
        s, groups = self.settings, {}
        for name, parameter in self.model.named_parameters():
            # features from a million photographs should change little for a few more
            slow = name.startswith("encoder.") and name in self.trained
            if parameter.requires_grad:
                groups.setdefault(s["encoder_share"] if slow else 1.0, []).append(parameter)
        # "scale" is ours: train_step makes the group's rate of it
        groups = [{"params": group, "scale": share} for share, group in groups.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=s["lr"])
        self.parallel = distribute(self.model, self.device)
        self.parts = {"weights": self.model, "average": self.ema,  # by its key in last.tar,
                      "optimizer": self.optimizer}  # what has a state that is resumed
        if s["loss"] == "gan":
            self.judge = Discriminator().to(self.device)
            self.parallel_judge = distribute(self.judge, self.device)
            self.d_optimizer = torch.optim.AdamW(self.judge.parameters(), D_LR, D_BETAS)
            self.parts |= {"discriminator": self.judge, "d_optimizer": self.d_optimizer}

    def batches(self, dataset: ColorizeData, first: int, last: int, skip: int = 0):
        """Batches (lab, labels), this rank's share of samples first..last after `skip`."""
        size, cuda = self.settings["batch_size"], self.device.type == "cuda"
        # ranks take turns: together they see the batches that one alone would
        numbers = range(first + RANK, last, WORLD)[skip * size:]
        # on a CPU, workers would take its cores from the network
        workers = min(8, (os.cpu_count() or 2) - 1) if cuda else 0
        return torch.utils.data.DataLoader(dataset, size, sampler=numbers, collate_fn=tuple,
                                           num_workers=workers, pin_memory=cuda)

    def train_step(self, lab: torch.Tensor) -> None:
        """One step on a batch of stored Lab (N, 3, H, W), uint8."""
        # bytes travel to the device, a quarter of the traffic; there they become CIE units
        lab = decode_lab(lab.to(self.device, non_blocking=True))
        lab = lab.contiguous(memory_format=torch.channels_last)
        L, ab = lab[:, :1], lab[:, 1:]  # (N, 1, H, W) and (N, 2, H, W)
        # the rate is a function of the step, set by hand: a scheduler's state would be one
        # more thing to save, and to get wrong when a run goes on for more epochs
        rate = learning_rate(self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.settings["lr"] * group["scale"]
        torch.manual_seed(self.settings["seed"] + self.step)  # of layers that are dropped
        # bf16 in the network alone; losses are float32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            output = self.parallel(L)  # ab, or logits of bins
        loss = self.objective(self.model, output, ab)
        measured = {"loss": loss.detach() * self.unit}
        if self.settings["loss"] == "gan":
            made = self.model.decode(output, ab.shape[-2:])
            adversarial, judged = self.adversarial_loss(L, ab, made, rate)
            loss, measured = L1_WEIGHT * loss + adversarial, measured | judged
        self.optimizer.zero_grad()
        loss.backward()  # and, on several ranks, the mean of all gradients
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.step += 1
        # the norm is of gradients averaged over the ranks: they skip a step together
        if not torch.isfinite(norm + loss.detach()):
            self.bad += 1
            for buffer, good in zip(self.model.buffers(), self.ema.module.buffers()):
                buffer.copy_(good)  # batch norm as it was after the last good step
            say(f"step {self.step}: the loss is not finite; skipped")
            if self.bad == BAD_STEPS:
                raise ColorizeError(f"the loss was not finite {BAD_STEPS} times in a row; "
                                    "start from the best one, --init, with a lower --lr")
            return
        self.bad = 0
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        # times the batch: the last one of an epoch is smaller
        self.sums.update({name: float(x) * len(lab) for name, x in measured.items()})
        self.sums["photographs"] += len(lab)

    def adversarial_loss(self, L, ab, made, rate: float) -> tuple[torch.Tensor, dict]:
        """How far made ab (N, 2, H, W) is from being taken for real; what was measured."""
        # it learns first; real and made in one batch, or batch norm would tell them apart
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.parallel_judge(torch.cat([L, L]), torch.cat([ab, made.detach()]))
        real, fake = logits.float().chunk(2)
        # softplus: the cross-entropy with real (of -logits) and with made
        loss = (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
        self.d_optimizer.param_groups[0]["lr"] = rate * D_LR
        self.d_optimizer.zero_grad()
        loss.backward()
        if nn.utils.clip_grad_norm_(self.judge.parameters(), MAX_NORM).isfinite():
            self.d_optimizer.step()
        # gradients pass through the discriminator to the network but leave nothing in it
        self.judge.requires_grad_(False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            judged = self.judge(L, made).float()
        self.judge.requires_grad_(True)
        # d_real near 1 and d_fake near 0: it wins, and no longer teaches
        real, fake = (x.detach().sigmoid().mean() for x in (real, fake))
        measured = {"d_loss": loss.detach(), "d_real": real, "d_fake": fake}
        return F.softplus(-judged).mean(), measured

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
            loss = self.objective(model, output, lab[:, 1:]) * self.unit
            mse = F.mse_loss(ab, lab[:, 1:])  # the same for all objectives
            sums.update(photographs=n, val_loss=float(loss) * n, mse=float(mse) * n)
            sums.update(dict(zip(("distance", "psnr", "colorfulness", "true"),
                                 picture_scores(lab.cpu(), ab.cpu()))))
        scores = means_over_ranks(sums)
        # the means' ratio, as in evaluate's table
        scores["color_ratio"] = scores.pop("colorfulness") / max(scores.pop("true"), 1e-9)
        return scores

    def save(self, name: str) -> None:
        """Write best_model.tar, of averaged weights, or last.tar, to go on from."""
        if RANK:
            return
        training = {  # what a reader needs to make it again
            "settings": self.settings, "ranks": WORLD, "start": self.start,
            "trained": sorted(self.trained), "epoch": self.step // self.steps_per_epoch,
            "step": self.step, "photographs": len(self.train_data),
            "amp": "bf16" if self.amp else "off", "fingerprint": self.fingerprint,
            "scores": self.history[-1],  # of the epoch that ended last
            "torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
        extra = {"mean_ab": self.mean_ab, "classes": [], "training": training}
        if name == "last.tar":
            parts = {key: part.state_dict() for key, part in self.parts.items()}
            extra["resume"] = parts | {"step": self.step, "history": self.history,
                                       "sums": dict(self.sums)}
            self.saved = time.monotonic()
        save_checkpoint(self.out / name, self.model, self.ema.module.state_dict(), **extra)

    def restore(self, state: dict) -> None:
        """Take up a run where last.tar left it; a malformed one raises many kinds."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.history = int(state["step"]), state["history"]
        self.sums = Counter(state["sums"])
        # the step lies in, or at the end of, the epoch after the last one of the history
        epochs = [row["epoch"] for row in self.history]
        done = self.step - epochs[-1] * self.steps_per_epoch
        if epochs != list(range(len(epochs))) or not 0 <= done <= self.steps_per_epoch:
            raise ValueError
        for row in [*self.history, self.sums, self.best()]:
            math.fsum(row.values())  # raises where one is no number

    def run(self) -> None:
        """Train to the last epoch; when asked to stop, finish the step, save and leave."""
        def note(number, _):
            self.stop = number
        # what is ignored stays so, as under nohup
        handlers = {number: signal.signal(number, note) for number in SIGNALS
                    if signal.getsignal(number) != signal.SIG_IGN}
        try:
            if not self.history:  # the start competes: training may not help
                self.history = [{"epoch": 0, "step": 0} | self.validate()]
                self.save("last.tar")  # a full disk is better found now than after hours
            if self.step == 0:  # also where a kill came before its best_model.tar
                self.finish_epoch(self.history.pop())
            for epoch in range(len(self.history) - 1, self.settings["epochs"]):
                self.run_epoch(epoch)
            self.save("last.tar")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def run_epoch(self, epoch: int) -> None:
        """One epoch, from wherever in it the step stands, and what follows it."""
        # samples are numbered through all epochs; done are batches of this one
        done, first = self.step - epoch * self.steps_per_epoch, epoch * len(self.train_data)
        batches = self.batches(self.train_data, first, first + self.samples, done)
        label = f"epoch {epoch + 1}/{self.settings['epochs']}"
        seen, began = 0, time.monotonic()
        for lab, _ in batches if RANK else progress(batches, len(batches), label):
            self.train_step(lab)
            seen += len(lab) * WORLD
            stop = max(all_ranks(self.stop))  # the signal may have reached one rank only
            if stop or time.monotonic() - self.saved >= SAVE_SECONDS:
                self.save("last.tar")
            if stop:
                all_ranks(0)  # none leaves before the first one has saved
                say(f"stopped at step {self.step}; go on with --resume auto")
                raise SystemExit(128 + stop)  # as a shell counts signals
        speed = {"images_per_second": seen / max(time.monotonic() - began, 1e-9)}
        rate = self.settings["lr"] * learning_rate(self.step - 1, self.total)
        means, self.sums = means_over_ranks(self.sums), Counter()
        row = {"epoch": epoch + 1, "step": self.step, "lr": rate} | means
        self.finish_epoch(row | self.validate() | speed)

    def finish_epoch(self, row: dict) -> None:
        """The epoch's row in log and history; best_model.tar, if it is best; pictures."""
        self.history.append(row)
        if RANK:
            return
        best = self.best() is row
        say("  ".join(f"{name} {x:.4g}" for name, x in row.items()) + "  best" * best)
        if best:
            self.save("best_model.tar")
        try:
            write_csv(self.out / "history.csv", self.history)
            if row["epoch"] > 0:  # one point is no curve
                draw_curves(self.out / "curves.png", self.history)
            if self.val_data:  # the same eight photographs every time, from all of them
                numbers = sorted({i * len(self.val_data) // 8 for i in range(8)})
                lab = decode_lab(self.val_data.__getitems__(numbers)[0])
                with torch.no_grad():
                    ab = self.ema.module.eval().predict(lab[:, :1].to(self.device))
                draw_preview(self.out / "preview.png", lab, ab)
        except ColorizeError as error:  # pictures are not worth a training
            say(str(error))

    def best(self) -> dict:
        """The history's row whose network is best_model.tar; {} while there is none."""
        # a validation loss would bring a gan back to its start, and --final has none
        if self.settings["final"] or self.settings["loss"] == "gan":
            return self.history[-1]
        finite = [row for row in self.history if math.isfinite(row["val_loss"])]
        return min(finite, key=lambda row: row["val_loss"], default={})

    def describe(self) -> None:
        """The log's first lines: which loss on which head, from where; and as a command."""
        s, heads = self.settings, {"ab": "an ab head", "bins": "the mean of a bins head"}
        head = "a bins head" if s["loss"] == "bins" else heads[self.model.arguments["head"]]
        say(f"training {s['loss']} on {head} of {s['encoder']}, starting from "
            f"{self.start}: {len(self.train_data)} photographs, {WORLD} x {self.device}, "
            f"{'bf16' if self.amp else 'float32'}")
        words = [f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}"
                 for name, value in s.items() if value is not None and value is not False]
        say("settings: " + " ".join(["python main.py train", *words]))

    def verdict(self) -> str:
        """What best_model.tar holds, and whether training helped; or ColorizeError."""
        path, best, start = self.out / "best_model.tar", self.best(), self.history[0]
        if not best:
            raise ColorizeError(f"{path}: not written: no epoch had a finite validation "
                                "loss; try a lower --lr")
        scores = [f", {name} {best[name]:.4g} ({start[name]:.4g} at the start)"
                  for name in ("val_loss", "color_ratio") if name in best]
        hint = "" if best["epoch"] else (": training did not help; try a lower --lr, "
                                         "--encoder_share 0 or more photographs")
        return f"{path}: epoch {best['epoch']}" + "".join(scores) + hint


# ------------------------------------------------------------------------------ the command

def claim(out: Path, resumed: bool):
    """Take OUT for this training alone, while the file returned stays open."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
        if os.name == "posix":  # on Windows two trainings into one folder are not noticed
            import fcntl  # the system lets go when this process ends, however it does
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ColorizeError(f"--out {out}: another training writes there, or it cannot be "
                            f"written ({error.strerror}); name another folder") from None
    if not resumed and ((out / "last.tar").exists() or (out / "best_model.tar").exists()):
        raise ColorizeError(f"--out {out}: holds a training: --resume auto, or "
                            "another --out")
    return lock


def resume_training(path: Path, flags: dict, device: torch.device) -> Training:
    """The training in the last.tar at path, with its settings; flags given must agree."""
    # a flag that is at its default was not given, as far as one can tell
    given = {name: x for name, x in flags.items() if x != train.__kwdefaults__[name]}
    if "out" in given and Path(given["out"]).resolve() != path.parent.resolve():
        raise FlagError(f"--resume {path}: goes on in its own folder: leave out --out, or "
                        "start another training there with --init")
    try:
        start = read_checkpoint(path)
        # the ranks are no flag, but another number of them makes other batches
        old = start["training"]["settings"] | {"ranks": start["training"]["ranks"]}
        for name, value in (given | {"ranks": WORLD}).items():
            longer = name == "epochs" and value > old[name]
            if value != old[name] and not longer and name not in ("data", "out", "device"):
                raise ColorizeError(f"--resume {path}: trained with {name} {old[name]}, "
                                    f"not {value}: leave that out, or start with --init")
        settings = {name: old[name] for name in flags} | given | {"out": str(path.parent)}
        training = Training(settings, start, device, resumed=True)
        if start["training"]["fingerprint"] != training.fingerprint:
            raise ColorizeError(f"--resume {path}: the photographs have changed since; "
                                f"start anew with --init {path}")
        training.restore(start["resume"])
        return training
    except (ColorizeError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a malformed file raises many kinds, a good one none
        raise ColorizeError(f"--resume {path}: no last.tar of this program, or damaged; "
                            f"start anew with --init {path}") from error


def train(*, data: str = "data/input", out: str = "checkpoints", resume: str | None = None,
          limit: int | None = None, final: bool = False, init: str = "auto",
          encoder: str = "resnet18", decoder: str = "unet", stages: Literal[2, 3, 4] = 4,
          loss: str = "mse", epochs: int = 10, batch_size: int = 16, size: int = 256,
          film: bool = False, lr: float | None = None, encoder_share: float = 0.1,
          seed: int = 0, device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
          amp: Literal["auto", "bf16", "off"] = "auto") -> None:
    """Train a colorizer on a folder of photographs and save OUT/best_model.tar.

    Photographs and results:
    data: holds train/ and val/ (else a tenth of train)
    out: gets best_model.tar, last.tar, history
    resume: auto, or a last.tar: go on where it stopped
    limit: use this many photographs (1..)
    final: train on train and val together, keep the last epoch
    The network and what it learns:
    init: auto (the shipped), imagenet, none, or a file
    encoder: torchvision's: resnet18, vgg16_bn, ...
    decoder: unet: the encoder's features joined, plain: none
    stages: the encoder ends at stride 8, 16 or 32
    loss: mse, l1, huber, bins: colour classes, gan: l1 + adversarial
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
    flags = locals() | {"data": str(data), "out": str(out)}
    del flags["resume"]
    for name, known in (("loss", OBJECTIVES), ("encoder", ENCODERS), ("decoder", DECODERS)):
        if flags[name] not in known:
            raise FlagError(f"--{name} {flags[name]}: choose one of {', '.join(known)}")
    device, path = choose_device(device), Path(resume or "")
    if resume == "auto" and not (path := Path(out, "last.tar")).exists():
        say(f"nothing to resume in {out}: starting anew")
        resume = None
    if WORLD > 1:  # hours: the first rank builds the arrays while the others wait
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                       timeout=timedelta(hours=6))
        atexit.register(distributed.destroy_process_group)
    if resume:
        training = resume_training(path, flags, device)
    else:
        training = Training(flags, starting_checkpoint(init, encoder), device)
    if RANK == 0:
        training.describe()
    training.run()
    if RANK == 0:
        say(training.verdict(), result=True)


if __name__ == "__main__":
    raise SystemExit("type: python main.py train")
