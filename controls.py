"""What moves colours after the network: likeness, variants, moods, reference, hints.

All act on the prediction at working resolution, before it is brought to full size: on the
distribution over colours where the network gives one (bins), else on ab itself.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor, ImageFilter
from torch.nn import functional as F

from photo import (ColorizeError, FlagError, into_gamut, lightness, read_photo, rgb_to_lab,
                   working_copy)

# how far a hint spreads, found by eye on textured photographs
HINT_SIGMA = 0.02     # difference of lightness (0..1) that counts as an edge; twice leaks
HINT_PULL = 3e-3      # of a place to what it should be: colours blend over some 20 pixels
HINT_LIKE = 0.05, 0.1  # likeness to a hint from which, and at which, a place belongs
HINT_UNLIKE = 20.0    # deviation in L from its hint that a pixel of an object may have
HINT_RADIUS = 2.5     # pixels of the disc that a hint fixes, at working resolution
DAB_CHROMA = 14       # ab units by which a dab differs; JPEG's noise is less
DAB_LIGHTNESS = 12    # L units by which a gray dab does
# how alike places are, exp(-d^2/2): lightness, distance over the long side, features of
# length 1; by measurement: wider pales flowers, narrower leaves spots on walls
LIKE_L, LIKE_DISTANCE, LIKE_FEATURES = 10.0, 0.4, 0.45
MAX_HINTS, MAX_PLACES = 200, 4096  # points cost time; a likeness matrix has 64 MB
# a variant tilts each place's colours by about this share of the standard deviation of its
# own distribution, not at all where that is under 6 ab units: skin, sky, grass are known
VARIANT_TILT, VARIANT_CERTAIN, VARIANT_OPEN = 0.5, 6.0, 14.0
VARIANT_ROUNDS = 10   # of the likeness: after these an object has one colour
# of a mood's way: with more the few things that are uncertain glow, with none all is tinted
TILTED = 0.3


class Controls(NamedTuple):
    """What is wanted of the colours, in plain numbers; the neutral ones change no bit."""
    saturation: float = 1.0
    shift: tuple[float, float] | None = None   # of the mean ab
    target: tuple[float, float] | None = None  # the mean ab itself
    spread: float | None = None                # rms of ab about its mean, of a reference
    strength: float = 1.0                      # of variant, shift, target and spread
    variant: int = 0                           # seed of another colouring; 0 for none
    hints: tuple = ()                          # (x, y, a, b) each, pixels of the photograph
    dabs: Image.Image | None = None            # a copy with colours dabbed on it


# mean ab to add, chosen by eye: a shift of 8 is seen at a glance, one of 16 is a tint
MOODS = {
    "warm": Controls(1.05, shift=(3, 8)),
    "cool": Controls(0.95, shift=(-3, -8)),
    "golden": Controls(1.15, shift=(5, 14)),    # an hour before sunset
    "moonlight": Controls(0.6, shift=(0, -13)),  # the eye sees few colours then, blue ones
    "vintage": Controls(0.7, shift=(4, 7)),     # a faded print of the sixties
    "muted": Controls(0.6),
    "vivid": Controls(1.5),
    "sepia": Controls(0.15, shift=(5, 16)),     # the brown of toned prints
}


# -------------------------------------------------------------------------------- the flags

def hex_to_ab(text: str, flag: str) -> tuple[float, float]:
    """ab of "#rrggbb"."""
    try:
        # numpy refuses what passes Pillow: rgb(300,0,0)
        rgb = np.array(ImageColor.getrgb(text.strip())[:3], np.uint8)
    except (ValueError, OverflowError):
        raise FlagError(f"{flag}: '{text.strip()}' is no colour; write #rrggbb") from None
    return tuple(rgb_to_lab(rgb)[1:].tolist())


def read_mean_color(text: str) -> tuple[float, float]:
    """--mean_color: "#rrggbb" or "a,b"."""
    if text.count(",") != 1:
        return hex_to_ab(text, "--mean_color")
    try:
        a, b = map(float, text.split(","))
    except ValueError:
        a = b = np.nan
    if not max(abs(a), abs(b)) <= 128:  # nor is nan
        raise FlagError(f"--mean_color {text}: write #rrggbb, or a,b within -128..128")
    return a, b


def read_hints(text: str) -> tuple[tuple, Image.Image | None]:
    """--hints "x,y,#rrggbb; ...", a .txt of these, or a dabbed copy: points and copy."""
    path, known = Path(text), {".txt", *Image.registered_extensions()}
    if "," not in text or path.suffix.lower() in known:  # points end in a colour
        if path.suffix.lower() != ".txt":
            picture, alpha, *_ = read_photo(path)
            alpha = alpha or Image.new("L", picture.size, 255)
            return (), Image.merge("RGBA", [*picture.convert("RGB").split(), alpha])
        try:
            if not path.is_file() or path.stat().st_size > 1e6:  # a pipe never ends
                raise OSError
            text = path.read_text(encoding="utf-8-sig").replace("\n", ";")
        except (OSError, ValueError):
            raise ColorizeError(f"--hints {path}: no UTF-8 text file under 1 MB") from None
    hints = []
    for point in filter(str.strip, text.split(";")):
        try:
            x, y, color = point.split(",", 2)
            hints.append((int(x), int(y), *hex_to_ab(color, "--hints")))
        except ValueError:
            raise FlagError(f"--hints '{point.strip()}': write x,y,#rrggbb") from None
    if not 1 <= len(hints) <= MAX_HINTS:
        raise FlagError(f"--hints {path.name:.40}: holds {len(hints)} points x,y,#rrggbb; "
                        f"give 1 to {MAX_HINTS}, or dab on a copy")
    return tuple(hints), None


def read_controls(mood: str | None = None, mean_color: str | None = None,
                  reference: str | None = None, strength: float = 1.0,
                  saturation: float | None = None, hints: str | None = None,
                  variant: int = 0) -> Controls:
    """The colour flags as Controls; FlagError where they contradict each other."""
    flags = {"mood": mood, "mean_color": mean_color, "reference": reference}
    given = [f"--{name}" for name, value in flags.items() if value is not None]
    if len(given) > 1:  # each names the mean colour
        raise FlagError(f"{' and '.join(given)} contradict each other: give one")
    if strength != 1 and not given and not variant:
        raise FlagError(f"--strength is that of --{', --'.join(flags)} or --variant")
    if mood not in (None, *MOODS):
        raise FlagError(f"--mood {mood}: choose one of {', '.join(MOODS)}")
    bundle, spread = MOODS.get(mood, Controls()), None
    target = None if mean_color is None else read_mean_color(mean_color)
    if reference is not None:
        small = working_copy(read_photo(Path(reference)).image, 128).convert("RGB")
        ab = rgb_to_lab(np.asarray(small))[..., 1:]
        target = tuple(ab.mean(axis=(0, 1)).tolist())
        spread = float(np.linalg.norm(ab.std(axis=(0, 1))))  # rms distance from the mean
    if saturation is None:  # an explicit one overrides a mood's own, which strength scales
        saturation = 1 + strength * (bundle.saturation - 1)
    return Controls(saturation, bundle.shift, target, spread, strength, variant,
                    *(read_hints(hints) if hints else ((), None)))


# ----------------------------------------------------------------------------- alike places

def resize(planes: np.ndarray, shape: tuple, mode: str = "bilinear") -> np.ndarray:
    """Planes (C, h, w) at another shape, (C, *shape), float32; mode "area": their means."""
    planes = torch.from_numpy(np.asarray(planes, np.float32))[None]
    smooth = mode == "bilinear"  # antialiased, where it reduces
    return F.interpolate(planes, tuple(shape), mode=mode, antialias=smooth)[0].numpy()


def likeness_of(L: np.ndarray, levels: list[torch.Tensor]) -> tuple[np.ndarray, tuple]:
    """How alike the places of a coarse grid are, (P, P), rows in sum one; the grid's shape.

    L: (h, w); levels: the encoder's features, (1, C, h/stride, w/stride) each.
    """
    cell = max(8.0, np.sqrt(L.size / MAX_PLACES))  # a place is 8 x 8 pixels, or more
    places = tuple(max(int(side / cell), 1) for side in L.shape)
    gray = torch.from_numpy(resize(L[None], places, "area")).flatten()[:, None]     # (P, 1)
    where = torch.cartesian_prod(*map(torch.arange, places)) / max(places)       # (P, 2)
    exponent = torch.cdist(gray, gray) ** 2 / (2 * LIKE_L ** 2)
    exponent += torch.cdist(where, where) ** 2 / (2 * LIKE_DISTANCE ** 2)
    for level in levels:
        if round(L.shape[1] / level.shape[-1]) in (8, 16):  # strides that know objects
            features = F.interpolate(level.float().cpu(), places, mode="bilinear")
            features = F.normalize(features[0].flatten(1).T, dim=1)              # (P, C)
            exponent += torch.cdist(features, features) ** 2 / (2 * LIKE_FEATURES ** 2)
    return torch.softmax(-exponent, dim=1).numpy(), places


def agree(values: np.ndarray, likeness: np.ndarray, places: tuple) -> np.ndarray:
    """values (C, h, w) with the mean over alike places in place of their own.

    What each coarse place differs from that mean is taken away, so that detail stays.
    """
    coarse = resize(values, places, "area").reshape(len(values), -1)                # (C, P)
    change = coarse @ likeness.T - coarse  # to the weighted mean of all places
    return values + resize(change.reshape(-1, *places), values.shape[1:])


# --------------------------------------------------------------------------------- variants

def random_field(likeness: np.ndarray, seed: int) -> np.ndarray:
    """A random direction in ab for each place (P, 2), the same where places are alike."""
    field = np.random.default_rng([seed, 7]).standard_normal((len(likeness), 2), np.float32)
    for _ in range(VARIANT_ROUNDS):
        field = likeness @ field  # each place takes the mean over those like it
        field = (field - field.mean(axis=0)) / max(field.std(), 1e-6)
    return field


def vary(logits: np.ndarray, bins: np.ndarray, likeness: np.ndarray, places: tuple,
         temperature: float, controls: Controls) -> np.ndarray:
    """Another plausible colouring: logits (Q, h, w), whole objects tilted at random."""
    shape = logits.shape[1:]
    field = random_field(likeness, controls.variant).T.reshape(2, *places)
    # the spread of ab of the distribution that makes the colour, at each place
    annealed = torch.softmax(torch.from_numpy(logits) / temperature, dim=0).numpy()
    mean = np.einsum("qhw,qc->chw", annealed, bins)      # (2, h, w)
    square = np.einsum("qhw,q->hw", annealed, (bins ** 2).sum(axis=1))
    deviation = np.sqrt(np.maximum(square - (mean ** 2).sum(axis=0), 1.0))
    # 0 where the network is certain, 1 where it is open; between them a smooth step
    free = np.interp(deviation, (VARIANT_CERTAIN, VARIANT_OPEN), (0, 1))
    free = free * free * (3 - 2 * free)
    # a tilt lambda moves a mean by covariance . lambda: this one by about VARIANT_TILT
    # deviations; alike places by the same, or a wall would be spotted
    gain = resize((free / deviation)[None], places, "area").flatten()
    gain = resize((likeness @ gain).reshape(1, *places), shape)[0]
    gain = np.minimum(gain, free / VARIANT_CERTAIN)
    by = controls.strength * VARIANT_TILT * gain * np.clip(resize(field, shape), -2, 2)
    tilted = logits + temperature * np.einsum("chw,qc->qhw", by, bins)
    # colours under 5 % of the likeliest are not what a tilt may bring up
    likely = logits > logits.max(axis=0) - 3
    unlikely = logits - 20 * controls.strength * free  # as they were where certain
    return np.where(likely, tilted, unlikely).astype(np.float32)


# -------------------------------------------------------------------- mean colour and moods

def tilt(probability: np.ndarray, colors: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Move the mean colour of distributions by the smallest change in relative entropy.

    probability (P, Q), colors (Q, 2), target (2,): p'(q) ~ p(q) exp(lambda . c_q), one
    lambda for all P: where the convex mean log-partition - lambda . target is least, whose
    gradient is mean - target. Returns p'; out of reach: the nearest found.
    """
    log_p = torch.from_numpy(probability).double().clamp(min=1e-30).log()
    colors, target = torch.from_numpy(colors).double(), torch.from_numpy(target).double()
    vector = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    # 7 to 10 evaluations, where the target can be reached
    optimizer = torch.optim.LBFGS([vector], max_iter=30, tolerance_grad=1e-3,
                                  line_search_fn="strong_wolfe")

    def value():
        optimizer.zero_grad()  # the gradient comes by backward, by autograd
        partition = torch.logsumexp(log_p + colors @ vector, dim=1).mean()
        # the last term keeps lambda under 0.4, where no tilt reaches the target
        result = partition - vector @ target + 500 * (vector @ vector) ** 2
        result.backward()
        return result
    optimizer.step(value)
    return torch.softmax(log_p + colors @ vector.detach(), dim=1).numpy()


def shift(ab: np.ndarray, L: np.ndarray, target: np.ndarray) -> np.ndarray:
    """ab (h, w, 2), its mean moved to the target (2,), by nothing at black and white."""
    fade = np.clip(4 * (L / 100) * (1 - L / 100), 0, 1)[..., None]  # 1 at middle gray
    by = (target - ab.mean(axis=(0, 1))) / max(fade.mean(), 1e-3)
    return ab + fade * by.astype(np.float32)


def reach_mean(move, L: np.ndarray, target: np.ndarray) -> np.ndarray:
    """move(asked) -> ab (h, w, 2), asked so that the mean in gamut is the target (2,).

    Gamut takes some of a mean away: up to 5 rounds ask for what is missing on top.
    """
    asked, best, nearest = np.array(target, np.float64), None, np.inf
    for _ in range(6):
        ab = move(asked)
        missing = target - into_gamut(L, ab).mean(axis=(0, 1))
        if np.linalg.norm(missing) < nearest:
            nearest, best = np.linalg.norm(missing), ab
        if nearest < 0.1:  # ab units: nobody sees it
            break
        asked = asked + missing
    return best


def apply_controls(prediction: np.ndarray, L: np.ndarray, colors: np.ndarray | None,
                   controls: Controls) -> tuple[np.ndarray, np.ndarray | None]:
    """ab (h, w, 2) and the mean ab wanted, or None: saturation, then reference, mean, mood.

    prediction: probabilities (Q, h/4, w/4) of colors (Q, 2), or ab (2, h, w) and None.
    """
    def decode(values, factor):
        planes = values if colors is None else np.einsum("qhw,qc->chw", values, colors)
        return resize(planes, L.shape).transpose(1, 2, 0) * factor

    factor = controls.saturation
    plain = decode(prediction, factor)
    if not controls.strength or controls.shift is None and controls.target is None:
        return plain, None
    present = into_gamut(L, plain)
    if controls.spread is not None:  # a reference's: stretched to it, within reason
        own = np.linalg.norm(present.std(axis=(0, 1)))
        ratio = np.clip(controls.spread / max(own, 1e-3), 0.25, 4)
        factor = np.float32(factor * ratio ** controls.strength)
    mean = present.mean(axis=(0, 1))
    goal = mean + np.array(controls.shift) if controls.shift else np.array(controls.target)
    wanted = mean + controls.strength * (goal - mean)

    def move(asked):
        values = prediction
        if colors is not None and factor >= 0.3:  # in sepia there is too little to tilt
            part = mean + TILTED * (asked - mean)
            values = tilt(values.reshape(len(values), -1).T, colors * factor, part).T
            values = values.reshape(prediction.shape).astype(np.float32)
        return shift(decode(values, factor), L, asked)
    return reach_mean(move, L, wanted), wanted


# ------------------------------------------------------------------------------------ hints

def fixed_points(hints: tuple, image: Image.Image, L: np.ndarray) -> tuple:
    """Which pixels of L (h, w) the hints fix, (h, w) bool, and their ab (h, w, 2).

    hints: (x, y, a, b) in pixels of the photograph `image`, of which L is the working copy.
    What is like a hint in a disc around it: not across an outline of two sigma.
    """
    height, width = L.shape
    row, column = np.mgrid[:height, :width]
    fixed, wanted = np.zeros(L.shape, bool), np.zeros((height, width, 2), np.float32)
    nearest = np.full(L.shape, np.inf)  # where discs overlap the nearer hint holds
    for x, y, *ab in hints:
        if not (0 <= x < image.width and 0 <= y < image.height):
            raise FlagError(f"--hints: {x},{y} is outside the photograph, which is "
                            f"{image.width}x{image.height}; the origin is the top left")
        x, y = x * width // image.width, y * height // image.height
        distance = (column - x) ** 2 + (row - y) ** 2
        disc = (distance <= HINT_RADIUS ** 2) & (distance < nearest)
        disc &= np.abs(L - L[y, x]) <= 200 * HINT_SIGMA
        fixed[disc], wanted[disc], nearest[disc] = True, ab, distance[disc]
    return fixed, wanted


def fixed_dabs(dabs: Image.Image, image: Image.Image, shape: tuple) -> tuple:
    """Which pixels of a working copy are dabbed, (h, w) bool, and their ab (h, w, 2).

    dabs: a copy of the photograph `image`, of any size, with colours painted on (Levin et
    al. 2004), or these on a clear layer. What differs in chroma, or clearly in L, is one.
    """
    if abs(dabs.width / dabs.height * image.height / image.width - 1) > 0.02:
        raise FlagError(f"--hints: the dabbed picture is {dabs.width}x{dabs.height}, not "
                        f"of the photograph's shape {image.width}x{image.height}")
    scale = min(1.0, 2 * max(shape) / max(dabs.size))  # more would only cost time
    size = [max(round(side * scale), 1) for side in dabs.size]
    dabs = dabs.convert("RGBA").resize(size, Image.Resampling.BOX)
    photo = working_copy(image, max(size)).convert("RGB").resize(size)  # not under `size`
    copy = Image.alpha_composite(photo.convert("RGBA"), dabs).convert("RGB")
    gray = photo.convert("L").convert("RGB")  # the copy may have been made so: no dab
    lab, truth, grayed = (rgb_to_lab(np.asarray(x)) for x in (copy, photo, gray))
    chroma, light = (np.minimum(*(np.linalg.norm((lab - other)[..., part], axis=-1)
                                  for other in (truth, grayed)))
                     for part in (np.s_[1:], np.s_[:1]))
    painted = (chroma > DAB_CHROMA) | (light > DAB_LIGHTNESS)
    # eroded by a pixel: noise and blurred outlines go, strokes keep their core
    core = np.asarray(Image.fromarray(painted.astype(np.uint8) * 255).filter(
        ImageFilter.MinFilter(3))) > 0
    share, *ab = resize([core, lab[..., 1] * core, lab[..., 2] * core], shape)
    fixed, wanted = share > 0.5, np.stack(ab, axis=-1) / np.maximum(share, 1e-3)[..., None]
    if not fixed.any():
        raise FlagError("--hints: no dab found; paint broad strokes on a copy of the "
                        "photograph, over a hundredth of its width")
    return fixed, wanted


def belonging(L: np.ndarray, fixed: np.ndarray, wanted: np.ndarray, likeness: np.ndarray,
              places: tuple) -> tuple[np.ndarray, np.ndarray]:
    """How much each pixel is of the hinted objects, 0..1 (h, w), and their ab (2, h, w).

    fixed, wanted: of fixed_points or fixed_dabs. likeness (P, P): of the coarse places.
    """
    share = resize(fixed[None].astype(np.float32), places, "area").flatten()
    hinted = share > 0
    known = np.stack([*wanted.transpose(2, 0, 1), L]) * fixed
    known = resize(known, places, "area").reshape(3, -1)[:, hinted] / share[hinted]
    # (P, hinted), over the diagonal: 1 for a place itself, less with every difference
    alike = likeness[:, hinted] / np.diag(likeness)[:, None]
    # of two hints the one more alike decides: the power makes the choice firm
    weight = (alike / alike.max(axis=1, keepdims=True).clip(1e-30) + 1e-3) ** 6
    mixed = weight @ known.T / weight.sum(axis=1, keepdims=True)                 # (P, 3)
    *colors, its_L = resize(mixed.T.reshape(3, *places), L.shape)
    # the root, as an object varies more in itself than the network's neighbours do
    member = np.interp(np.sqrt(alike.max(axis=1)), HINT_LIKE, (0, 1))
    member = resize(member.reshape(1, *places), L.shape)[0]
    # places are coarse: a bright rim on a dark thing is not of it
    return member * np.exp(-((L - its_L) / HINT_UNLIKE) ** 2 / 2), np.stack(colors)


def propagate_hints(L: np.ndarray, ab: np.ndarray, fixed: np.ndarray, wanted: np.ndarray,
                    likeness: np.ndarray, places: tuple) -> np.ndarray:
    """Spread the colours `wanted` (h, w, 2) of pixels `fixed` (h, w) over their objects.

    Minimizes sum w_rs (d_r - d_s)^2 + HINT_PULL sum (d - t)^2 over neighbours r, s for d,
    the difference from the prediction ab (h, w, 2), given where fixed: w_rs = exp(-(L_r -
    L_s)^2 / 2 sigma^2), at least 1e-6, lets colours meet at outlines; t is what makes the
    places that belong to the hints their colour, and nothing elsewhere. After Levin,
    Lischinski and Weiss 2004, in a form that is solved in time, by conjugate gradients.
    """
    member, colors = belonging(L, fixed, wanted, likeness, places)
    ab = ab.transpose(2, 0, 1)
    target = member * (colors - ab)
    free = 1 - fixed.astype(np.float32)
    d = np.where(fixed, wanted.transpose(2, 0, 1) - ab, target).astype(np.float32)
    down, right = (np.exp(-np.diff(L / 100, axis=axis) ** 2
                          / (2 * HINT_SIGMA ** 2)).clip(min=1e-6) for axis in (0, 1))
    total = HINT_PULL + (
        np.pad(down, ((0, 1), (0, 0))) + np.pad(down, ((1, 0), (0, 0)))
        + np.pad(right, ((0, 0), (0, 1))) + np.pad(right, ((0, 0), (1, 0))))

    def gradient(d):  # of half of the sum but for the target; zero where d is fixed
        result = HINT_PULL * d
        for axis, weight in ((1, down), (2, right)):  # what flows in less what flows out
            flow = weight * np.diff(d, axis=axis)
            result -= np.diff(flow, axis=axis, prepend=0, append=0)
        return free * result
    residual = free * HINT_PULL * target - gradient(d)  # what is still to be made up for
    direction, power, enough = 0, np.float32(1), None
    for _ in range(1000):  # a few dozen are enough; scaled by the diagonal, a beside b
        scaled = residual / total
        last, power = power, (residual * scaled).sum(axis=(1, 2), keepdims=True)
        enough = 1e-9 * power.max() if enough is None else enough  # 0.1 ab units from exact
        if power.max() <= enough:
            break
        direction = scaled + power / np.maximum(last, 1e-30) * direction
        product = gradient(direction)
        curvature = (direction * product).sum(axis=(1, 2), keepdims=True)
        rate = power / np.maximum(curvature, 1e-30)
        d += rate * direction
        residual -= rate * product
    return (ab + d).transpose(1, 2, 0)


def hint_correction(image: Image.Image, upsample, hints: tuple, scale: float):
    """A function that gives hints' pixels exactly their colours, and what is like these.

    scale: pixels of the photograph for one of the network's. By radial basis functions.
    """
    if not hints:
        return lambda L, colors, top: None
    rows = [lightness(image.crop((0, y, image.width, y + 1))) for _, y, *_ in hints]
    now = np.stack([upsample(row, y)[0, x] for row, (x, y, *_) in zip(rows, hints)])
    at = np.array([(x, y, row[0, x]) for row, (x, y, *_) in zip(rows, hints)], np.float64)
    wanted, unlike = np.array([ab for _, _, *ab in hints]), 141 * HINT_SIGMA  # 100 sqrt 2
    # of all pairs: squared distances in the plane; in lightness, by that of an edge
    apart = ((at[:, None, :2] - at[:, :2]) ** 2).sum(axis=-1)
    steps = ((at[:, None, 2] - at[:, 2]) / unlike) ** 2
    # no wider than to the nearest other: fitted to each other, wide bumps would overshoot
    radius = np.sqrt(apart[apart > 0]).min(initial=HINT_RADIUS * max(scale, 1.0))
    bumps = np.exp(-apart / radius ** 2 - steps)
    # by least squares: equal places asked twice get the mean
    amounts = np.linalg.lstsq(bumps, wanted - now, rcond=1e-6)[0].astype(np.float32)

    def correct(L, colors, top):  # in place; L (rows, W) from row `top` on
        x, y = np.arange(L.shape[1]), np.arange(top, top + len(L))[:, None]
        for (hx, hy, hL), amount in zip(at, amounts):
            near = np.abs(y[:, 0] - hy) <= 3 * radius  # further off it is next to nothing
            distance = ((x - hx) ** 2 + (y[near] - hy) ** 2) / radius ** 2
            weight = np.exp(-distance - ((L[near] - hL) / unlike) ** 2)
            colors[near] += weight[..., None].astype(np.float32) * amount
    return correct
