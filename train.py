"""Training: objectives, the loop, resuming, history and curves.

    python main.py train                       # data/input -> checkpoints/best_model.tar
    python main.py train --init imagenet       # the plain network: an ab head, by MSE
    python main.py train --data mine --out mine/model --loss bins --epochs 50
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
from pathlib import Path
from typing import Literal

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from basic_model import (AB_SCALE, DECODERS, ENCODERS, LAUNCHED, RANK, WORLD, ColorNet,
                         Discriminator, all_ranks, all_stored_ab, bins_prior, choose_device,
                         color_bins, initialize, read_checkpoint, save_checkpoint,
                         soft_encode, starting_point, use_bf16)
from colorize_data import ColorizeData, count_colors, decode_lab, prepare, progress
from evaluate import draw_curves, draw_preview, picture_scores, write_csv
from photo import ColorizeError, FlagError, say

FRESH_LR = 1e-3     # AdamW's own
TRAINED_LR = 4e-5   # where every layer was trained: with a larger one it forgets
EMA_DECAY = 0.999   # of the averaged weights, which are the ones validated and shipped
MAX_NORM = 1.0      # longer gradients are clipped, so that one odd batch does no harm
L1_WEIGHT = 100.0   # beside the adversarial loss (Isola et al. 2017, section 3.3)
D_LR, D_BETAS = 1e-4, (0.5, 0.999)  # half their rate, as the generator comes trained
BAD_STEPS = 10      # non-finite losses in a row that end a run
SAVE_SECONDS = 300  # between two writes of last.tar, of hundreds of megabytes
# clusters announce the end by TERM, HUP or USR1; Windows has not all of them
SIGNALS = [s for s in signal.Signals if s.name in "SIGINT SIGTERM SIGHUP SIGUSR1".split()]


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


# of a model: loss(model, output, true ab in CIE units), and its factor in the log
OBJECTIVES = {
    "mse": lambda model: regression(nn.MSELoss(), 2),
    "l1": lambda model: regression(nn.L1Loss(), 1),
    "huber": lambda model: regression(nn.HuberLoss(delta=0.1), 2),  # linear over 11 units
    "bins": lambda model: cross_entropy(model.bins),
    "gan": lambda model: regression(nn.L1Loss(), 1),  # train_step adds the adversarial part
}  # a new --loss is one entry here


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


def means_over_ranks(sums: Counter) -> dict[str, float]:
    """Each rank's sums over its `photographs` to the means over those of all ranks."""
    total = Counter()
    for each in all_ranks(sums):
        total.update(each)  # a Counter's adds
    count = total.pop("photographs", 0)
    return {name: value / count for name, value in total.items()}


def ignore_signals(_) -> None:
    """Of a worker: clusters send theirs to all processes, and the main one saves."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Training:
    """A run in progress, from its --init, or resumed from the contents of a last.tar."""

    def __init__(self, flags: dict, device: torch.device, resumed: dict | None = None):
        choices = {"loss": OBJECTIVES, "encoder": ENCODERS, "decoder": DECODERS}
        for name, known in choices.items():  # a loss may be gone since last.tar was written
            if flags[name] not in known:
                raise FlagError(f"--{name} {flags[name]}: choose one of {', '.join(known)}")
        self.start, contents = (("", resumed) if resumed else  # in words, and what it holds
                                starting_point(flags["init"], flags["encoder"]))
        self.settings, arguments = settle(flags, contents)
        self.device, self.out = device, Path(flags["out"])
        self.amp = use_bf16(flags["amp"], device)
        self.lock = RANK == 0 and claim(self.out, resumed)
        self.open_photographs()
        self.make_network(arguments, contents, resumed)
        self.make_optimizers()
        self.step = self.bad = self.stop = 0  # bad: steps in a row; stop: a signal's number
        self.history, self.sums = [], Counter()  # epochs, from 0; what this one's steps add
        self.saved = time.monotonic()  # when last.tar was
        self.samples = len(self.train_data) // WORLD * WORLD  # of an epoch: equal shares
        self.steps_per_epoch = -(-self.samples // (flags["batch_size"] * WORLD))

    def open_photographs(self) -> None:
        """The datasets of train and val; the first rank makes arrays that are missing."""
        s, arrays = self.settings, Path(self.settings["data"], "processed")
        manifests = all_ranks(prepare(s["data"]) if RANK == 0 else None)[0]
        self.fingerprint = manifests["train"]["fingerprint"]
        if not manifests["val"]["photographs"]:
            raise ColorizeError(f"{s['data']}/val: no usable photograph to score; add some")
        self.train_data = ColorizeData(arrays / "train.npy", s["size"], True, s["film"],
                                       s["seed"], s["limit"])
        self.val_data = ColorizeData(arrays / "val.npy", s["size"], limit=s["limit"])

    def make_network(self, arguments: dict, start: dict, resumed: dict | None) -> None:
        """The network with its starting weights, their average, and the objective."""
        s = self.settings
        # what a checkpoint learnt, its bins too, stays; else README's best of their means
        colors = start.get("colors") or {"bins": color_bins(), "temperature": 0.6,
                                         "saturation": 1.33}
        # prior and mean are of these photographs, whatever the start was trained on
        histogram, mean_ab = count_colors(self.train_data)
        colors = colors | {"prior": bins_prior(histogram, colors["bins"])}
        self.mean_ab = torch.from_numpy(mean_ab).float()
        torch.manual_seed(s["seed"])  # of the weights that start random
        self.model = ColorNet(**arguments, colors=colors)
        if resumed:
            self.trained = bool(start["training"]["trained"])
        else:
            taken = initialize(self.model, self.start, start)
            self.start += f" ({len(taken)} of {len(self.model.state_dict())} tensors)"
            own = dict(self.model.encoder.named_parameters())  # a less deep start has fewer
            self.trained = {f"encoder.{name}" for name in own} <= taken
        self.model.encoder.train(not self.trained)  # a trained batch norm knows more
        # no gradients for it either: a step is a fifth faster
        if self.trained and s["encoder_share"] == 0:
            self.model.encoder.requires_grad_(False)
        self.model.to(self.device, memory_format=torch.channels_last)  # faster there
        self.ema = AveragedModel(self.model, multi_avg_fn=ema_update)  # copies the buffers
        self.ema.eval().requires_grad_(False)
        self.objective, self.unit = OBJECTIVES[s["loss"]](self.model)

    def make_optimizers(self) -> None:
        """AdamW of the network and, for a gan, the discriminator with its own."""
        s, encoder = self.settings, self.model.encoder
        others = [w for name, w in self.model.named_parameters() if "encoder." not in name]
        # features from a million photographs should change little for a few more
        share = s["encoder_share"] if self.trained else 1.0
        groups = [{"params": encoder.parameters(), "peak": s["lr"] * share},
                  {"params": others, "peak": s["lr"]}]  # "peak" is ours, for train_step
        # with gradients averaged over the ranks, where there are several
        wrap = nn.parallel.DistributedDataParallel if WORLD > 1 else lambda network: network
        self.parallel = wrap(self.model)
        self.parts = {"weights": self.model, "average": self.ema}  # of last.tar
        if s["loss"] == "gan":
            self.discriminator = Discriminator().to(self.device)
            self.parts["discriminator"] = self.discriminator
            self.parallel_discriminator = wrap(self.discriminator)
            groups += [{"params": self.discriminator.parameters(), "peak": D_LR,
                        "betas": D_BETAS}]
        self.optimizer = self.parts["optimizer"] = torch.optim.AdamW(groups)

    def batches(self, dataset: ColorizeData, numbers: range):
        """The samples of these numbers as Lab (N, 3, H, W), CIE units, on the device."""
        cuda = self.device.type == "cuda"
        # on a CPU, workers would take its cores from the network
        workers = min(8, (os.cpu_count() or 2) - 1) if cuda else 0
        for stored in torch.utils.data.DataLoader(dataset, self.settings["batch_size"],
                                                  sampler=numbers, num_workers=workers,
                                                  pin_memory=cuda,
                                                  worker_init_fn=ignore_signals):
            # bytes travel, a quarter of the traffic; there they become units
            lab = decode_lab(stored.to(self.device, non_blocking=True))
            yield lab.contiguous(memory_format=torch.channels_last)

    def train_step(self, lab: torch.Tensor) -> None:
        """One step on a batch of Lab (N, 3, H, W), CIE units; what it gave adds to sums."""
        L, ab = lab[:, :1], lab[:, 1:]  # what is given, and what is to be guessed
        # by hand, from the step alone: a scheduler's state would be one more thing to save
        rate = learning_rate(self.step, self.steps_per_epoch * self.settings["epochs"])
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        torch.manual_seed(self.settings["seed"] + self.step)  # of layers that are dropped
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            output = self.parallel(L)  # ab, or logits of bins
        loss = self.objective(self.model, output, ab)  # outside: losses need float32
        measured = {"loss": loss.detach() * self.unit}
        if self.settings["loss"] == "gan":
            made = self.model.decode(output, ab.shape[-2:])
            adversarial, d_loss = self.adversarial_losses(L, ab, made)
            measured["d_loss"] = d_loss.detach()  # near 0: it wins, and no longer teaches
            loss = L1_WEIGHT * loss + adversarial + d_loss  # which is of its own weights
        self.optimizer.zero_grad()
        loss.backward()  # and, on several ranks, the mean of all gradients
        # each by its own norm: L1_WEIGHT would leave the discriminator next to nothing
        networks = [self.parts[n] for n in ("weights", "discriminator") if n in self.parts]
        norm = sum(nn.utils.clip_grad_norm_(n.parameters(), MAX_NORM) for n in networks)
        self.step += 1
        if not norm.isfinite():  # the same on all ranks: they skip a step together
            return self.skip_step()
        self.bad = 0
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        self.sums.update({name: float(x) * len(lab) for name, x in measured.items()})
        self.sums["photographs"] += len(lab)  # of an epoch's last batch they are fewer

    def skip_step(self) -> None:
        """Pass over a loss that is not finite; BAD_STEPS of them in a row end the run."""
        self.bad += 1
        for buffer, good in zip(self.model.buffers(), self.ema.module.buffers()):
            buffer.copy_(good)  # batch norm has seen the batch
        say(f"step {self.step}: its gradient is not finite; skipped")
        if self.bad == BAD_STEPS:
            raise ColorizeError(f"the loss was not finite {BAD_STEPS} times in a row; "
                                f"--init {self.out}/best_model.tar with a lower --lr")

    def adversarial_losses(self, L, ab, made) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the network, where made ab is known as made; of the discriminator."""
        # both in one batch, or batch norm would tell them apart; float32, as it is small
        logits = self.parallel_discriminator(torch.cat([L, L]),
                                             torch.cat([ab, made.detach()]))
        real, fake = logits.chunk(2)
        # softplus: the cross-entropy with real (of -logits) and with made
        d_loss = (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
        # gradients pass through it and leave nothing
        self.discriminator.requires_grad_(False)
        adversarial = F.softplus(-self.discriminator(L, made)).mean()
        self.discriminator.requires_grad_(True)
        return adversarial, d_loss

    def validate(self) -> dict:
        """Means over the validation photographs, for the averaged weights."""
        model, sums = self.ema.module, Counter()
        for lab in self.batches(self.val_data, range(RANK, len(self.val_data), WORLD)):
            L, ab = lab[:, :1], lab[:, 1:]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                output = model(L)
            loss = self.objective(model, output, ab) * self.unit
            sums.update(photographs=len(lab), val_loss=float(loss) * len(lab))
            made = model.decode(output, ab.shape[-2:])  # as inference shows it
            sums.update(picture_scores(lab, made))
        scores = means_over_ranks(sums)
        made, true = scores.pop("colorfulness"), scores.pop("true_colorfulness")
        return scores | {"color_ratio": made / max(true, 1e-9)}  # as in evaluate's table

    def run(self) -> None:
        """Train to the last epoch; when asked to stop, finish the step, save and leave."""
        def note(number, _):
            if self.stop and number == signal.SIGINT:  # Ctrl-C again: at once
                raise KeyboardInterrupt
            self.stop = number
        handlers = {number: signal.signal(number, note) for number in SIGNALS
                    if signal.getsignal(number) != signal.SIG_IGN}  # as under nohup
        try:
            if self.step == 0:  # the start competes: training may not help
                self.history = [{"epoch": 0, "step": 0} | self.validate()]
                self.save("last.tar")  # a full disk is better found now than after hours
                self.finish_epoch()
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
        # ranks take turns: together they see the batches that one alone would
        numbers = range(first + RANK, first + self.samples, WORLD)
        numbers = numbers[done * self.settings["batch_size"]:]
        batches, began = self.batches(self.train_data, numbers), time.monotonic()
        if RANK == 0:
            label = f"epoch {epoch + 1}/{self.settings['epochs']}"
            batches = progress(batches, self.steps_per_epoch - done, label)
        for lab in batches:
            self.train_step(lab)
            stop = max(all_ranks(self.stop))  # the signal may have reached one rank only
            if stop or time.monotonic() - self.saved >= SAVE_SECONDS:
                self.save("last.tar")
            if stop:
                all_ranks(0)  # none leaves before the first one has saved
                say(f"stopped at step {self.step}; go on: --resume {self.out / 'last.tar'}")
                raise SystemExit(128 + stop)  # as a shell counts signals
        row = {"epoch": epoch + 1, "step": self.step, "seconds": time.monotonic() - began,
               "lr": self.optimizer.param_groups[1]["lr"]}  # of all but the encoder
        self.history.append(row | means_over_ranks(self.sums) | self.validate())
        self.sums.clear()
        self.finish_epoch()

    def finish_epoch(self) -> None:
        """The last row in log and history; best_model.tar, if it is best; pictures."""
        if RANK:
            return
        row = self.history[-1]
        best = self.best() is row
        say("  ".join(f"{name} {x:.4g}" for name, x in row.items()) + "  best" * best)
        if best:
            self.save("best_model.tar")
        try:
            write_csv(self.out / "history.csv", self.history)
            draw_curves(self.out / "curves.png", self.history)
            draw_preview(self.out / "preview.png", self.ema.module, self.val_data)
        except ColorizeError as error:  # pictures are not worth a training
            say(str(error))

    def best(self) -> dict:
        """The history's row whose network is best_model.tar; {} while there is none."""
        if self.settings["loss"] == "gan":  # a validation loss would prefer its start
            return self.history[-1]
        # a random start does not compete: it is gray, which few steps come up to
        first = 1 if self.start.startswith("random") else 0
        finite = [row for row in self.history[first:] if math.isfinite(row["val_loss"])]
        return min(finite, key=lambda row: row["val_loss"], default={})

    def save(self, name: str) -> None:
        """Write best_model.tar, of averaged weights, or last.tar, to go on from."""
        if RANK:
            return
        training = {  # what a reader needs to make it again; scores of the last whole epoch
            "settings": self.settings, "start": self.start, "trained": self.trained,
            "ranks": WORLD, "step": self.step, "photographs": len(self.train_data),
            "fingerprint": self.fingerprint, "scores": self.history[-1],
            "torch": str(torch.__version__)}
        extra = {"mean_ab": self.mean_ab, "training": training}
        if name == "last.tar":
            extra["resume"] = {key: part.state_dict() for key, part in self.parts.items()}
            extra["resume"] |= {"history": self.history, "sums": dict(self.sums)}
            self.saved = time.monotonic()
        save_checkpoint(self.out / name, self.model, self.ema.module.state_dict(), **extra)

    def restore(self, contents: dict) -> None:
        """Take up a run where last.tar left it; a malformed one raises many kinds."""
        path, training = self.out / "last.tar", contents["training"]
        state = contents["resume"]
        if training["ranks"] != WORLD:  # the batches of a step would be others
            raise ColorizeError(f"--resume {path}: it ran on {training['ranks']} devices, "
                                f"not {WORLD}: start as many")
        if training["fingerprint"] != self.fingerprint:
            raise ColorizeError(f"--resume {path}: the photographs have changed; start "
                                f"with --init {path} and another --out")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.start = int(training["step"]), str(training["start"])
        self.history, self.sums = state["history"], Counter(state["sums"])
        # the step lies in, or at the end of, the epoch after the last one of the history
        epochs = [row["epoch"] for row in self.history]
        done = self.step - epochs[-1] * self.steps_per_epoch
        if epochs != list(range(len(epochs))) or not 0 <= done <= self.steps_per_epoch:
            raise ValueError
        if self.step and self.best() and not (self.out / "best_model.tar").exists():
            raise ColorizeError(f"--resume {path}: copy its best_model.tar beside it, too")

    def describe(self) -> None:
        """The log's first lines: what is trained, by which loss, from where; a command."""
        s, head = self.settings, self.model.arguments["head"]
        say(f"training the {head} head of {s['encoder']} by {s['loss']}, starting from "
            f"{self.start}: {len(self.train_data)} photographs, {WORLD} x {self.device}"
            + ", bf16" * self.amp + f", resumed at step {self.step}" * (self.step > 0))
        words = [f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}"
                 for name, value in s.items() if value is not None and value is not False]
        launcher = f"torchrun --nproc_per_node={WORLD}" if LAUNCHED else "python"
        say("settings: " + " ".join([f"{launcher} main.py train", *words]))
        if len(self.history) > s["epochs"]:  # of the start there is a row, too
            say(f"its {s['epochs']} epochs are done; to go on give more --epochs")

    def verdict(self) -> str:
        """What best_model.tar holds, and whether training helped; or ColorizeError."""
        path, best, start = self.out / "best_model.tar", self.best(), self.history[0]
        if not best:
            raise ColorizeError(f"{path}: no epoch had a finite loss; try a lower --lr")
        text = f"{path}: epoch {best['epoch']}"
        for name in ("val_loss", "color_ratio"):
            text += f", {name} {best[name]:.4g} ({start[name]:.4g} at the start)"
        if best is start:
            return f"{text}: training did not help; try more epochs, photographs, less --lr"
        change = (best["val_loss"] - start["val_loss"]) / (abs(start["val_loss"]) or 1)
        return f"{text}: val_loss {change:+.1%} on {len(self.val_data)} photographs"


# ------------------------------------------------------------------------------ the command

def settle(flags: dict, start: dict) -> tuple[dict, dict]:
    """The settings, all of them known, and ColorNet's arguments."""
    model = start.get("model", {})
    arguments = {name: flags[name] for name in ("encoder", "decoder", "stages")}
    # losses other than bins fit the head that they find, of bins the mean colour
    arguments["head"] = "bins" if flags["loss"] == "bins" else model.get("head", "ab")
    all_trained = arguments.items() <= model.items()
    if flags["loss"] == "gan" and not all_trained:
        raise FlagError("--loss gan needs a trained generator: name one by --init PATH, "
                        "with its --encoder, --decoder and --stages")
    lr = TRAINED_LR if all_trained else FRESH_LR
    return flags | {"lr": flags["lr"] or lr}, arguments


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
        way = "go on by --resume auto, or " * (out / "last.tar").exists()
        raise ColorizeError(f"--out {out}: holds a training: {way}begin in another --out")
    return lock


def resume_training(path: Path, flags: dict, device: torch.device, typed=()) -> Training:
    """The training in the last.tar at path, with its settings; flags given must agree."""
    given = {name: x for name, x in flags.items()
             if name in typed or x != train.__kwdefaults__[name]}
    if "out" in given and Path(given["out"]).resolve() != path.parent.resolve():
        raise FlagError(f"--resume {path} goes on in its own folder: leave out --out")
    try:
        start = read_checkpoint(path)
        old = start["training"]["settings"]
        for name, value in given.items():
            longer = name == "epochs" and value > old[name]
            if value != old[name] and not longer and name not in ("data", "out", "device"):
                raise ColorizeError(f"--resume {path}: trained with {name} {old[name]}, "
                                    f"not {value}: leave that out, or start with --init")
        settings = {name: old[name] for name in flags} | given | {"out": str(path.parent)}
        training = Training(settings, device, start)
        training.restore(start)
        return training
    except (ColorizeError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a malformed file raises many kinds, a good one none
        raise ColorizeError(f"--resume {path}: no last.tar of this program, or damaged; "
                            f"start anew with --init {path}") from error


def train(*, data: str = "data/input", out: str = "checkpoints", resume: str | None = None,
          limit: int | None = None, init: str = "auto",
          encoder: str = "resnet18", decoder: str = "unet", stages: Literal[2, 3, 4] = 4,
          loss: str = "mse", epochs: int = 10, batch_size: int = 16, size: int = 256,
          film: bool = False, lr: float | None = None, encoder_share: float = 0.1,
          seed: int = 0, device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
          amp: Literal["auto", "bf16", "off"] = "auto", typed: tuple = ()) -> None:
    """Train a colorizer on a folder of photographs and save OUT/best_model.tar.

    Photographs and results:
    data: holds train/ and val/ (else a tenth of train)
    out: gets best_model.tar, last.tar, history
    resume: auto, or a last.tar: go on where it stopped
    limit: use this many photographs (1..)
    The network, and what it learns:
    init: auto (the shipped, else ImageNet's), imagenet, none, a file
    encoder: torchvision's: resnet18, vgg16_bn, ...
    decoder: unet: the encoder's features joined, plain: none
    stages: the encoder ends at stride 8, 16 or 32
    loss: mse, l1, huber, bins: colour classes, gan: l1 + adversarial
    How long, how fast, and where:
    epochs: times that each photograph is seen (1..)
    batch_size: photographs a step, on each device (1..)
    size: side in pixels of the crops it sees (64..256)
    film: vary L as old films did: sensitivity, grain
    lr: peak rate; 1e-3, or 4e-5 if all was trained (1e-9..10)
    encoder_share: of lr, for a trained encoder; 0: frozen (0..10)
    seed: of order, crops and fresh weights (0..2147483647)
    device: where to compute
    amp: bf16 arithmetic; auto: where the hardware has it
    """
    flags = locals() | {"data": str(data), "out": str(out)}  # first: locals are flags only
    del flags["resume"], flags["typed"]
    device, path = choose_device(device), Path(resume or "")
    if resume == "auto" and not (path := Path(out, "last.tar")).exists():
        say(f"nothing to resume in {out}: starting anew")
        resume = None
    if WORLD > 1:  # hours: the first rank builds the arrays while the others wait
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                       timeout=timedelta(hours=6))
        atexit.register(distributed.destroy_process_group)
    training = (resume_training(path, flags, device, typed) if resume else
                Training(flags, device))
    if RANK == 0:
        training.describe()
    training.run()
    if RANK == 0:
        say(training.verdict(), result=True)


if __name__ == "__main__":
    raise SystemExit("type: python main.py train --help")
