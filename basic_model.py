"""The network: colour bins, torchvision encoder, decoder; devices, ranks; checkpoints.

ColorNet maps L (N, 1, H, W), 0..100, to ab in CIE units (head "ab") or to logits over
colour bins at a quarter of the resolution (head "bins"); predict gives ab for either.
"""

import io
import os
import pickletools
import zipfile
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import distributed, nn
from torch.nn import functional as F
from torchvision.models import feature_extraction
from torchvision.ops import Conv2dNormActivation

from photo import VERSION, ColorizeError, in_gamut, write_atomically

AB_SCALE = 110.0  # the ab head's raw output, and the losses, are ab/110
MIN_INPUT = 32    # pixels; smaller inputs are padded, so that stride 32 has one place
BIN_STEP = 10     # ab units (Zhang et al. 2016)
NEIGHBOURS, SIGMA = 5, 5.0  # of the soft encoding, sigma in ab units (the same, 2.2)
# torchvision's classifiers that halve their resolution step by step and fetch no parts
ENCODERS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vgg11",
            "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn",
            "mobilenet_v2", "densenet121", "efficientnet_b0", "resnext50_32x4d")
DECODERS = ("unet", "plain")
# of ColorNet's arguments, in checkpoints too
CHOICES = {"encoder": ENCODERS, "decoder": DECODERS, "head": ("ab", "bins"),
           "stages": (2, 3, 4)}
# the decoder's channels at each stride, the same for any encoder: for bins about as much
# work as a ResNet-18, most of it where colours are decided (strides 8 and 4)
WIDTHS = {32: 384, 16: 256, 8: 192, 4: 128, 2: 48, 1: 24}
LAUNCHED = distributed.is_torchelastic_launched()  # else a stray RANK would wait for ever
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1  # torchrun starts so many ranks,
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # and numbers them
PRETRAINED = Path(__file__).resolve().parent / "checkpoints" / "pretrained.tar"
FORMAT = 3        # of *.tar; 2 told classes of scenes besides colours
# bounds on strangers' files; ours have 0.1 MB beside their tensors, and dicts 7 deep
MAX_TEXT, MAX_VALUES, MAX_DEPTH = 8_000_000, 1_000_000, 10


# ------------------------------------------------------------------------------ colour bins

def color_bins() -> torch.Tensor:
    """Centres (Q, 2) of the cells of 10 ab units that hold a colour of sRGB."""
    grid = np.arange(-110, 111, BIN_STEP, dtype=np.float32)
    offsets = np.linspace(-BIN_STEP / 2, BIN_STEP / 2, 5, dtype=np.float32)  # in a cell
    # a cell counts if any of 5 x 5 colours in it can be shown at any lightness
    a, b, da, db = np.meshgrid(grid, grid, offsets, offsets, indexing="ij")
    ab, held = np.stack([a + da, b + db], axis=-1), np.zeros(a.shape[:2], bool)
    for L in np.arange(1, 100, dtype=np.float32):
        held |= in_gamut(np.full(a.shape, L), ab).any(axis=(2, 3))
    return torch.from_numpy(np.stack([a[..., 0, 0], b[..., 0, 0]], axis=-1)[held])


def soft_encode(ab: torch.Tensor, bins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ab (P, 2) to its 5 nearest bins (P, 5), nearest first, and their weights (P, 5)."""
    # Gaussian, in sum one (Zhang et al. 2016, section 2.2)
    distance, nearest = torch.cdist(ab, bins).topk(NEIGHBOURS, dim=1, largest=False)
    return nearest, torch.softmax(-distance ** 2 / (2 * SIGMA ** 2), dim=1)


def all_stored_ab() -> torch.Tensor:
    """Every ab (65536, 2) that the arrays can hold; stored (a, b) is number 256*a + b."""
    return torch.cartesian_prod(torch.arange(256.0), torch.arange(256.0)) - 128


def bins_prior(histogram: np.ndarray, bins: torch.Tensor) -> torch.Tensor:
    """The bins' prior (Q,) from counts (256, 256) of stored a and b, softly encoded."""
    nearest, weights = soft_encode(all_stored_ab(), bins)
    counted = weights * torch.from_numpy(histogram).reshape(-1, 1)
    prior = torch.zeros(len(bins), dtype=torch.float64)  # counts are beyond float32
    prior.index_add_(0, nearest.flatten(), counted.flatten().double())
    return (prior / prior.sum()).float()


def annealed_mean(logits: torch.Tensor, bins: torch.Tensor, temperature: float):
    """Logits (N, Q, H, W) to ab (N, 2, H, W): their mean after softmax(logits/T)."""
    # T = 1 is the mean of the distribution, T -> 0 its mode (Zhang et al. 2016, eq. 5)
    probability = torch.softmax(logits.float() / temperature, dim=1)
    return torch.einsum("nqhw,qc->nchw", probability, bins)


# ---------------------------------------------------------------------------------- network

def encoder_levels(backbone: nn.Module, stages: int) -> list[tuple[str, int, int]]:
    """(node, channels, stride) of the last node of each stride, up to 2^(stages+1)."""
    # found by a dry run, so that no encoder needs code by name
    nodes = feature_extraction.get_graph_node_names(backbone)[1]
    extractor = feature_extraction.create_feature_extractor(backbone, nodes).eval()
    with torch.no_grad():
        outputs = extractor(torch.zeros(1, 3, 64, 64))
    backbone.train()  # as it came; the extractor shares its layers
    levels = {}
    for node in nodes[1:]:  # the first is the input itself
        shape = outputs[node].shape
        stride = 64 // shape[-1] if len(shape) == 4 else 0  # of the classifier, none
        if max(levels, default=1) <= stride <= 2 ** (stages + 1):
            levels[stride] = node, shape[1], stride  # the last of a stride stays
    return list(levels.values())


def conv_block(channels: int, width: int) -> nn.Sequential:
    """Two 3x3 convolutions with batch norm and ReLU."""
    return nn.Sequential(*Conv2dNormActivation(channels, width),
                         *Conv2dNormActivation(width, width))


def upsample(x: torch.Tensor, size) -> torch.Tensor:
    """Bilinear: with convolutions after it there are no checkerboards."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class ColorNet(nn.Module):
    """Encoder, decoder and head of a colorizer; CHOICES lists what its arguments may be.

    decoder: unet joins the encoder's skips, plain does not. stages: 2, 3, 4, the encoder
    ends at stride 8, 16, 32. colors: bins (Q, 2), prior (Q,), temperature and saturation
    of a bins head; else a grid with an even prior.
    """

    def __init__(self, encoder: str = "resnet18", decoder: str = "unet", head: str = "ab",
                 stages: int = 4, colors: dict | None = None):
        super().__init__()
        self.arguments = {"encoder": encoder, "decoder": decoder, "head": head,
                          "stages": stages}
        if encoder not in ENCODERS:
            raise ColorizeError(f"--encoder {encoder}: choose one of {', '.join(ENCODERS)}")
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
        for _, skip, stride in reversed(skips):
            if head == "bins" and stride < 4:
                break  # colours are classified at a quarter of the resolution
            joined = width + (skip if decoder == "unet" else 0)
            width = WIDTHS[stride]
            self.blocks[str(stride)] = conv_block(joined, width)
        self.head = nn.Conv2d(width, len(self.bins) if head == "bins" else 2, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)  # an ab head starts gray, a bins head at the prior
        if head == "bins":
            self.head.bias.data.copy_(self.prior.clamp(min=1e-6).log())
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
        x = self.bottleneck(levels[-1])  # (N, width, H/32, W/32) with four stages
        x = x + F.relu(self.context(x.mean(dim=(2, 3))))[:, :, None, None]
        # a bins head has no blocks for the finest skips: zip ends with the blocks
        for block, skip in zip(self.blocks.values(), reversed(levels[:-1])):
            x = upsample(x, skip.shape[-2:])  # twice as large, more or less
            if self.arguments["decoder"] == "unet":
                x = torch.cat([x, skip], dim=1)  # what pooling lost of outlines
            x = block(x)
        output, (height, width) = self.head(x), size
        padded = max(height, MIN_INPUT), max(width, MIN_INPUT)
        if self.arguments["head"] == "ab":
            return upsample(output.float(), padded)[..., :height, :width] * AB_SCALE
        quarter = [-(-side // 4) for side in padded]
        if list(output.shape[-2:]) != quarter:  # encoders that round down
            output = upsample(output, quarter)
        return output[..., :-(-height // 4), :-(-width // 4)]

    def forward(self, L: torch.Tensor) -> torch.Tensor:
        """L (N, 1, H, W) to ab (N, 2, H, W) or logits (N, Q, ceil(H/4), ceil(W/4))."""
        return self.color(self.encode(L), L.shape[-2:])

    def decode(self, output: torch.Tensor, size) -> torch.Tensor:
        """forward's output to ab in CIE units (N, 2, *size), float32."""
        if self.arguments["head"] == "ab":
            return output.float()
        # a mean is duller than what it is the mean of
        ab = annealed_mean(output, self.bins, self.temperature) * self.saturation
        return upsample(ab, size)

    def predict(self, L: torch.Tensor) -> torch.Tensor:
        """L (N, 1, H, W) to ab in CIE units (N, 2, H, W), float32, from one pass."""
        return self.decode(self(L), L.shape[-2:])


class Discriminator(nn.Module):
    """Whether patches of Lab in CIE units are real (PatchGAN, Isola et al. 2017)."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for n in (64, 128, 256):
            layers += [nn.Conv2d(channels, n, 4, stride=2, padding=1, bias=False),
                       nn.BatchNorm2d(n), nn.LeakyReLU(0.2, True)]  # the paper's slope
            channels = n
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, L: torch.Tensor, ab: torch.Tensor) -> torch.Tensor:
        """Logits (N, 1, ~H/8, ~W/8); the input is scaled to about -1..1."""
        return self.layers(torch.cat([L / 50 - 1, ab / AB_SCALE], dim=1))


# ------------------------------------------------------------- devices, ranks, checkpoints

def all_ranks(value) -> list:
    """The value that each rank has, in their order; every rank must ask."""
    values = [value] * WORLD
    if WORLD > 1:
        distributed.all_gather_object(values, value)
    return values


def choose_device(device: str) -> torch.device:
    """auto: cuda, else mps, else cpu; ColorizeError where the one named is not there."""
    kinds = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    there = [name for name, kind in kinds.items() if kind.is_available()]
    device = there[0] if device == "auto" else device
    if device not in there:
        raise ColorizeError(f"--device {device}: PyTorch finds none here; use --device cpu")
    if device != "cuda":
        return torch.device(device)
    index = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0  # of those on this machine
    if index >= torch.cuda.device_count():
        raise ColorizeError(f"only {torch.cuda.device_count()} GPUs; start fewer ranks")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def use_bf16(amp: str, device: torch.device) -> bool:
    """auto: bf16 where the hardware computes in it; elsewhere it is emulated, and slow."""
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and \
        torch.ops.mkldnn._is_mkldnn_bf16_supported()


def save_checkpoint(path: Path, model: ColorNet, weights: dict | None = None, **extra):
    """Write a ColorNet as *.tar: `weights` (or its own), its colours, and the extra keys.

    Extra are mean_ab, training, resume. Raises ColorizeError where a weight is not finite.
    """
    weights = {  # matrices and kernels in half precision; batch norm and biases need more
        name: (w.half() if w.is_floating_point() and w.ndim > 1 else w).cpu().clone()
        for name, w in (weights or model.state_dict()).items()}
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
        buffer = io.BytesIO()  # torch writing the file itself hides why a disk refused
        torch.save(contents, buffer)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name, empty
    write_atomically(Path(path), write)


def check_archive(path: Path) -> None:
    """Raise anything if reading a file of torch.save would take more than its size."""
    with open(path, "rb") as file:
        start = file.read(1_000_000)
    if start[:4] == b"PK\3\4":  # a zip; torch.save compresses nothing, a bomb does
        archive = zipfile.ZipFile(path)
        text = sum(i.file_size for i in archive.infolist() if "/data/" not in i.filename)
        total = sum(i.file_size for i in archive.infolist())
        # torch.load would take changed weights as they come; the zip has their CRC
        if text > MAX_TEXT or total > os.path.getsize(path) or archive.testzip():
            raise ValueError
    else:  # before PyTorch 1.6, as some of torchvision's: five pickles, then the tensors
        pickles = io.BytesIO(start)
        for _ in range(5):
            list(pickletools.genops(pickles))  # raises if it does not end in there


def read_tensors(path: Path) -> dict:
    """A file of torch.save, a dict, read without running anything in it; ColorizeError."""
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "no such checkpoint"
        raise ColorizeError(f"{path}: {what}; name a .tar that train wrote")
    try:
        check_archive(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(contents, dict) or not is_bounded(contents):
            raise ValueError
    except Exception:  # damaged and hostile files end in many kinds
        raise ColorizeError(f"{path}: not a checkpoint, or one that is damaged or not safe "
                            "to load; name a .tar that train wrote") from None
    return contents


def is_bounded(contents: dict) -> bool:
    """Whether its lists and dicts come to an end, and its tensors hold what they claim."""
    level = [contents]
    for _ in range(MAX_DEPTH):  # not by recursion: a list can lie in a list in a list ...
        inner = (value.values() if isinstance(value, dict) else value
                 for value in level if isinstance(value, (dict, list, tuple)))
        # in a few bytes one list can lie a million times in another
        level = list(islice(chain.from_iterable(inner), MAX_VALUES))
        tensors = [value for value in level if isinstance(value, torch.Tensor)]
        if len(level) == MAX_VALUES or not all(
                w.is_cpu and not w.is_nested
                and (w.is_floating_point() or w.dtype == torch.int64)
                # an expanded view claims more than the file holds
                and not w.requires_grad and w.nbytes <= w.untyped_storage().nbytes()
                for w in tensors):
            return False
    return not level


def is_within(value, shape: tuple, low: float, high: float) -> bool:
    """Whether a tensor is float32, of this shape, all within low..high (nan is not)."""
    return (value.dtype == torch.float32 and value.shape == shape
            and bool(((value >= low) & (value <= high)).all()))


def are_colors(bins, prior, temperature, saturation) -> bool:
    """Whether a checkpoint's colours are bins (Q, 2), their prior (Q,) and two numbers."""
    return (2 <= len(bins) <= 4096 and is_within(bins, (len(bins), 2), -200, 200)
            and is_within(prior, (len(bins),), 0, 1)
            and isinstance(temperature, float) and 0.01 <= temperature <= 10
            and isinstance(saturation, float) and 0 <= saturation <= 4)


CHECKS = {  # of a checkpoint c, by key; by type, since a tensor compares by element
    "format": lambda c: type(c["format"]) is int and c["format"] == FORMAT,
    "model": lambda c: c["model"].keys() == CHOICES.keys() and all(
        type(x) in (str, int) and x in CHOICES[name] for name, x in c["model"].items()),
    "weights": lambda c: isinstance(c["weights"], dict),
    "colors": lambda c: (are_colors(**c["colors"]) if "colors" in c
                         else c["model"]["head"] == "ab"),
    "mean_ab": lambda c: "mean_ab" not in c or is_within(c["mean_ab"], (101, 2), -200, 200)}


def read_checkpoint(path: Path, contents: dict | None = None) -> dict:
    """The contents of a checkpoint, checked but for its weights; raises ColorizeError."""
    contents = contents or read_tensors(path)  # or as they were read before
    for key, fits in CHECKS.items():
        try:
            good = fits(contents)
        except Exception:  # a stranger's value may be of any kind
            good = False
        if not good:
            raise ColorizeError(f"{path}: its key '{key}' is not what train {VERSION} "
                                "writes there; name another checkpoint, or train again")
    return contents


def take_weights(model: ColorNet, weights: dict, source: str | Path) -> set[str]:
    """Load those of the model's names and shapes, and tell which; ColorizeError for nan."""
    taken = set()
    for name, own in model.state_dict().items():  # no copies: own is the model's
        w = weights.get(name)
        if isinstance(w, torch.Tensor) and w.shape == own.shape:
            taken.add(name)
            own.copy_(w)
            low = 0 if name.endswith("running_var") else -torch.inf
            if not (own.isfinite() & (own >= low)).all():
                raise ColorizeError(f"{source}: {name} is not finite, or a negative "
                                    "variance; name another checkpoint")
    return taken


def load_checkpoint(path: Path, device: str = "cpu") -> tuple[ColorNet, dict]:
    """The network of a checkpoint, float32, in eval mode, and its contents, all checked."""
    contents = read_checkpoint(Path(path))
    model = ColorNet(**contents["model"], colors=contents.get("colors"))
    taken = take_weights(model, contents["weights"], path)
    odd = (model.state_dict().keys() | contents["weights"].keys()) - taken
    if odd:
        raise ColorizeError(f"{path}: its key 'weights' is not of its network, as at "
                            f"{min(map(str, odd)):.80}; name another checkpoint, or take "
                            "back what was changed in ColorNet since")
    return model.to(device).eval(), contents


def starting_point(init: str, encoder: str) -> tuple[str, dict]:
    """What --init means: the start in words, and a checkpoint's contents or weights alone.

    {} for random weights. Raises ColorizeError for what cannot be had or does not fit.
    """
    if init == "none":
        return "random weights", {}
    path = PRETRAINED if init == "auto" else Path(init)
    if init != "imagenet" and (init != "auto" or path.is_file()):
        contents = read_tensors(path)
        if "format" not in contents:  # a state dict, as torchvision publishes them
            return str(path), {"weights": {f"encoder.{n}": w for n, w in contents.items()}}
        its = read_checkpoint(path, contents)["model"]["encoder"]
        if its == encoder:
            return str(path), contents
        if init != "auto":
            raise ColorizeError(f"--init {path}: its encoder is {its}, not {encoder}; "
                                f"add --encoder {its}")
    # imagenet was asked for, or the shipped one has another encoder
    try:
        backbone = torchvision.models.get_model(encoder, weights="DEFAULT")
    except OSError:  # URLError is one
        raise ColorizeError(f"--init {init}: ImageNet's weights of {encoder} cannot be "
                            "fetched; write --init PATH of a .pth of them, or --init "
                            "none") from None
    weights = {f"encoder.{name}": w for name, w in backbone.state_dict().items()}
    return f"ImageNet's {encoder}", {"weights": weights}


def initialize(model: ColorNet, source: str, contents: dict) -> set[str]:
    """Fill a fresh ColorNet from a starting_point; which tensors, or ColorizeError."""
    taken = take_weights(model, contents.get("weights", {}), f"--init {source}")
    if contents and not taken:
        raise ColorizeError(f"--init {source}: none of its tensors fits a ColorNet with "
                            f"{model.arguments['encoder']}; name a checkpoint, or the "
                            "encoder's state dict")
    return taken
