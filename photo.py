"""Photographs: in and out of files, Lab and gamut, edges, picture sheets; errors and progress.

Units: L is 0..100, ab are CIE units, Lab is that of sRGB under D65 and the 2-degree observer.
"""

import contextlib
import errno
import hashlib
import os
import stat
import sys
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch.nn import functional as F

VERSION = "1.0"
MIN_CHROMA = 2.0   # mean chroma under this: a gray photograph teaches gray
MAX_MEGAPIXELS = 300
GUIDE_EPSILON = 10.0      # of the guided filter: 1e-3 for L in 0..1
Image.init()
FORMATS = [kind for kind in Image.ID  # of photographs; an EPS would be run by Ghostscript
           if kind not in {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FITS"}]
QUALITY = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True},
           "AVIF": {"quality": 95, "subsampling": "4:4:4"}}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# what EXIF says of the photograph; the other tags tell how one file lays out its pixels
KEPT_TAGS = {ExifTags.Base[name] for name in (
    "DocumentName", "ImageDescription", "Make", "Model", "DateTime", "Artist", "Copyright",
    "XResolution", "YResolution", "ResolutionUnit", "ExifOffset", "GPSInfo", "PageName")}

warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata: the pixels matter


class ColorizeError(Exception):
    """A mistake that the user can mend; its text names the file or flag and the remedy."""


class FlagError(ColorizeError):
    """A flag's value that makes no sense, or flags that contradict each other."""


def say(text: str) -> None:
    """Progress and remarks go to standard error, results to standard output."""
    print(text, file=sys.stderr, flush=True)


def progress(items, total: int, label: str):
    """Pass items through; redraw one line on a terminal, print one every 10 seconds elsewhere."""
    terminal, start = sys.stderr.isatty(), time.monotonic()
    last = start
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= (0.2 if terminal else 10) or (done == total and last > start):
            last = now
            print("\r\x1b[K" * terminal + f"{label}: {done}/{total} ({done / (now - start):.1f}/s)",
                  end="" if terminal and done < total else "\n", file=sys.stderr, flush=True)


def ordered_map(function, items, workers: int, window: int = 64):
    """Like map, in threads, in order, with at most `window` results waiting to be taken."""
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_atomically(path: Path, write) -> None:
    """Call write(temporary path) and rename; on any failure nothing is left."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        full = getattr(error, "errno", 0) == errno.ENOSPC
        reason = "the disk is full" if full else getattr(error, "strerror", "") or error
        raise ColorizeError(f"{path}: cannot be written ({reason}); "
                            "free some space or name another place") from None
    finally:
        with contextlib.suppress(OSError):  # also where its folder is none
            temporary.unlink()


def content_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------- colour

# sRGB primaries (IEC 61966-2-1) to XYZ, and the D65 white, as scikit-image has them
RGB_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423],
                       [0.212671, 0.715160, 0.072169],
                       [0.019334, 0.119193, 0.950227]], np.float32)
WHITE = np.array([0.95047, 1.0, 1.08883], np.float32)
XYZ_TO_RGB = np.linalg.inv(RGB_TO_XYZ.astype(np.float64)).astype(np.float32)


def srgb_to_linear(rgb: np.ndarray) -> np.ndarray:
    """sRGB (uint8, uint16, or float in 0..1) to linear light in 0..1, float32."""
    rgb = np.asarray(rgb)
    if rgb.dtype in (np.uint8, np.uint16):  # a table: there are few values
        top = np.iinfo(rgb.dtype).max
        return srgb_to_linear(np.arange(top + 1, dtype=np.float64) / top)[rgb]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((np.maximum(rgb, 0) + 0.055) / 1.055) ** 2.4)
    return linear.astype(np.float32)


def linear_to_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light to sRGB, both float32 in 0..1, clipped."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92,
                    1.055 * linear ** np.float32(1 / 2.4) - np.float32(0.055))


def to_8_bit(rgb: np.ndarray) -> np.ndarray:
    """sRGB float 0..1 to uint8."""
    return np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8)


def _lab_curve(t: np.ndarray) -> np.ndarray:
    return np.where(t > 0.008856, np.cbrt(t), 7.787 * t + np.float32(16 / 116))


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3), uint8, uint16 or float in 0..1, to CIE Lab (..., 3) float32 (CIE 15:2004)."""
    f = _lab_curve(srgb_to_linear(rgb) @ RGB_TO_XYZ.T / WHITE)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


def gray_to_L(gray: np.ndarray) -> np.ndarray:
    """L of gray sRGB values (uint8, uint16, or float in 0..1), any shape, float32 in 0..100."""
    return 116 * _lab_curve(srgb_to_linear(gray)) - 16


def lab_to_linear(L: np.ndarray, ab: np.ndarray) -> np.ndarray:
    """L (...) and ab (..., 2) to linear sRGB (..., 3), outside 0..1 where out of gamut."""
    y = (L + 16) / np.float32(116)
    f = np.stack([y + ab[..., 0] / 500, y, np.maximum(y - ab[..., 1] / 200, 0)], axis=-1)
    xyz = np.where(f > 0.2068966, f * f * f, (f - np.float32(16 / 116)) / np.float32(7.787))
    return xyz.astype(np.float32, copy=False) @ (XYZ_TO_RGB * WHITE).T


def lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """CIE Lab (..., 3) to sRGB (..., 3), float32 in 0..1, clipped."""
    return linear_to_srgb(lab_to_linear(lab[..., 0], lab[..., 1:]))


def in_gamut(L: np.ndarray, ab: np.ndarray) -> np.ndarray:
    """Whether L (...) and ab (..., 2) is an sRGB colour, with a tolerance in linear light.

    It is 1e-4 above, or white itself would be outside, and less below, where 1e-4 is seen.
    """
    linear = lab_to_linear(L, ab)
    inside = (linear >= -1e-5) & (linear <= 1 + 1e-4)
    return inside[..., 0] & inside[..., 1] & inside[..., 2]


def into_gamut(L: np.ndarray, ab: np.ndarray) -> np.ndarray:
    """Lower the chroma of colours outside sRGB, at fixed L and hue, by bisection.

    L is (...), ab (..., 2); returns ab (..., 2). Clipping RGB instead would change the lightness.
    """
    outside = ~in_gamut(L, ab)
    L_out, ab_out = L[outside], ab[outside]
    share = np.zeros_like(L_out)
    for bit in np.float32(0.5) ** np.arange(1, 13):  # 2^-12 of a chroma of 110 is 0.03 units
        share += bit * in_gamut(L_out, ab_out * (share + bit)[:, None])
    result = ab.copy()
    result[outside] = ab_out * share[:, None]
    return result


def lab_to_image(L: np.ndarray, ab: np.ndarray) -> Image.Image:
    """L (H, W) and ab (H, W, 2), brought into gamut, as a picture."""
    lab = np.concatenate([L[..., None], into_gamut(L, ab)], axis=-1)
    return Image.fromarray(to_8_bit(lab_to_rgb(lab)))


def spread_of(ab: np.ndarray) -> float:
    """Root mean square distance of ab (..., 2) from its mean."""
    return float(np.sqrt(ab.reshape(-1, 2).var(axis=0, dtype=np.float64).sum()))


# ------------------------------------------------------------------------------ in and out

class Photo(NamedTuple):
    """One photograph (or page), upright and in sRGB."""
    image: Image.Image          # mode L, RGB or I;16 (16-bit gray)
    alpha: Image.Image | None   # mode L
    info: dict                  # "exif" (Exif object), "dpi", "text": what is written back
    pages: int                  # of the file
    note: str                   # what a user should know of the reading, or ""


def find_photos(folder: Path) -> list[Path]:
    """Every photograph below a folder, sorted; hidden and other files are passed over."""
    extensions = {extension for extension, kind in Image.EXTENSION.items() if kind in FORMATS}
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # links are followed, but a loop of them ends
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(root, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in extensions
                  and os.path.isfile(path)]  # no pipe, no link to nothing
    return sorted(found)


def read_photo(path: Path, page: int = 0, at_least: int | None = None,
               max_megapixels: float = MAX_MEGAPIXELS) -> Photo:
    """Read one photograph (or page of it): upright, sRGB, 16-bit gray kept, alpha set aside.

    `at_least`: a JPEG may be decoded smaller, its sides no less than this. Raises ColorizeError.
    """
    Image.MAX_IMAGE_PIXELS = max_megapixels * 1e6  # for what lies inside an icon, too
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(0, "not a file")
        with Image.open(path, formats=FORMATS) as image:
            pages = image.n_frames if image.format == "TIFF" else 1
            image.seek(page)
            if image.width * image.height > max_megapixels * 1e6:
                raise Image.DecompressionBombError
            if at_least:
                image.draft(None, (at_least, at_least))
            return decode_photo(image, pages)
    except Image.DecompressionBombError:
        raise ColorizeError(f"{path}: over the limit of {max_megapixels:g} megapixels; reduce it, "
                            "or raise --max_megapixels") from None
    except Exception as error:  # Pillow's readers raise many kinds on hostile files
        reason = getattr(error, "strerror", "") or f"{type(error).__name__}: {str(error)[:80]}"
        raise ColorizeError(f"{path}: cannot be read as a photograph ({reason}); check the path, "
                            "or export it again as PNG or JPEG") from None


def decode_photo(image: Image.Image, pages: int) -> Photo:
    """An opened image as Photo."""
    layout = str(image.tile[:1])  # how the decoder unpacks it; gone once it is loaded
    image.load()
    dpi, profile = image.info.get("dpi"), image.info.get("icc_profile")
    text = {key: value for key, value in (getattr(image, "text", None) or {}).items()
            if not key.startswith(("XML:", "Raw profile"))}  # these repeat the orientation
    image, exif = upright(image)
    alpha = None
    if image.mode[0] not in "IF" and image.has_transparency_data:
        gray = image.mode in ("1", "L", "LA", "La")
        image = image.convert("LA" if gray else "RGBA")
        image, alpha = image.convert("L" if gray else "RGB"), image.getchannel("A")
    image, note = to_srgb(image, profile)
    if image.mode != "I;16" and (";16" in layout.replace("BGR;16", "") or "65535" in layout):
        note = "; ".join(filter(None, ["16-bit colour was read as 8-bit", note]))
    info = {"exif": exif, "dpi": dpi if dpi and all(1 < x < 65536 for x in dpi) else None,
            "text": text}
    return Photo(image, alpha, info, pages, note)


def upright(image: Image.Image) -> tuple[Image.Image, Image.Exif]:
    """The image turned as its EXIF says, and of that what stays true of a coloured copy."""
    try:
        exif = image.getexif()
        image = ImageOps.exif_transpose(image)
        for tag in set(exif) - KEPT_TAGS:
            del exif[tag]
        exif.tobytes()
        return image, exif
    except Exception:  # a damaged block ends in many kinds; the pixels matter
        return image, Image.Exif()


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """The image as mode L, RGB or I;16 in sRGB, its ICC profile applied; and a note or ""."""
    mode = image.mode
    if mode in ("I", "F", "I;16B", "I;16L", "I;16N"):
        image = to_16_bit(image)
    elif mode not in ("L", "RGB", "CMYK", "LAB", "I;16"):
        image = image.convert("L" if mode == "1" else "RGB")
    plain = image.convert("RGB") if mode == "CMYK" else image
    if mode == "LAB":  # its own profile is no other
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    if not profile:
        return plain, ""

    def converted(image, **options):
        return ImageCms.profileToProfile(image, BytesIO(profile), BytesIO(SRGB), outputMode="RGB",
                                         **options)
    try:
        if image.mode not in ("L", "I;16"):
            return converted(image), ""
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])  # to find a curve
        ramp = converted(ramp, flags=ImageCms.Flags.NOOPTIMIZE)  # which is coarse
        curve = np.asarray(ramp)[0, :, 1]
        if image.mode == "L":
            return image.point(curve.tolist()), ""
        table = np.interp(np.arange(65536) / 257, np.arange(256), curve * 257.0)
        return Image.fromarray(np.rint(table).astype(np.uint16)[np.asarray(image)]), ""
    except (ImageCms.PyCMSError, OSError, ValueError):
        return plain, "its colour profile is damaged or does not fit and was not used"


def to_16_bit(image: Image.Image) -> Image.Image:
    """Modes I;16B, I and F to I;16. I beyond 16 bits and F are scaled from their own range."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        values = np.nan_to_num(values.astype(np.float32), posinf=0, neginf=0)
        values = (values - values.min()) * (65535 / max(np.ptp(values), 1e-12))
    return Image.fromarray(values.astype(np.uint16))


def write_photo(path: Path, pages: list, photo: Photo, description: str = "") -> None:
    """Write pages (RGB, RGBA; or one uint16 array for a TIFF) in the format of the extension."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE or kind in ("GIF", "ICO", "ICNS"):  # few colours, small sizes
        raise ColorizeError(f"{path}: '{path.suffix}' is no picture format that can be written; "
                            "use .png, .jpg, .tif or .webp")
    exif, dpi = photo.info["exif"], photo.info["dpi"]
    exif[ExifTags.Base.Software] = f"colorize {VERSION}"
    exif[ExifTags.Base.ImageDescription] = "; ".join(
        filter(None, [str(exif.get(ExifTags.Base.ImageDescription, "")), description]))
    options = {"icc_profile": SRGB} | QUALITY.get(kind, {})
    if kind == "TIFF" and len(pages) > 1:
        options |= {"save_all": True, "append_images": pages[1:]}
    metadata = {"exif": exif} | ({"dpi": dpi} if dpi else {})
    if kind == "PNG":
        metadata["pnginfo"] = text = PngImagePlugin.PngInfo()
        own = {"Software": exif[ExifTags.Base.Software], "Description": description}
        for key, value in (photo.info["text"] | own).items():
            text.add_itxt(key, str(value))

    def write(temporary):
        first = pages[0]
        if isinstance(first, np.ndarray):
            import tifffile  # comes with scikit-image; Pillow writes no colour of 16 bits
            texts = [(tag, "s", 0, value.encode("ascii", "replace"), True)
                     for tag, value in exif.items() if isinstance(value, str)]
            return tifffile.imwrite(
                temporary, first, photometric="rgb", software=False, metadata=None, extratags=texts,
                iccprofile=SRGB, resolution=tuple(map(float, dpi or (72, 72))),
                resolutionunit="INCH")
        if first.mode == "RGBA" and kind in ("JPEG", "BMP", "PPM"):
            first = first.convert("RGB")  # these have no alpha
        try:
            first.save(temporary, format=kind, **options, **metadata)
        except (ValueError, TypeError, KeyError, SystemError) as error:  # of old metadata
            say(f"{path.name}: written without its old metadata ({error})")
            first.save(temporary, format=kind, **options)
    write_atomically(path, write)


# ------------------------------------------------------------------------- sizes and edges

def lightness(image: Image.Image) -> np.ndarray:
    """L (H, W) of a Pillow image of mode L, RGB or I;16."""
    pixels = np.asarray(image)
    return gray_to_L(pixels) if pixels.ndim == 2 else rgb_to_lab(pixels)[..., 0]


def working_copy(image: Image.Image, size: int, enlarge: float = 1.0) -> Image.Image:
    """The photograph at a short side of `size`, the long one at most 4 times that.

    Enlarged at most `enlarge` times. Long enough sides are multiples of 4, as the bins head likes.
    """
    scale = min(enlarge, size / min(image.size), 4 * size / max(image.size))
    sides = [max(round(side * scale), 1) for side in image.size]
    if scale != 1:
        sides = [max(round(side / 4) * 4, 1) if side >= 32 else side for side in sides]
    if image.mode != "I;16":
        return image.resize(sides, Image.Resampling.LANCZOS, reducing_gap=3.0)
    image = image.resize(sides, Image.Resampling.LANCZOS)  # 8 bits will do for the network
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def guide_slope(L: np.ndarray, ab: np.ndarray) -> np.ndarray:
    """The guided filter's mean coefficient (h, w, 2), ab units for a unit of L; radius 1."""
    def mean(x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    guide, colors = (torch.from_numpy(x).double() for x in (L[None], ab.transpose(2, 0, 1)))
    variance = mean(guide ** 2) - mean(guide) ** 2
    covariance = mean(guide * colors) - mean(guide) * mean(colors)
    return mean(covariance / (variance + GUIDE_EPSILON)).permute(1, 2, 0).float().numpy()


def guided_upsampler(L_small: np.ndarray, ab: np.ndarray, width: int, height: int):
    """A function that gives ab at the photograph's size, edge-aware, any rows at a time.

    L_small is (h, w), ab (h, w, 2), at the network's resolution.

    bicubic(ab) + a * (L - bicubic(L_small)), a the local regression of ab on L: the coefficient of
    the guided filter (He and Sun 2015), radius 1.
    """
    planes = np.dstack([L_small, ab, guide_slope(L_small, ab)]).transpose(2, 0, 1)
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]
    scale = len(L_small) / height

    def enlarge(L, top):  # L (rows, W), the photograph's from row `top` on, to ab (rows, W, 2)
        box = (0, top * scale, planes[0].width, (top + len(L)) * scale)
        L_up, a, b, slope_a, slope_b = (
            np.asarray(plane.resize((width, len(L)), Image.Resampling.BICUBIC, box=box))
            for plane in planes)
        detail = L - L_up
        return np.stack([a + slope_a * detail, b + slope_b * detail], axis=-1)
    return enlarge


# -------------------------------------------------------------------------- picture sheets

def picture_sheet(tiles: list, columns: int, captions: list[str] | None = None,
                  side: int = 256) -> Image.Image:
    """Pictures (Pillow, or uint8 arrays) in a grid, fitted into side x side, captions below."""
    line, font = 16 if captions else 0, ImageFont.load_default(12)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (side + 4) + 4, rows * (side + 4 + line) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        if not isinstance(tile, Image.Image):
            tile = Image.fromarray(tile)
        tile = ImageOps.contain(tile.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
        x, y = 4 + i % columns * (side + 4), 4 + i // columns * (side + 4 + line)
        sheet.paste(tile, (x + (side - tile.width) // 2, y + (side - tile.height) // 2))
        if captions and captions[i]:
            draw.text((x + side // 2, y + side + 1), captions[i], "black", font, "ma")
    return sheet
