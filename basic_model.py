"""The network: a torchvision encoder, a decoder, an ab or a colour-bins head; checkpoints.

ColorNet maps L (N, 1, H, W), 0..100, to ab in CIE units (head "ab") or to logits over colour bins
at a quarter of the resolution (head "bins"); ColorNet.predict gives ab for either.
"""

import os
import pickle
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from photo import VERSION, ColorizeError, in_gamut, say, write_atomically

AB_SCALE = 110.0     # the ab head's raw output, and the losses, are ab/110
MIN_INPUT = 32       # smaller inputs are padded
BIN_STEP = 10        # ab units (Zhang et al. 2016)
# the decoder's channels at each stride, the same for any encoder
WIDTHS = {32: 384, 16: 256, 8: 192, 4: 128, 2: 48, 1: 24}
SQUEEZED = 32        # channels of each earlier stage in a dense decoder
NEIGHBOURS, SIGMA = 5, 5.0  # of the soft encoding (Zhang et al. 2016)
PRETRAINED = Path(__file__).parent / "checkpoints" / "pretrained.tar"


# ----------------------------------------------------------------------------- colour bins

def color_bins() -> torch.Tensor:
    """Centres (Q, 2) of the cells of 10 ab units that hold some sRGB colour (Zhang et al. 2016)."""
    grid = np.arange(-110, 111, BIN_STEP, dtype=np.float32)
    offsets = np.linspace(-BIN_STEP / 2, BIN_STEP / 2, 5, dtype=np.float32)
    a, b, da, db = np.meshgrid(grid, grid, offsets, offsets, indexing="ij")
    ab = np.stack([a + da, b + db], axis=-1)
    held = np.zeros(a.shape[:2], bool)
    for L in np.arange(1, 100, dtype=np.float32):
        held |= in_gamut(np.full(a.shape, L), ab).any(axis=(2, 3))
    return torch.from_numpy(np.stack([a[..., 0, 0], b[..., 0, 0]], axis=-1)[held])


def soft_encode(ab: torch.Tensor, bins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ab (P, 2) to its 5 nearest bins (P, 5) and their Gaussian weights (P, 5), which sum to one.

    sigma 5 ab units; the nearest bin comes first (Zhang et al. 2016, section 2.2).
    """
    distance, nearest = torch.cdist(ab, bins).topk(NEIGHBOURS, dim=1, largest=False)
    return nearest, torch.softmax(-distance ** 2 / (2 * SIGMA ** 2), dim=1)


def all_stored_ab() -> torch.Tensor:
    """Every ab (65536, 2) that the arrays can hold; stored (a, b) is number 256*a + b."""
    return torch.cartesian_prod(torch.arange(256.0), torch.arange(256.0)) - 128


def bins_prior(histogram: np.ndarray, bins: torch.Tensor) -> torch.Tensor:
    """The bins' prior (Q,), smoothed by soft encoding, from counts (256, 256) of stored a and b."""
    nearest, weights = soft_encode(all_stored_ab(), bins)
    prior = torch.zeros(len(bins), dtype=torch.float64)
    counted = weights * torch.from_numpy(histogram).reshape(-1, 1)
    prior.index_add_(0, nearest.flatten(), counted.flatten().double())
    return (prior / prior.sum()).float()


def annealed_mean(logits: torch.Tensor, bins: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits (N, Q, H, W) to ab (N, 2, H, W): the mean of softmax(logits/T).

    T = 1 is the mean of the distribution, T -> 0 its mode (Zhang et al. 2016, eq. 5).
    """
    probability = torch.softmax(logits.float() / temperature, dim=1)
    return torch.einsum("nqhw,qc->nchw", probability, bins)


# --------------------------------------------------------------------------------- network

def encoder_levels(backbone: nn.Module, stages: int) -> list[tuple[str, int, int]]:
    """(node, channels, stride), finest first, of the last node before each change of stride.

    Found by a dry run, so that any convolutional classifier of torchvision will do; ends at stride
    2^(stages+1).
    """
    was_training = backbone.training
    try:
        nodes = get_graph_node_names(backbone)[1]
        with torch.no_grad():
            outputs = create_feature_extractor(backbone, nodes).eval()(torch.zeros(1, 3, 64, 64))
    except Exception:  # transformers, detectors: of many kinds, not to be traced or not at 64 x 64
        nodes, outputs = [], {}
    backbone.train(was_training)
    levels, stride = {}, 1
    for node in nodes[1:]:  # the first is the input itself
        shape = getattr(outputs[node], "shape", ())
        if len(shape) != 4 or shape[2] not in (64 // stride, 32 // stride):
            break
        stride = 64 // shape[2]
        if stride > 2 ** (stages + 1):
            break
        levels[stride] = node, shape[1], stride
    if stride < 2 ** (stages + 1):
        raise ColorizeError("--encoder: this network does not halve its resolution step by step; "
                            "use a resnet, a vgg or mobilenet_v2")
    return list(levels.values())


def conv_block(channels: int, width: int) -> nn.Sequential:
    """Two 3x3 convolutions with batch norm."""
    layers = []
    for n in (channels, width):
        layers += [nn.Conv2d(n, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
                   nn.ReLU(True)]
    return nn.Sequential(*layers)


def upsample(x: torch.Tensor, size) -> torch.Tensor:
    """Bilinear: with convolutions after it there are no checkerboards."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class ColorNet(nn.Module):
    """Encoder, decoder and head of a colorizer.

    encoder: a classifier of torchvision. decoder: unet (joins the encoder's skips), plain (none) or
    dense (skips, and all earlier stages through 1x1 convolutions). head: ab or bins. stages: 2, 3,
    4, the encoder ends at stride 8, 16, 32. classes: scene classes to tell besides. colors: bins
    (Q, 2), prior (Q,), temperature and saturation of a bins head; else a grid with an even prior.
    """

    def __init__(self, encoder: str = "resnet18", decoder: str = "unet", head: str = "ab",
                 stages: int = 4, classes: int = 0, colors: dict | None = None):
        super().__init__()
        self.arguments = {"encoder": encoder, "decoder": decoder, "head": head, "stages": stages,
                          "classes": classes}
        try:
            backbone = torchvision.models.get_model(encoder, weights=None)
        except (ValueError, OSError):  # a detector would fetch its backbone
            raise ColorizeError(f"--encoder {encoder}: torchvision has no such classifier; use a "
                                "resnet (resnet18), a vgg (vgg16_bn) or mobilenet_v2") from None
        levels = encoder_levels(backbone, stages)
        self.encoder = create_feature_extractor(backbone, [node for node, _, _ in levels])
        if head == "bins":
            colors = colors or {"bins": color_bins()}
            even = torch.full((len(colors["bins"]),), 1 / len(colors["bins"]))
            self.register_buffer("bins", colors["bins"], persistent=False)
            self.register_buffer("prior", colors.get("prior", even), persistent=False)
            self.temperature = colors.get("temperature", 1.0)
            self.saturation = colors.get("saturation", 1.0)

        *skips, (_, channels, stride) = levels
        width = WIDTHS[stride]
        self.bottleneck = conv_block(channels, width)
        self.context = nn.Linear(width, width)  # of the picture's mean: even areas get one colour
        self.blocks, seen = nn.ModuleList(), [width]
        for _, channels, stride in reversed(skips):
            if head == "bins" and stride < 4:
                break
            joined, width = seen[-1], WIDTHS[stride]
            joined += channels if decoder != "plain" else 0
            joined += SQUEEZED * (len(seen) - 1) if decoder == "dense" else 0
            self.blocks.append(conv_block(joined, width))
            seen.append(width)
        self.squeeze = nn.ModuleList(  # of what stages further up see of earlier ones
            nn.Conv2d(n, SQUEEZED, 1) for n in seen[:-2] if decoder == "dense")
        self.head = nn.Conv2d(width, len(self.bins) if head == "bins" else 2, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)  # an ab head starts gray, a bins head at the prior
        if head == "bins":
            self.head.bias.data.copy_(self.prior.clamp(min=1e-6).log())
        self.scenes = nn.Linear(levels[-1][1], classes) if classes else None
        for name, values in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, L: torch.Tensor, with_scenes: bool = False):
        """L (N, 1, H, W) to ab (N, 2, H, W) or logits (N, Q, ceil(H/4), ceil(W/4)).

        with_scenes: also the class logits (N, classes), or None.
        """
        height, width = L.shape[-2:]
        if min(height, width) < MIN_INPUT:
            right, below = max(MIN_INPUT - width, 0), max(MIN_INPUT - height, 0)
            L = F.pad(L, (0, right, 0, below), mode="replicate")
        levels = list(self.encoder(((L / 100) - self.mean) / self.std).values())
        x = self.bottleneck(levels[-1])
        x = x + F.relu(self.context(x.mean(dim=(2, 3))))[:, :, None, None]
        earlier = []
        for i, (block, skip) in enumerate(zip(self.blocks, reversed(levels[:-1]))):
            joined = [upsample(source, skip.shape[-2:]) for source in (x, *earlier)]
            if self.arguments["decoder"] != "plain":
                joined.append(skip)
            if i < len(self.squeeze):
                earlier.append(self.squeeze[i](x))
            x = block(torch.cat(joined, dim=1))
        output = self.head(x)
        if self.arguments["head"] == "bins":
            size = -(-L.shape[-2] // 4), -(-L.shape[-1] // 4)
            if output.shape[-2:] != size:  # encoders that round down
                output = upsample(output, size)
            output = output[..., :-(-height // 4), :-(-width // 4)]
        else:
            output = upsample(output.float(), L.shape[-2:])[..., :height, :width] * AB_SCALE
        if not with_scenes:
            return output
        return output, None if self.scenes is None else self.scenes(levels[-1].mean(dim=(2, 3)))

    def decode(self, output: torch.Tensor, size, temperature: float | None = None) -> torch.Tensor:
        """forward's output to ab in CIE units (N, 2, *size), float32; bins by the annealed mean."""
        if self.arguments["head"] == "ab":
            return output.float()
        ab = annealed_mean(output, self.bins, temperature or self.temperature) * self.saturation
        return upsample(ab, size)

    def predict(self, L: torch.Tensor, temperature: float | None = None) -> torch.Tensor:
        """L (N, 1, H, W) to ab in CIE units (N, 2, H, W), float32."""
        return self.decode(self(L), L.shape[-2:], temperature)


class Discriminator(nn.Module):
    """Real or made up, patch by patch, of Lab (N, 3, H, W) in CIE units (Isola et al. 2017)."""

    def __init__(self, width: int = 64):
        super().__init__()
        layers, channels = [], 3
        for n in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, n, 4, stride=2, padding=1, bias=False),
                       nn.BatchNorm2d(n), nn.LeakyReLU(0.2, True)]
            channels = n
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, L: torch.Tensor, ab: torch.Tensor, noise: torch.Tensor | float = 0.0):
        """Logits (N, 1, ~H/8, ~W/8). noise: added to the input, scaled to about -1..1."""
        return self.layers(torch.cat([L / 50 - 1, ab / AB_SCALE], dim=1) + noise)


def choose_device(device: str) -> torch.device:
    """auto: cuda, else mps, else cpu; ColorizeError where the one asked for is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if device == "auto":
        device = next(name for name in there if there[name])
    if not there[device]:
        raise ColorizeError(f"--device {device}: PyTorch finds none here; use --device cpu, "
                            "or install PyTorch for it")
    if device == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            raise ColorizeError(f"there are {torch.cuda.device_count()} GPUs; start no more ranks")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device(device)


def use_bf16(amp: str, device: torch.device) -> bool:
    """auto: bf16 where the hardware computes in it."""
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and \
        torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ----------------------------------------------------------------------------- checkpoints

def half_precision(weights: dict) -> dict:
    """Matrices and kernels in float16, vectors (batch norm, biases) in float32, on the CPU."""
    return {name: (w.half() if w.is_floating_point() and w.ndim > 1 else w).detach().cpu().clone()
            for name, w in weights.items()}


def save_checkpoint(path: Path, model: ColorNet, weights: dict | None = None, **extra) -> None:
    """Write a ColorNet as *.tar: `weights` (or its own) in half precision, its colours, extra keys.

    Extra are mean_ab, classes, training, resume. Written beside the target, fsync, renamed.
    """
    contents = {"format": 1, "written_by": VERSION, "model": model.arguments,
                "weights": half_precision(weights or model.state_dict()), **extra}
    if model.arguments["head"] == "bins":
        contents["colors"] = {"bins": model.bins.cpu(), "prior": model.prior.cpu(),
                              "temperature": float(model.temperature),
                              "saturation": float(model.saturation)}

    def write(temporary):
        try:
            with open(temporary, "wb") as file:
                torch.save(contents, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:  # torch's writer turns a failed write into one of these
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(str(error))
    write_atomically(Path(path), write)


def read_tensors(path: Path) -> dict:
    """torch.load with weights_only, so that nothing in the file is executed; or ColorizeError."""
    path = Path(path)
    if not path.is_file():
        raise ColorizeError(f"{path}: no such checkpoint; train one with: python main.py train")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = "Unsupported" in str(error)
        reason = "it holds objects that are not tensors" if unsafe else "it is damaged"
        raise ColorizeError(f"{path}: no checkpoint that is safe to load: {reason}; "
                            "name a .tar written by train") from None
    except Exception as error:
        raise ColorizeError(f"{path}: not a checkpoint, or damaged ({type(error).__name__}); "
                            "name a .tar written by train") from None
    if not isinstance(contents, dict):
        raise ColorizeError(f"{path}: not a checkpoint: it holds a {type(contents).__name__}")
    return contents


def check_contents(contents: dict) -> str:
    """What is wrong with a checkpoint's contents, or ""."""
    if contents.get("format") != 1:
        return (f"its format is {contents.get('format')!r}, not 1; train again, "
                "or update this program")
    model, weights, colors = (contents.get(key) for key in ("model", "weights", "colors"))
    expected = {"encoder": str, "decoder": str, "head": str, "stages": int, "classes": int}
    if not isinstance(model, dict) or {k: type(v) for k, v in model.items()} != expected:
        return "its key 'model' is not a ColorNet's arguments"
    if (model["decoder"] not in ("unet", "plain", "dense") or model["head"] not in ("ab", "bins")
            or model["stages"] not in (2, 3, 4) or not 0 <= model["classes"] <= 100_000):
        return "its key 'model' holds values out of range"
    if not (isinstance(weights, dict)
            and all(isinstance(w, torch.Tensor) for w in weights.values())):
        return "its key 'weights' is not a state dict"
    if model["head"] == "bins":
        if not isinstance(colors, dict) or not all(
                isinstance(colors.get(key), float) for key in ("temperature", "saturation")):
            return "its key 'colors' lacks bins, prior, temperature or saturation"
        bins, prior = colors.get("bins"), colors.get("prior")
        if not (isinstance(bins, torch.Tensor) and bins.ndim == 2 and bins.shape[1] == 2
                and isinstance(prior, torch.Tensor) and prior.shape == bins.shape[:1]
                and 2 <= len(bins) <= 4096 and bins.abs().max() <= 200
                and 0 < colors["temperature"] <= 10 and 0 <= colors["saturation"] <= 4):
            return "its key 'colors' holds values out of range"
    mean_ab = contents.get("mean_ab")
    if mean_ab is not None and getattr(mean_ab, "shape", None) != (101, 2):
        return "its key 'mean_ab' is not (101, 2)"
    return ""


def load_checkpoint(path: Path, device: str = "cpu") -> tuple[ColorNet, dict]:
    """The network of a checkpoint, float32, in eval mode, and the checkpoint's contents.

    Everything is checked before anything is built; raises ColorizeError with the reason.
    """
    contents = read_tensors(path)
    wrong = check_contents(contents)
    if wrong:
        raise ColorizeError(f"{path}: not a checkpoint that fits: {wrong}")
    colors = contents.get("colors") and {
        key: value.float() if isinstance(value, torch.Tensor) else value
        for key, value in contents["colors"].items()}
    model = ColorNet(**contents["model"], colors=colors)
    own = model.state_dict()
    for name in sorted(own.keys() | contents["weights"].keys()):
        shapes = [tuple(d[name].shape) if name in d else None for d in (own, contents["weights"])]
        if shapes[0] != shapes[1]:
            raise ColorizeError(f"{path}: not a checkpoint that fits: {name} is {shapes[1]}, "
                                f"not {shapes[0]}")
        if not contents["weights"][name].isfinite().all():
            raise ColorizeError(f"{path}: not a checkpoint that fits: {name} is not finite")
    model.load_state_dict({name: w.float() if w.is_floating_point() else w
                           for name, w in contents["weights"].items()})
    return model.to(device).eval(), contents


def starting_checkpoint(init: str, encoder: str) -> dict:
    """The contents of the checkpoint or encoder's state dict that --init means; {} for none.

    auto: the shipped checkpoint, if its encoder is the one asked for. Raises ColorizeError.
    """
    path = PRETRAINED if init == "auto" else Path(init)
    if init in ("imagenet", "none") or init == "auto" and not path.is_file():
        return {}
    contents = read_tensors(path)
    wrong = "model" in contents and check_contents(contents)  # a state dict has no such key
    if wrong:
        raise ColorizeError(f"--init {path}: not a checkpoint that fits: {wrong}")
    its = contents["model"]["encoder"] if "model" in contents else encoder
    if its != encoder and init != "auto":
        raise ColorizeError(f"--init {path}: its encoder is {its}, not {encoder}; "
                            f"add --encoder {its}")
    return contents if its == encoder else {}


def initialize(model: ColorNet, init: str, contents: dict) -> tuple[str, set[str]]:
    """Fill a fresh ColorNet with the weights of the same name and shape that --init means.

    contents: of its starting_checkpoint; where there is none, torchvision's ImageNet weights, or
    none. Returns what it starts from, in words, and the names that it filled. Raises ColorizeError.
    """
    encoder, source = model.arguments["encoder"], PRETRAINED if init == "auto" else init
    if not contents and init != "none":
        source = f"ImageNet's {encoder}"
        try:
            contents = torchvision.models.get_model(encoder, weights="DEFAULT").state_dict()
        except OSError as error:  # URLError is one
            say(f"the ImageNet weights of {encoder} cannot be fetched ({error}); "
                "starting from random weights; --init PATH takes a file")
    if not contents:
        return "random weights", set()
    weights = contents.get("weights") or {f"encoder.{name}": w for name, w in contents.items()}
    own = model.state_dict()
    matching = {name: w for name, w in weights.items()
                if name in own and isinstance(w, torch.Tensor) and w.shape == own[name].shape}
    if not matching:
        raise ColorizeError(f"--init {source}: none of its tensors fits a ColorNet with {encoder}; "
                            "name a checkpoint, or a state dict of the encoder")
    model.load_state_dict(own | {name: w.to(own[name].dtype) for name, w in matching.items()})
    return f"{source} ({len(matching)} of {len(own)} tensors)", set(matching)
