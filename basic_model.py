"""The network: colour bins, a torchvision encoder with a decoder; devices; checkpoints.

ColorNet maps L (N, 1, H, W), 0..100, to ab in CIE units (head "ab") or to logits over
colour bins at a quarter of the resolution (head "bins"); predict gives ab for either.
"""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models import feature_extraction

from photo import VERSION, ColorizeError, in_gamut, write_atomically

AB_SCALE = 110.0     # the ab head's raw output, and the losses, are ab/110
MIN_INPUT = 32       # pixels; smaller inputs are padded, so that stride 32 has one place
BIN_STEP = 10        # ab units (Zhang et al. 2016)
NEIGHBOURS, SIGMA = 5, 5.0  # of the soft encoding (Zhang et al. 2016, section 2.2)
# what --encoder and a checkpoint may name: classifiers of torchvision that halve their
# resolution step by step and fetch nothing by themselves
ENCODERS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vgg11",
            "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn",
            "mobilenet_v2", "densenet121", "efficientnet_b0", "resnext50_32x4d")
DECODERS = ("unet", "plain")
# the decoder's channels at each stride, the same for any encoder: for bins about as much
# work as a ResNet-18, most of it where colours are decided (strides 8 and 4)
WIDTHS = {32: 384, 16: 256, 8: 192, 4: 128, 2: 48, 1: 24}
PRETRAINED = Path(__file__).resolve().parent / "checkpoints" / "pretrained.tar"


# ------------------------------------------------------------------------------ colour bins

def color_bins() -> torch.Tensor:
    """Centres (Q, 2) of the cells of 10 ab units that hold a colour of sRGB."""
    grid = np.arange(-110, 111, BIN_STEP, dtype=np.float32)
    offsets = np.linspace(-BIN_STEP / 2, BIN_STEP / 2, 5, dtype=np.float32)
    # a cell counts if any of 5 x 5 colours in it can be shown at any lightness
    a, b, da, db = np.meshgrid(grid, grid, offsets, offsets, indexing="ij")
    ab = np.stack([a + da, b + db], axis=-1)
    held = np.zeros(a.shape[:2], bool)
    for L in np.arange(1, 100, dtype=np.float32):
        held |= in_gamut(np.full(a.shape, L), ab).any(axis=(2, 3))
    return torch.from_numpy(np.stack([a[..., 0, 0], b[..., 0, 0]], axis=-1)[held])


def soft_encode(ab: torch.Tensor, bins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ab (P, 2) to its 5 nearest bins (P, 5) and their Gaussian weights (P, 5), in sum one.

    sigma 5 ab units; the nearest bin comes first (Zhang et al. 2016, section 2.2).
    """
    distance, nearest = torch.cdist(ab, bins).topk(NEIGHBOURS, dim=1, largest=False)
    return nearest, torch.softmax(-distance ** 2 / (2 * SIGMA ** 2), dim=1)


def all_stored_ab() -> torch.Tensor:
    """Every ab (65536, 2) that the arrays can hold; stored (a, b) is number 256*a + b."""
    return torch.cartesian_prod(torch.arange(256.0), torch.arange(256.0)) - 128


def bins_prior(histogram: np.ndarray, bins: torch.Tensor) -> torch.Tensor:
    """The bins' prior (Q,) from counts (256, 256) of stored a and b, softly encoded."""
    nearest, weights = soft_encode(all_stored_ab(), bins)
    prior = torch.zeros(len(bins), dtype=torch.float64)
    counted = weights * torch.from_numpy(histogram).reshape(-1, 1)
    prior.index_add_(0, nearest.flatten(), counted.flatten().double())
    return (prior / prior.sum()).float()


def annealed_mean(logits: torch.Tensor, bins: torch.Tensor,
                  temperature: float) -> torch.Tensor:
    """Logits (N, Q, H, W) to ab (N, 2, H, W): the mean of softmax(logits/T).

    T = 1 is the mean of the distribution, T -> 0 its mode (Zhang et al. 2016, eq. 5).
    """
    probability = torch.softmax(logits.float() / temperature, dim=1)
    return torch.einsum("nqhw,qc->nchw", probability, bins)


# ---------------------------------------------------------------------------------- network

def encoder_levels(backbone: nn.Module, stages: int) -> list[tuple[str, int, int]]:
    """(node, channels, stride) of the last node before each change of stride, finest first.

    Found by a dry run, so that no encoder needs code by name; ends at stride 2^(stages+1).
    """
    was_training = backbone.training
    nodes = feature_extraction.get_graph_node_names(backbone)[1]
    with torch.no_grad():
        extractor = feature_extraction.create_feature_extractor(backbone, nodes).eval()
        outputs = extractor(torch.zeros(1, 3, 64, 64))
    backbone.train(was_training)
    levels, stride = {}, 1
    for node in nodes[1:]:  # the first is the input itself
        shape = outputs[node].shape
        if len(shape) != 4 or shape[2] not in (64 // stride, 32 // stride):
            break  # the classifier begins
        stride = 64 // shape[2]
        if stride > 2 ** (stages + 1):
            break
        levels[stride] = node, shape[1], stride  # the last of a stride stays
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

    encoder: one of ENCODERS. decoder: unet (joins the encoder's skips) or plain (none).
    head: ab or bins. stages: 2, 3, 4, the encoder ends at stride 8, 16, 32. classes: scene
    classes to tell besides. colors: bins (Q, 2), prior (Q,), temperature and saturation of
    a bins head; else a grid with an even prior.
    """

    def __init__(self, encoder: str = "resnet18", decoder: str = "unet", head: str = "ab",
                 stages: int = 4, classes: int = 0, colors: dict | None = None):
        super().__init__()
        self.arguments = {"encoder": encoder, "decoder": decoder, "head": head,
                          "stages": stages, "classes": classes}
        for flag, known in (("encoder", ENCODERS), ("decoder", DECODERS)):
            if self.arguments[flag] not in known:
                raise ColorizeError(f"--{flag} {self.arguments[flag]}: choose one of "
                                    + ", ".join(known))
        backbone = torchvision.models.get_model(encoder, weights=None)
        levels = encoder_levels(backbone, stages)
        self.encoder = feature_extraction.create_feature_extractor(
            backbone, [node for node, _, _ in levels])
        if head == "bins":
            colors = colors or {"bins": color_bins()}
            even = torch.full((len(colors["bins"]),), 1 / len(colors["bins"]))
            # not in the state dict: a checkpoint keeps them under a key of their own
            self.register_buffer("bins", colors["bins"], persistent=False)
            self.register_buffer("prior", colors.get("prior", even), persistent=False)
            self.temperature = colors.get("temperature", 1.0)
            self.saturation = colors.get("saturation", 1.0)

        *skips, (_, channels, stride) = levels
        width = WIDTHS[stride]
        self.bottleneck = conv_block(channels, width)
        self.context = nn.Linear(width, width)  # of the picture's mean, for every place
        # keyed by stride: a network of another depth has the same stage under the same name
        self.blocks = nn.ModuleDict()
        for _, channels, stride in reversed(skips):
            if head == "bins" and stride < 4:
                break  # colours are classified at a quarter of the resolution
            joined = width + (channels if decoder == "unet" else 0)
            width = WIDTHS[stride]
            self.blocks[str(stride)] = conv_block(joined, width)
        self.head = nn.Conv2d(width, len(self.bins) if head == "bins" else 2, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)  # an ab head starts gray, a bins head at the prior
        if head == "bins":
            self.head.bias.data.copy_(self.prior.clamp(min=1e-6).log())
        self.scenes = nn.Linear(levels[-1][1], classes) if classes else None
        # ImageNet's, since the encoder was trained with them
        for name, rgb in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
            self.register_buffer(name, torch.tensor(rgb).view(1, 3, 1, 1), persistent=False)

    def encode(self, L: torch.Tensor) -> list[torch.Tensor]:
        """L (N, 1, H, W) to the encoder's features, (N, C, H/stride, W/stride) each."""
        right, below = (max(MIN_INPUT - side, 0) for side in (L.shape[-1], L.shape[-2]))
        if right or below:
            L = F.pad(L, (0, right, 0, below), mode="replicate")
        # one gray channel, broadcast to the three that the encoder knows
        return list(self.encoder((L / 100 - self.mean) / self.std).values())

    def color(self, levels: list[torch.Tensor], size) -> torch.Tensor:
        """encode's features to what forward gives for a photograph of size (H, W)."""
        x = self.bottleneck(levels[-1])
        x = x + F.relu(self.context(x.mean(dim=(2, 3))))[:, :, None, None]
        for block, skip in zip(self.blocks.values(), reversed(levels[:-1])):
            x = upsample(x, skip.shape[-2:])  # twice as large, more or less
            if self.arguments["decoder"] == "unet":
                x = torch.cat([x, skip], dim=1)
            x = block(x)
        height, width = size
        padded = max(height, MIN_INPUT), max(width, MIN_INPUT)
        output = self.head(x)
        if self.arguments["head"] == "ab":
            return upsample(output.float(), padded)[..., :height, :width] * AB_SCALE
        quarter = [-(-side // 4) for side in padded]
        if list(output.shape[-2:]) != quarter:  # encoders that round down
            output = upsample(output, quarter)
        return output[..., :-(-height // 4), :-(-width // 4)]

    def forward(self, L: torch.Tensor, with_scenes: bool = False):
        """L (N, 1, H, W) to ab (N, 2, H, W) or logits (N, Q, ceil(H/4), ceil(W/4)).

        with_scenes: also the class logits (N, classes), or None.
        """
        levels = self.encode(L)
        output = self.color(levels, L.shape[-2:])
        if not with_scenes:
            return output
        scenes = self.scenes and self.scenes(levels[-1].mean(dim=(2, 3)))
        return output, scenes

    def decode(self, output: torch.Tensor, size) -> torch.Tensor:
        """forward's output to ab in CIE units (N, 2, *size), float32."""
        if self.arguments["head"] == "ab":
            return output.float()
        ab = annealed_mean(output, self.bins, self.temperature) * self.saturation
        return upsample(ab, size)

    def predict(self, L: torch.Tensor) -> torch.Tensor:
        """L (N, 1, H, W) to ab in CIE units (N, 2, H, W), float32, from one pass."""
        return self.decode(self(L), L.shape[-2:])


class Discriminator(nn.Module):
    """Real or made up, patch by patch, of Lab in CIE units (PatchGAN, Isola et al.
    2017)."""

    def __init__(self, width: int = 64):
        super().__init__()
        layers, channels = [], 3
        for n in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, n, 4, stride=2, padding=1, bias=False),
                       nn.BatchNorm2d(n), nn.LeakyReLU(0.2, True)]
            channels = n
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, L: torch.Tensor, ab: torch.Tensor) -> torch.Tensor:
        """Logits (N, 1, ~H/8, ~W/8); the input is scaled to about -1..1."""
        return self.layers(torch.cat([L / 50 - 1, ab / AB_SCALE], dim=1))


# ---------------------------------------------------------------------------------- devices

def choose_device(device: str) -> torch.device:
    """auto: cuda, else mps, else cpu; ColorizeError where the one named is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if device == "auto":
        device = next(name for name in there if there[name])
    if not there[device]:
        raise ColorizeError(f"--device {device}: PyTorch finds none here; use --device cpu")
    if device == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0))  # torchrun gives each rank a number
        if index >= torch.cuda.device_count():
            raise ColorizeError(f"only {torch.cuda.device_count()} GPUs; start fewer ranks")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device(device)


def use_bf16(amp: str, device: torch.device) -> bool:
    """auto: bf16 where the hardware computes in it; elsewhere it is emulated, and slow."""
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and \
        torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ------------------------------------------------------------------------------ checkpoints

FORMAT = 2           # of *.tar; 1 numbered the decoder's blocks instead of their strides
MAX_TEXT = 16e6      # bytes of a checkpoint without its tensors; ours have 0.1 million
MAX_WORD = 10_000    # characters of a name or a remark in it
MAX_ITEMS = 1_000_000  # of all its lists and dicts
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64}


def half_precision(weights: dict) -> dict:
    """Matrices and kernels in float16, the rest (batch norm, biases) as it is, on the
    CPU."""
    return {name: (w.half() if w.is_floating_point() and w.ndim > 1 else w).cpu().clone()
            for name, w in weights.items()}


def save_checkpoint(path: Path, model: ColorNet, weights: dict | None = None,
                    **extra) -> None:
    """Write a ColorNet as *.tar: `weights` (or its own), its colours, and the extra keys.

    Extra are mean_ab, classes, training, resume. Written beside the target, fsync, renamed.
    ColorizeError where a weight is not finite in half precision, or it cannot be written.
    """
    weights = half_precision(weights or model.state_dict())
    bad = [name for name, w in weights.items() if not w.isfinite().all()]
    if bad:
        raise ColorizeError(f"{path}: not written: {bad[0]} is not finite; "
                            "train with a lower --lr, or --amp off")
    contents = {"format": FORMAT, "written_by": VERSION, "model": model.arguments,
                "weights": weights, **extra}
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
        except RuntimeError as error:  # what torch's writer makes of a failed write
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(str(error))
    write_atomically(Path(path), write)


def read_tensors(path: Path) -> dict:
    """A file of torch.save as a dict of tensors and plain values; nothing in it is
    executed.

    Raises ColorizeError. What it takes in memory is bounded by the file's size.
    """
    path, remedy = Path(path), "name a .tar written by train"
    if path.is_dir():
        raise ColorizeError(f"{path}: is a folder; name the .tar in it")
    if not path.is_file():
        raise ColorizeError(f"{path}: no such checkpoint; make one: python main.py train")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                records = archive.infolist()
            # torch.save does not compress; a bomb does
            text = sum(i.file_size for i in records if "/data/" not in i.filename)
            if text > MAX_TEXT or any(i.compress_type for i in records):
                raise ValueError
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = "Unsupported" in str(error)
        reason = "it holds objects that are not tensors" if unsafe else "it is damaged"
        raise ColorizeError(f"{path}: no checkpoint that is safe to load: {reason}; "
                            + remedy) from None
    except Exception:  # a damaged file ends in many kinds
        raise ColorizeError(f"{path}: not a checkpoint, or damaged; {remedy}") from None
    if not isinstance(contents, dict) or not is_plain(contents):
        raise ColorizeError(f"{path}: not a checkpoint: it holds something else than "
                            f"tensors, numbers and words; {remedy}")
    return contents


def is_plain(contents) -> bool:
    """Whether it is made of dense tensors, numbers, short words, lists and dicts."""
    waiting, seen = [(contents, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, (dict, list, tuple)):
            inner = [*value, *value.values()] if isinstance(value, dict) else value
            seen += len(inner) + 1  # a few bytes can hold one list a million times over
            if depth > 8 or seen > MAX_ITEMS:
                return False
            waiting += [(item, depth + 1) for item in inner]
        elif isinstance(value, torch.Tensor):
            # an expanded view claims more than the file holds
            if (value.layout != torch.strided or value.device.type != "cpu" or value.is_nested
                    or value.is_quantized or value.dtype not in DTYPES
                    or value.nbytes > value.untyped_storage().nbytes()):
                return False
        elif isinstance(value, str):
            if len(value) > MAX_WORD:
                return False
        elif value is not None and not isinstance(value, (bool, int, float)):
            return False
    return True


def what_is_wrong(contents: dict) -> str:
    """What is wrong with a checkpoint's contents, but for the weights' shapes; or ""."""
    version = contents.get("format")
    if type(version) is not int or version != FORMAT:  # tensors compare by element
        return f"its format is not {FORMAT}; train again, or use the program that wrote it"
    model, weights, colors = (contents.get(key) for key in ("model", "weights", "colors"))
    kinds = {"encoder": str, "decoder": str, "head": str, "stages": int, "classes": int}
    if not isinstance(model, dict) or {k: type(v) for k, v in model.items()} != kinds:
        return "its key 'model' is not a ColorNet's arguments"
    if (model["encoder"] not in ENCODERS or model["decoder"] not in DECODERS
            or model["head"] not in ("ab", "bins") or model["stages"] not in (2, 3, 4)
            or not 0 <= model["classes"] <= 100_000):
        return "its key 'model' holds values out of range"
    if not isinstance(weights, dict) or not all(
            isinstance(name, str) and len(name) < 200 and isinstance(w, torch.Tensor)
            for name, w in weights.items()):
        return "its key 'weights' is not a state dict"
    for name, w in weights.items():
        if not w.isfinite().all() or name.endswith("running_var") and (w < 0).any():
            return f"{name} is not finite, or a negative variance"
    if model["head"] == "bins" and not colors_fit(colors):
        return "its key 'colors' lacks bins, prior, temperature or saturation, or is odd"
    mean_ab = contents.get("mean_ab", torch.zeros(101, 2))
    if not isinstance(mean_ab, torch.Tensor) or mean_ab.shape != (101, 2) \
            or not mean_ab.isfinite().all():
        return "its key 'mean_ab' is not (101, 2)"
    for key, kind in (("classes", list), ("training", dict), ("resume", dict)):
        if not isinstance(contents.get(key, kind()), kind):
            return f"its key '{key}' is no {kind.__name__}"
    return ""


def colors_fit(colors) -> bool:
    """Whether a checkpoint's colours are bins (Q, 2), prior (Q,), temperature,
    saturation."""
    if not isinstance(colors, dict):
        return False
    bins, prior, *factors = (colors.get(key) for key in (
        "bins", "prior", "temperature", "saturation"))
    return (isinstance(bins, torch.Tensor) and bins.ndim == 2 and bins.shape[1] == 2
            and isinstance(prior, torch.Tensor) and prior.shape == bins.shape[:1]
            and 2 <= len(bins) <= 4096 and bool(bins.abs().max() <= 200)  # nan is not
            and bool(prior.isfinite().all()) and bool(prior.min() >= 0)
            and all(isinstance(factor, float) for factor in factors)
            and 0.01 <= factors[0] <= 10 and 0 <= factors[1] <= 4)


def read_checkpoint(path: Path) -> dict:
    """The contents of a checkpoint, checked; ColorizeError says what is wrong."""
    contents = read_tensors(path)
    wrong = what_is_wrong(contents)
    if wrong:
        raise ColorizeError(f"{path}: not a checkpoint that fits: {wrong}")
    return contents


def load_checkpoint(path: Path, device: str = "cpu") -> tuple[ColorNet, dict]:
    """The network of a checkpoint, float32, in eval mode, and the checkpoint's contents.

    Everything is checked before anything is built; raises ColorizeError with the reason.
    """
    contents = read_checkpoint(path)
    colors = contents.get("colors") and {
        key: value.float() if isinstance(value, torch.Tensor) else value
        for key, value in contents["colors"].items()}
    model = ColorNet(**contents["model"], colors=colors)
    own, weights = model.state_dict(), contents["weights"]
    for name in sorted(own.keys() | weights.keys()):
        has, needs = (tuple(d[name].shape) if name in d else None for d in (weights, own))
        if has != needs:
            raise ColorizeError(f"{path}: not a checkpoint that fits: {name} is {has}, "
                                f"not {needs}")
    model.load_state_dict({name: w.to(own[name].dtype) for name, w in weights.items()})
    return model.to(device).eval(), contents


def starting_checkpoint(init: str, encoder: str) -> dict:
    """The contents of the checkpoint or encoder's state dict of --init; {} for none.

    auto: the shipped checkpoint, if its encoder is the one asked for. Raises ColorizeError.
    """
    path = PRETRAINED if init == "auto" else Path(init)
    if init in ("imagenet", "none") or init == "auto" and not path.is_file():
        return {}
    contents = read_tensors(path)
    if "model" not in contents and "format" not in contents:
        return contents  # an encoder's state dict, as torchvision publishes them
    contents = read_checkpoint(path)
    its = contents["model"]["encoder"]
    if its != encoder and init != "auto":
        raise ColorizeError(f"--init {path}: its encoder is {its}, not {encoder}; "
                            f"add --encoder {its}")
    return contents if its == encoder else {}


def initialize(model: ColorNet, init: str, contents: dict) -> tuple[str, set[str]]:
    """Fill a fresh ColorNet with the weights of the same name and shape that --init means.

    contents: of its starting_checkpoint; where there is none, torchvision's ImageNet
    weights. Returns what it starts from, in words, and the names it filled. Raises
    ColorizeError.
    """
    encoder, source = model.arguments["encoder"], PRETRAINED if init == "auto" else init
    if not contents and init != "none":
        source = f"ImageNet's {encoder}"
        try:
            contents = torchvision.models.get_model(encoder, weights="DEFAULT").state_dict()
        except OSError:  # URLError is one
            raise ColorizeError(
                f"--init {init}: the ImageNet weights of {encoder} cannot be fetched; name "
                "a file: --init PATH, or start from random weights: --init none") from None
    if not contents:
        return "random weights", set()
    weights = contents.get("weights") or {f"encoder.{k}": w for k, w in contents.items()}
    own = model.state_dict()
    matching = {name: w.to(own[name].dtype) for name, w in weights.items() if name in own
                and isinstance(w, torch.Tensor) and w.shape == own[name].shape}
    if not matching or not all(w.isfinite().all() for w in matching.values()):
        raise ColorizeError(f"--init {source}: none of its tensors fits a ColorNet with "
                            f"{encoder}, or they are not finite; name a checkpoint, or a "
                            "state dict of the encoder")
    model.load_state_dict(own | matching)
    return f"{source} ({len(matching)} of {len(own)} tensors)", set(matching)
