"""Photographs in and out of files, ICC, EXIF; Lab, gamut; sheets; errors, remarks.

Units: L is 0..100, ab are CIE units, Lab is of sRGB under D65 and the 2-degree observer.
"""

import contextlib
import errno
import functools
import os
import platform
import struct
import sys
import threading
import warnings
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps, ImageSequence

VERSION = "2.0"
MADE = "Colours added by colorize"  # how the description of a result begins
MIN_CHROMA = 2.0      # mean chroma under this: a gray photograph teaches gray
MAX_MEGAPIXELS = 250  # RGBA and its RGB result take 9 bytes a pixel: 2.3 GB
MAX_SIDE = 65_500     # libjpeg's own bound; keeps rows short, and strips are whole rows
MAX_SIDES = {"WEBP": 16_383, "JPEG": MAX_SIDE}  # what these formats can hold
MAX_PAGES = 500       # of a TIFF, whose tiny pages cost time, not pixels
Image.init()
Image.MAX_IMAGE_PIXELS = None  # photos_in has the one bound
Image.core.set_block_size(64 << 20)  # over 32 MB: what is freed goes back to the system
# none of these opens another file inside itself, as IPTC does an EPS, which is a program
FORMATS = "JPEG PNG TIFF WEBP AVIF GIF BMP PPM JPEG2000 TGA PSD".split()
# what is written, and how; full chroma: colour was added
WRITABLE = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True},
            "JPEG": {"quality": 95, "subsampling": 0}}
# bytes 24..36 are the time when a profile was made: fixed, so that results are reproducible
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SRGB = SRGB[:24] + struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + SRGB[36:]
GRAY = SRGB.replace(b"RGB ", b"GRAY", 1).replace(b"rTRC", b"kTRC")  # its curve, one channel
TAG = ExifTags.Base
# what EXIF says of the photograph; the other tags tell how one file lays out its pixels
KEPT_TAGS = {TAG.DocumentName, TAG.ImageDescription, TAG.Make, TAG.Model, TAG.DateTime,
             TAG.Artist, TAG.Copyright, TAG.XResolution, TAG.YResolution,
             TAG.ResolutionUnit, TAG.PageName}
SUBDIRECTORIES = ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo  # exposure, and where it was
UNTRUE_TAGS = {TAG.ExifImageWidth, TAG.ExifImageHeight,  # sides before it was turned
               TAG.MakerNote, TAG.ColorSpace, ExifTags.IFD.Interop}  # too long; not sRGB's
TURNS = dict(enumerate("FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 "
                       "TRANSVERSE ROTATE_90".split(), 2))  # by EXIF's orientation
HOST = platform.node()[:20]  # processes have numbers of their own on each machine
TERMINAL = threading.Lock()  # lines and bars of all threads go out whole
ASKING, MEGAPIXELS = threading.Lock(), threading.Semaphore(MAX_MEGAPIXELS)  # for photos_in

warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata: the pixels matter


class ColorizeError(Exception):
    """A mistake that the user can mend; its text names the file or flag and the remedy."""


class FlagError(ColorizeError):
    """A flag's value that makes no sense, or flags that contradict each other."""


def printable(text) -> str:
    """A stranger's text as one line, all escaped that could steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def say(text: str, result: bool = False) -> None:
    """One line, from any thread: remarks to standard error, results to standard output."""
    with TERMINAL:
        if sys.stderr.isatty():  # a bar stands there; its next item draws it again
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        print(printable(text), file=sys.stdout if result else sys.stderr, flush=True)


@functools.cache  # once a folder: to list a large one for each file in it takes hours
def clear_leftovers(folder: Path) -> None:
    """Remove what runs that were killed left in a folder; arrays may have gigabytes."""
    # on Windows there is no asking whether a process lives
    for path in folder.glob(f".*.{HOST}-*-*.part") if os.name == "posix" else ():
        with contextlib.suppress(OSError, ValueError):  # of another user, or of no run
            try:
                os.kill(int(path.name.split("-")[-2]), 0)  # does nothing to one that lives
            except ProcessLookupError:
                path.unlink()


def write_atomically(path: Path, write) -> None:
    """Call write(temporary path) and rename; on any failure nothing is left."""
    # a thread writes one file at a time; 50 letters: a name may have 255 bytes
    own = f"{path.name[:50]}.{HOST}-{os.getpid()}-{threading.get_native_id()}"
    temporary = path.with_name(f".{own}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent)
        write(temporary)
        os.replace(temporary, path)  # whoever reads finds the old or all of the new
    except (OSError, ValueError, struct.error) as error:
        reason, remedy = getattr(error, "strerror", "") or error, "name another place"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            reason, remedy = "the disk is full", "free some space"
        raise ColorizeError(f"{path}: cannot be written ({reason}); {remedy}") from None
    finally:
        with contextlib.suppress(OSError):  # also where its folder is none
            temporary.unlink()


# ---------------------------------------------------------------------------------- colour

# sRGB primaries (IEC 61966-2-1) to XYZ, and the D65 white, as scikit-image has them
RGB_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423],
                       [0.212671, 0.715160, 0.072169],
                       [0.019334, 0.119193, 0.950227]], np.float32)
WHITE = np.array([0.95047, 1.0, 1.08883], np.float32)
XYZ_TO_RGB = np.linalg.inv(RGB_TO_XYZ.astype(np.float64)).astype(np.float32)


def srgb_to_linear(rgb: np.ndarray) -> np.ndarray:
    """sRGB, uint8 or uint16, to linear light in 0..1, float32."""
    top = np.iinfo(rgb.dtype).max
    values = np.arange(top + 1) / top  # a table: they are few
    curved = ((values + 0.055) / 1.055) ** 2.4
    return np.where(values <= 0.04045, values / 12.92, curved).astype(np.float32)[rgb]


def lab_curve(t: np.ndarray) -> np.ndarray:
    """f of CIE 15:2004: a straight line near black, where the cube root is too steep."""
    return np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3), uint8 or uint16, to CIE Lab (..., 3) float32."""
    f = lab_curve(srgb_to_linear(rgb) @ RGB_TO_XYZ.T / WHITE)  # X, Y, Z against white
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def lightness(image: Image.Image) -> np.ndarray:
    """L (H, W), float32 in 0..100, of a Pillow image of mode L, RGB or I;16."""
    # Y alone gives L, and of sRGB gray it is the linear light itself
    pixels = srgb_to_linear(np.asarray(image))
    Y = pixels if pixels.ndim == 2 else pixels @ RGB_TO_XYZ[1]
    return 116 * lab_curve(Y) - 16


def lab_to_linear(L: np.ndarray, ab: np.ndarray) -> np.ndarray:
    """L (...) and ab (..., 2) to linear sRGB (..., 3), outside 0..1 where out of gamut."""
    y = (L + 16) / 116
    f = np.stack([y + ab[..., 0] / 500, y, np.maximum(y - ab[..., 1] / 200, 0)], axis=-1)
    xyz = np.where(f > 0.2068966, f * f * f, (f - 16 / 116) / 7.787)
    return xyz.astype(np.float32, copy=False) @ (XYZ_TO_RGB * WHITE).T


def lab_to_rgb(L: np.ndarray, ab: np.ndarray) -> np.ndarray:
    """L (...) and ab (..., 2) to sRGB (..., 3), float32 in 0..1, clipped."""
    linear = np.clip(lab_to_linear(L, ab), 0, 1)  # a negative has no power of 1/2.4
    return np.where(linear <= 0.0031308, linear * 12.92,
                    1.055 * linear ** (1 / 2.4) - 0.055)


def in_gamut(L: np.ndarray, ab: np.ndarray) -> np.ndarray:
    """Whether L (...) and ab (..., 2) is an sRGB colour, within a tolerance."""
    linear = lab_to_linear(L, ab)
    # 1e-4 above, or white itself would be outside; less below, where 1e-4 is seen
    inside = (linear >= -1e-5) & (linear <= 1 + 1e-4)
    return inside[..., 0] & inside[..., 1] & inside[..., 2]  # faster than all(axis=-1)


def into_gamut(L: np.ndarray, ab: np.ndarray) -> np.ndarray:
    """Lower the chroma of ab (..., 2) outside sRGB, at fixed L (...) and hue."""
    # clipping RGB instead would change the lightness
    outside = ~in_gamut(L, ab)
    L_out, ab_out = L[outside], ab[outside]  # few: the others cost nothing more
    share = np.zeros_like(L_out)
    for bit in np.float32(0.5) ** np.arange(1, 13):  # bisection, to 0.03 of a chroma of 110
        share += bit * in_gamut(L_out, ab_out * (share + bit)[:, None])
    result = ab.copy()
    result[outside] = ab_out * share[:, None]
    return result


def lab_to_image(L: np.ndarray, ab: np.ndarray) -> Image.Image:
    """L (H, W) and ab (H, W, 2), brought into gamut, as a picture."""
    rgb = lab_to_rgb(L, into_gamut(L, ab))
    return Image.fromarray(np.rint(rgb * 255).astype(np.uint8))


# -------------------------------------------------------------------------- a photograph in

class Photo(NamedTuple):
    """One photograph (or page), upright and in sRGB."""
    image: Image.Image                 # mode L, RGB or I;16 (16-bit gray)
    alpha: Image.Image | None = None   # mode L
    exif: bytes = b""                  # with dpi: what is written back
    dpi: tuple | None = None
    note: str = ""                     # what a user should know of the reading


@contextlib.contextmanager
def opened(path: Path):
    """A file as a Pillow image; whatever goes wrong with it becomes a ColorizeError."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe keeps one waiting
            raise OSError(0, "it is a folder, a pipe or a device")
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            yield image
    except ColorizeError as error:
        raise ColorizeError(f"{path}: {error}") from None
    except Exception as error:  # Pillow's readers raise many kinds on hostile files
        reason, remedy = getattr(error, "strerror", ""), "check the path"
        if isinstance(error, MemoryError):
            reason, remedy = "not enough memory to decode it", "reduce it first"
        elif not reason:  # of Pillow, not of the system
            reason = "damaged, cut off, packed oddly, or none of " + ", ".join(FORMATS)
            remedy = "copy it again, unpack it, or export it as PNG or JPEG"
        raise ColorizeError(f"{path}: cannot be read ({reason}); {remedy}") from None


@contextlib.contextmanager
def photos_in(path: Path, max_megapixels: float = MAX_MEGAPIXELS, first: bool = False,
              at_least: int | None = None):
    """Every page of a TIFF (or the `first`), the one photograph of another file: Photos.

    All threads together have at most MAX_MEGAPIXELS in such blocks; they must not be
    nested. `at_least`: a JPEG may come smaller, its sides no less. Raises ColorizeError.
    """
    with contextlib.ExitStack() as room:
        with opened(path) as image:
            one = first or image.format != "TIFF"  # a PSD's pages are parts of one picture
            pages = [image] if one else ImageSequence.Iterator(image)
            # bit 0 says a smaller copy of another page (a thumbnail); of too many all count
            sizes = {n: page.size for n, page in enumerate(islice(pages, MAX_PAGES + 1))
                     if not n % MAX_PAGES or not page.tag_v2.get(TAG.NewSubfileType, 0) & 1}
            pixels = sum(width * height for width, height in sizes.values())
            if pixels > max_megapixels * 1e6:  # before memory is taken
                raise ColorizeError(f"over {max_megapixels:g} megapixels, pages together; "
                                    "reduce it, or raise --max_megapixels")
            if max(map(max, sizes.values())) > MAX_SIDE or max(sizes) >= MAX_PAGES:
                raise ColorizeError(f"over {MAX_SIDE} pixels wide or high, or over "
                                    f"{MAX_PAGES} pages; cut it into pieces")
            # a bomb: scans have a byte for 100 pixels, or more; 2,000 leave a factor of 20
            if pixels > max(5e7, 2000 * os.path.getsize(path)):
                raise ColorizeError(f"{pixels / 1e6:.0f} megapixels of next to no bytes; "
                                    "export it anew if it is a photograph")
            share = min(int(pixels / 1e6) + 1, MAX_MEGAPIXELS)  # a larger one is alone
            with ASKING:  # one at a time: two with half of theirs each would wait for ever
                for _ in range(share):
                    MEGAPIXELS.acquire()
            room.callback(MEGAPIXELS.release, share)
            if at_least:
                image.draft(None, (at_least, at_least))  # fast, in the JPEG's decoder
            photos = [decode_photo(pages[n], free=True) for n in sizes]
        yield photos


def read_photo(path: Path) -> Photo:
    """The first photograph of a file."""
    with photos_in(path, first=True) as (photo,):
        return photo


def decode_photo(image: Image.Image, free: bool = False) -> Photo:
    """An opened image, or one in memory, as Photo; free: its own pixels may go."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    layout = str(getattr(image, "tile", [])[:1])  # of the file; gone once it is loaded
    deep = ";16" in layout.replace("BGR;16", "") or "65535" in layout
    planes = any(f"args=('{band}'," in layout for band in "RC")  # of RGB or CMYK
    if planes and max(tags[TAG.BitsPerSample]) > 8:  # read as twice 8
        raise ColorizeError("its 16-bit colours lie in planes; export it interleaved")
    # GIF, WebP, PNG, AVIF; the others have pages, or layers that are one picture
    animated = image.format in ("GIF", "WEBP", "PNG", "AVIF") and image.is_animated
    image.load()
    dpi, profile, alpha = image.info.get("dpi"), image.info.get("icc_profile"), None
    source, (image, exif) = image, upright(image)
    if free:
        source.im = None  # or there were 13 bytes for each pixel
    if "I;12" in layout:  # packed: then 4095 is white
        image = Image.fromarray(np.asarray(image) * 16 + np.asarray(image) // 256)
    # 12 bits in 16: asked before white may become black
    dim = image.mode[0] == "I" and 0 < np.asarray(image).max() < 4096
    if image.mode.startswith("I;16") and tags.get(TAG.PhotometricInterpretation) == 0:
        image = Image.fromarray(~np.asarray(image))  # zero is white; Pillow turns 8 bits
    if image.mode[0] not in "IF" and image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        image, alpha = image.convert(image.mode[:-1]), image.getchannel("A")
    image, note = to_srgb(image, profile)
    notes = {"no value over 4095 of 65535; those of a 12-bit scan are to be times 16": dim,
             "its 16 bits were read as 8": deep and image.mode != "I;16",
             "the first picture of an animation": animated, note: note}
    dpi = dpi if dpi and all(1 < x < 65536 for x in dpi) else None  # what files can hold
    return Photo(image, alpha, exif, dpi, "; ".join(n for n, true in notes.items() if true))


def upright(image: Image.Image) -> tuple[Image.Image, bytes]:
    """A copy turned as its EXIF says, and of that what stays true of a coloured copy."""
    try:
        own, exif = image.getexif(), Image.Exif()  # what is in memory keeps its own
        turn = TURNS.get(own.get(TAG.Orientation))  # Pillow's own fails at other bad tags
        image = image.transpose(Image.Transpose[turn]) if turn else image.copy()
        exif.update({tag: own[tag] for tag in KEPT_TAGS & set(own)})
        for part in SUBDIRECTORIES:
            if inside := {tag: value for tag, value in own.get_ifd(part).items()
                          if tag not in UNTRUE_TAGS}:
                exif[part] = inside
        if isinstance(words := image.info.get("Description"), str):  # a PNG's own text
            exif.setdefault(TAG.ImageDescription, words.encode())
        # tifffile, OME and ImageJ write there for themselves how the pixels lie
        if str(exif.get(TAG.ImageDescription)).startswith(('{"', "<?xml", "ImageJ=")):
            del exif[TAG.ImageDescription]
        keep_letters(exif)
        data = exif.tobytes()  # raises here what would be raised in writing
        return image, data if len(data) <= 60_000 else b""  # a JPEG holds 64 kB
    except Exception:  # a damaged block ends in many kinds; the pixels matter
        return image.copy(), b""


def keep_letters(exif: Image.Exif) -> None:
    """Make the texts bytes, as they were: of others Pillow writes all but ASCII as "?"."""
    for tag, text in exif.items():
        if isinstance(text, str):
            exif[tag] = text.encode("latin-1", "replace")  # as which Pillow has read them


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """The image as mode L, RGB or I;16 in sRGB by its ICC profile; and a note or ""."""
    note = ""
    if image.mode in ("F", "I", "I;16B", "I;16L", "I;16N"):
        low, high = image.convert("I").getextrema()
        if image.mode == "F" or low < 0 or high > 65535:
            raise ColorizeError("nothing says which of its values are black and white; "
                                "export it as 8 or 16 bits")
        image = image.convert("I").convert("I;16")
    elif image.mode not in ("L", "RGB", "CMYK", "I;16"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    try:
        if profile and image.mode in ("L", "I;16"):
            pixels = np.asarray(image)  # by a table of its values: 20 times as fast
            ramp = np.arange(np.iinfo(pixels.dtype).max + 1, dtype=pixels.dtype)
            table = ImageCms.profileToProfile(  # the optimized one is off by 4 %
                Image.fromarray(ramp.reshape(-1, 256)), BytesIO(profile), BytesIO(GRAY),
                outputMode=image.mode, flags=ImageCms.Flags.NOOPTIMIZE)
            image = Image.fromarray(np.asarray(table).ravel()[pixels])
        elif profile:
            image = ImageCms.profileToProfile(image, BytesIO(profile), BytesIO(SRGB),
                                              outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        note = "its colour profile is damaged or does not fit and was not used"
    return image.convert("RGB") if image.mode == "CMYK" else image, note


def is_colored(image: Image.Image) -> bool:
    """Whether it has colours; False for gray, and for toned: one hue, as sepia."""
    small = np.asarray(working_copy(image, 128).convert("RGB"))  # without grain
    ab = rgb_to_lab(small)[..., 1:].reshape(-1, 2)
    hue = ab.mean(axis=0) / max(np.linalg.norm(ab.mean(axis=0)), 1e-6)
    off = ab - np.outer(np.maximum(ab @ hue, 0), hue)  # off the ray from gray in that hue
    return bool(np.sqrt((off ** 2).sum(axis=1).mean()) >= MIN_CHROMA)


# ------------------------------------------------------------------------- a photograph out

def check_target(path: Path, side: int = 0) -> str:
    """The format for a picture of that long side; ColorizeError before the work."""
    kind = Image.EXTENSION.get(path.suffix.lower())
    if kind not in WRITABLE:
        raise ColorizeError(f"{path}: '{path.suffix}' is no picture format that can be "
                            "written; use .png, .jpg, .tif, .webp, or make that folder")
    if side > MAX_SIDES.get(kind, side):
        raise ColorizeError(f"{path}: {kind} holds {MAX_SIDES[kind]} pixels a side, not "
                            f"{side}; name a .png or .tif, or --format png (or tif)")
    folder = next(p for p in path.absolute().parents if os.path.exists(p))  # the nearest
    if os.path.isdir(path) or len(os.fsencode(path.name)) > 255 or \
            not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ColorizeError(f"{path}: cannot be written (it is a folder, its name has over "
                            f"255 bytes, or {folder} is none that you may write in); name "
                            "another place")
    return kind


def made_with(path: Path) -> str:
    """What a result says of its making, from its header alone; "" for any other file."""
    with contextlib.suppress(ColorizeError), opened(path) as image:
        # in search of EXIF that a PNG has not, Pillow would decode it all
        if "exif" in image.info or image.format == "TIFF":
            exif = image.getexif()
            # another program that retouched a result has put its own name there
            if str(exif.get(TAG.Software)).startswith("colorize "):
                return "".join(str(exif.get(TAG.ImageDescription)).partition(MADE)[1:])
    return ""


def write_photo(path: Path, pages: list, photo: Photo, description: str = "") -> str:
    """Write pages (RGB, RGBA; or one uint16 array as TIFF); what was lost, or ""."""
    kind, first, dpi, lost = check_target(path), pages[0], photo.dpi, ""
    if kind == "JPEG" and first.mode == "RGBA":
        first, lost = first.convert("RGB"), "transparency was left out, JPEG has none"
    options = WRITABLE[kind] | ({"dpi": dpi} if dpi else {}) | {
        "icc_profile": SRGB, "save_all": len(pages) > 1, "append_images": pages[1:]}
    exif = Image.Exif()
    exif.load(photo.exif)  # the photograph's own, and how its result was made
    words = str(exif.get(TAG.ImageDescription) or "").split(MADE)[0].rstrip("; ")
    exif[TAG.ImageDescription] = "; ".join(filter(None, [words, description]))
    exif[TAG.Software] = f"colorize {VERSION}"
    if isinstance(first, np.ndarray) and any(map(exif.get_ifd, SUBDIRECTORIES)):
        lost = "exposure and GPS data were left out of the 16-bit TIFF"
    keep_letters(exif)

    def write(temporary):
        if isinstance(first, Image.Image):
            return first.save(temporary, kind, exif=exif, **options)
        import tifffile  # Pillow writes no 16-bit colour; here: seldom needed, slow to load
        texts = [(tag, 2, None, value, True)  # 2 is text, None its own count
                 for tag, value in exif.items() if isinstance(value, bytes)]
        tifffile.imwrite(temporary, first, photometric="rgb", metadata=None, software=False,
                         resolution=dpi, resolutionunit="inch" if dpi else None,
                         iccprofile=SRGB, extratags=texts)
    write_atomically(path, write)
    return lost


def working_copy(image: Image.Image, size: int, enlarge: float = 1.0) -> Image.Image:
    """The photograph at a short side of `size`, the long one at most 4 times that."""
    scale = min(enlarge, size / min(image.size), 4 * size / max(image.size))
    sides = [max(round(side * scale), 1) for side in image.size]
    if scale != 1:  # to multiples of 4, as the bins head likes
        sides = [round(side / 4) * 4 if side >= 32 else side for side in sides]
    if image.mode == "I;16":  # 8 bits will do for the network
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.resize(sides, Image.Resampling.LANCZOS, reducing_gap=3.0)


def picture_sheet(tiles: list[Image.Image], columns: int, captions: list[str],
                  side: int) -> Image.Image:
    """Pictures in rows, each within side x side pixels, with captions below."""
    tiles = [ImageOps.contain(tile.convert("RGB"), (side, side)) for tile in tiles]
    # a row is as high as its highest picture: paper stays white only where shapes differ
    heights = [max(tile.height for tile in tiles[n:n + columns]) + 20
               for n in range(0, len(tiles), columns)]
    width = max(tile.width for tile in tiles) + 4
    sheet = Image.new("RGB", (columns * width + 4, sum(heights) + 4), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for n, (tile, caption) in enumerate(zip(tiles, captions)):
        x, y = 4 + n % columns * width + width // 2, 4 + sum(heights[:n // columns])
        sheet.paste(tile, (x - tile.width // 2, y))
        draw.text((x, y + heights[n // columns] - 18), caption, "black", font, "ma")
    return sheet
