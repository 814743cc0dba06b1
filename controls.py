"""What moves colours after the network: moods, the mean colour, a reference, hints.

All act on the network's prediction at working resolution, before it is brought to full size.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor

from basic_model import ColorNet, upsample
from photo import (FlagError, into_gamut, lightness, read_photo, rgb_to_lab, spread_of,
                   working_copy)

HINT_SIGMA, HINT_MU = 0.02, 1e-4  # of the hints' spreading: L difference in 0..1; pull to zero


class Controls(NamedTuple):
    """What is wanted of the colours, in plain numbers; the neutral ones change no bit."""
    saturation: float = 1.0
    vividness: float = 1.0
    shift: tuple[float, float] | None = None   # of the mean ab
    target: tuple[float, float] | None = None  # the mean ab itself
    spread: float | None = None                # rms of ab about its mean, of a reference
    strength: float = 1.0
    hints: tuple = ()                          # (x, y, a, b) each


MOODS = {
    "warm": Controls(1.05, shift=(3, 8)),
    "cool": Controls(0.95, shift=(-3, -8)),
    "golden": Controls(1.15, shift=(5, 14)),
    "moonlight": Controls(0.6, shift=(0, -13)),
    "vintage": Controls(0.7, shift=(4, 7)),
    "muted": Controls(0.6),
    "vivid": Controls(1.5),
    "sepia": Controls(0.15, shift=(5, 16)),
}


def hex_to_ab(text: str, flag: str) -> tuple[float, float]:
    """ab of "#rrggbb"."""
    try:
        red, green, blue = ImageColor.getrgb(text.strip())[:3]
    except ValueError:
        raise FlagError(f"{flag}: '{text.strip()}' is no colour; write #rrggbb") from None
    return tuple(rgb_to_lab(np.array([red, green, blue], np.uint8))[1:].tolist())


def read_mean_color(text: str) -> tuple[float, float]:
    """--mean_color: "#rrggbb" or "a,b"."""
    if "," not in text:
        return hex_to_ab(text, "--mean_color")
    try:
        a, b = (float(part) for part in text.split(","))
        if abs(a) <= 128 and abs(b) <= 128:  # nan is not
            return a, b
    except ValueError:
        pass
    raise FlagError(f"--mean_color {text}: write #rrggbb, or a,b, both within -128..128")


def read_hints(text: str) -> tuple:
    """--hints "x,y,#rrggbb; ..." as (x, y, a, b) each."""
    hints = []
    for part in filter(str.strip, text.split(";")):
        try:
            x, y, color = part.split(",", 2)
            x, y = int(x), int(y)
        except ValueError:
            raise FlagError(f"--hints '{part.strip()}': write x,y,#rrggbb; x,y,#rrggbb") from None
        hints.append((x, y, *hex_to_ab(color, "--hints")))
    return tuple(hints)


def read_controls(mood=None, mean_color=None, reference=None, strength=1.0, saturation=None,
                  vividness=None, hints=None) -> Controls:
    """The colour flags as Controls; FlagError for contradictions and values out of range."""
    flags = {"mood": mood, "mean_color": mean_color, "reference": reference}
    given = [f"--{name}" for name, value in flags.items() if value is not None]
    if len(given) > 1:
        raise FlagError(f"{' and '.join(given)} contradict each other: give one")
    if strength != 1 and not given:
        raise FlagError("--strength is that of --mood, --mean_color or --reference: give one")
    for name, value, low, high in (("strength", strength, 0, 1), ("saturation", saturation, 0, 4),
                                   ("vividness", vividness, 0.1, 10)):
        if value is not None and not low <= value <= high:
            raise FlagError(f"--{name} {value:g}: must be {low:g}..{high:g}")
    if mood is not None and mood not in MOODS:
        raise FlagError(f"--mood {mood}: choose one of {', '.join(MOODS)}")
    bundle = MOODS[mood] if mood else Controls()
    target, spread = None if mean_color is None else read_mean_color(mean_color), None
    if reference is not None:
        small = working_copy(read_photo(Path(reference)).image, 128).convert("RGB")
        ab = rgb_to_lab(np.asarray(small))[..., 1:]
        target, spread = tuple(ab.mean(axis=(0, 1)).tolist()), spread_of(ab)
    return Controls(  # explicit flags override a mood's own, which strength scales
        1 + strength * (bundle.saturation - 1) if saturation is None else saturation,
        1.0 if vividness is None else vividness,
        bundle.shift, target, spread, strength, read_hints(hints or ""))


def apply_controls(model: ColorNet, prediction: np.ndarray, L: np.ndarray,
                  controls: Controls) -> tuple[np.ndarray, np.ndarray | None]:
    """ab (h, w, 2) and the mean ab wanted, or None, from predict's for one photograph L (h, w).

    The order: (vividness is in the prediction,) saturation, then reference, mean or mood.
    """
    bins = model.arguments["head"] == "bins"
    colors = model.bins.cpu().numpy() * model.saturation if bins else None

    def decode(values, factor):
        ab = torch.from_numpy(values)[None]
        if colors is not None:
            ab = upsample(torch.einsum("nqhw,qc->nchw", ab, torch.from_numpy(colors)), L.shape)
        return (ab[0].permute(1, 2, 0) * factor).numpy()
    factor = controls.saturation
    plain = decode(prediction, factor)
    if not controls.strength or controls.shift is None and controls.target is None:
        return plain, None
    present = into_gamut(L, plain)
    if controls.spread is not None:
        ratio = np.clip(controls.spread / max(spread_of(present), 1e-3), 0.25, 4)
        factor = factor * float(ratio) ** controls.strength
    mean = present.mean(axis=(0, 1))
    goal = mean + np.array(controls.shift) if controls.shift else np.array(controls.target)
    wanted = mean + controls.strength * (goal - mean)
    tilting = colors is not None and factor >= 0.3  # under that little is left to tilt: a tint
    return move_mean(prediction, L, colors * factor if tilting else None,
                     lambda values: decode(values, factor), wanted), wanted


def move_mean(prediction: np.ndarray, L: np.ndarray, colors: np.ndarray | None,
              decode, target: np.ndarray) -> np.ndarray:
    """ab (h, w, 2) whose mean, once in gamut, is the target (2,) or as near as can be.

    A bins prediction (Q, h/4, w/4) is tilted, with the colors (Q, 2) that decode knows; an ab one
    (2, h, w), colors None, shifted, fading to nothing at black and white of L (h, w). Gamut takes
    some of the mean away: up to 5 rounds add what is missing to what is asked for.
    """
    best = plain = decode(prediction)
    asked, vector, nearest = np.array(target, np.float64), None, np.inf
    fade = np.clip(4 * (L / 100) * (1 - L / 100), 0, 1)[..., None]
    for _ in range(6):
        if colors is None:
            shift = (asked - plain.mean(axis=(0, 1))) / max(fade.mean(), 1e-3)
            ab = plain + fade * shift.astype(np.float32)
        else:
            flat = prediction.reshape(len(prediction), -1).T
            moved, vector = tilt(flat, colors, asked, vector)
            ab = decode(moved.T.reshape(prediction.shape).astype(np.float32))
        missing = target - into_gamut(L, ab).mean(axis=(0, 1))
        if np.linalg.norm(missing) < nearest:
            nearest, best = np.linalg.norm(missing), ab
        if nearest < 0.1:
            break
        asked = asked + missing
    return best


def tilt(probability: np.ndarray, colors: np.ndarray, target: np.ndarray,
         start: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Move the mean colour of distributions by the smallest change in relative entropy.

    probability (P, Q), colors (Q, 2), target (2,): p'(q) ~ p(q) exp(lambda . c_q) with one lambda
    for all P, by Newton with step control on the convex mean log-partition less lambda . target,
    whose gradient is (mean - target) and whose Hessian is the mean covariance. Returns p' and
    lambda. Out of reach: the nearest that was found.
    """
    probability, colors = probability.astype(np.float64), colors.astype(np.float64)
    products = np.einsum("qi,qj->qij", colors, colors).reshape(-1, 4)
    vector = np.zeros(2) if start is None else start

    def tilted(vector):
        exponent = colors @ vector
        weighted = probability * np.exp(exponent - exponent.max())
        total = np.maximum(weighted.sum(axis=1, keepdims=True), 1e-300)
        value = float(np.log(total).mean() + exponent.max() - vector @ target)
        return weighted / total, value
    current, value = tilted(vector)
    for _ in range(50):
        means = current @ colors
        gradient = means.mean(axis=0) - target
        if np.linalg.norm(gradient) < 0.02:
            break
        covariance = (current @ products).mean(axis=0).reshape(2, 2) - means.T @ means / len(means)
        step = np.linalg.solve(covariance + 1e-4 * np.eye(2), gradient)
        step *= min(1.0, 0.2 / np.linalg.norm(step))  # exp(0.2 * 110) is already the whole range
        for _ in range(20):
            trial, trial_value = tilted(vector - step)
            if trial_value < value - 1e-4 * (step @ gradient):
                break
            step = step / 2
        else:
            break
        vector, current, value = vector - step, trial, trial_value
    return current, vector


def propagate_hints(L: np.ndarray, ab: np.ndarray, hints: list) -> np.ndarray:
    """Spread hints (x, y, a, b), pixels of L (h, w), over what is like them around; returns ab.

    Minimizes sum w_rs (d_r - d_s)^2 + mu sum d^2 over neighbours r, s for d, the difference from
    the prediction ab (h, w, 2), fixed on what is like the hint of a 5-pixel disc there; w_rs =
    exp(-(L_r - L_s)^2 / 2 sigma^2), at least 1e-6. After Levin, Lischinski and Weiss 2004, in a
    form that is solved in time.
    """
    y, x = np.mgrid[:L.shape[0], :L.shape[1]]
    free, d = np.ones_like(L), np.zeros((2, *L.shape), np.float32)
    for hx, hy, a, b in hints:
        like = np.abs(L - L[hy, hx]) <= 200 * HINT_SIGMA  # two sigma: not across an outline
        disc = ((x - hx) ** 2 + (y - hy) ** 2 <= 2.5 ** 2) & like
        free[disc], d[:, disc] = 0, np.array([[a], [b]]) - ab[hy, hx, :, None]
    down, right = (np.exp(-np.diff(L / 100, axis=axis) ** 2 / (2 * HINT_SIGMA ** 2)).clip(min=1e-6)
                   for axis in (0, 1))
    total = HINT_MU + (np.pad(down, ((0, 1), (0, 0))) + np.pad(down, ((1, 0), (0, 0)))
                       + np.pad(right, ((0, 0), (0, 1))) + np.pad(right, ((0, 0), (1, 0))))

    def gradient(d):  # zero where d is fixed
        result = total * d
        result[:, :-1] -= down * d[:, 1:]
        result[:, 1:] -= down * d[:, :-1]
        result[..., :-1] -= right * d[..., 1:]
        result[..., 1:] -= right * d[..., :-1]
        return free * result
    residual, direction, power, enough = -gradient(d), 0, np.float32(1), None
    for _ in range(3000):  # conjugate gradients, a and b side by side, scaled by the diagonal
        scaled = residual / total
        power, last = (residual * scaled).sum(axis=(1, 2), keepdims=True), power
        enough = 1e-9 * power.max() if enough is None else enough  # 0.3 ab units from exact
        if power.max() <= enough:
            break
        direction = scaled + power / np.maximum(last, 1e-30) * direction
        product = gradient(direction)
        rate = power / np.maximum((direction * product).sum(axis=(1, 2), keepdims=True), 1e-30)
        d += rate * direction
        residual -= rate * product
    return ab + d.transpose(1, 2, 0)


def hint_correction(image: Image.Image, enlarge, hint: tuple, scale: float):
    """A function that gives the hint's own pixel exactly its colour, and what is like it around.

    scale: pixels of the photograph for one of the network's.
    """
    x, y, *wanted = hint
    row = lightness(image.crop((0, y, image.width, y + 1)))
    missing, L_hint = np.array(wanted, np.float32) - enlarge(row, y)[0, x], row[0, x]
    radius = 2.5 * max(scale, 1.0)

    def correct(L, colors, top):
        dy, dx = np.arange(top, top + len(L)) - y, np.arange(L.shape[1]) - x
        near = np.ix_(np.abs(dy) <= 3 * radius, np.abs(dx) <= 3 * radius)
        distance = (dy[near[0]] ** 2 + dx[near[1]] ** 2) / radius ** 2
        unlike = (L[near] - L_hint) ** 2 / (2 * (100 * HINT_SIGMA) ** 2)
        colors[near] += np.exp(-distance - unlike)[..., None].astype(np.float32) * missing
    return correct
