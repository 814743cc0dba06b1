"""Speed, as ratios to what bounds it, and edges: python tests/benchmark.py [loop data ... edges]

Prints a line a figure with its target, in some minutes. Run it with nothing else running.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from skimage.color import deltaE_ciede2000, rgb2lab

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from basic_model import (PRETRAINED, ColorNet, load_checkpoint, read_checkpoint,  # noqa: E402
                         save_checkpoint, use_bf16)
from colorize_data import ColorizeData, decode_lab, find_photos, prepare  # noqa: E402
from inference import (colorize, guide_slope, guided_upsampler,  # noqa: E402
                       inference, predict)
from photo import lightness, working_copy  # noqa: E402
from train import train  # noqa: E402

SAMPLES = ROOT / "data" / "input"


def seconds(action, repeats: int = 3) -> float:
    """Median time of an action, after one run to warm up."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def report(what: str, value: str, target: str) -> None:
    print(f"{what:<66} {value:>22}   {target}", flush=True)


def ratio(ours: float, bare: float, digits: int = 1) -> str:
    return f"{ours:.{digits}f}/{bare:.{digits}f} = {ours / bare:.2f}"


def scaled_sample(mode: str, width: int, height: int) -> Image.Image:
    """A sample photograph enlarged."""
    sample = Image.open(SAMPLES / "val" / "mountain.jpg").convert(mode)
    return sample.resize((width, height), Image.Resampling.BICUBIC)


def copied_samples(folder: Path, copies: int) -> Path:
    """A data folder with the sample photographs several times."""
    for split in ("train", "val"):
        for path in find_photos(SAMPLES / split):
            for i in range(copies if split == "train" else 1):
                target = folder / split / f"{i}_{path.name}"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    return folder


def bare_rate(size: int, batch: int, bf16: bool, channels_last: bool) -> float:
    """Photographs a second of forward, loss, backward and step on a resident batch."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = ColorNet().to(memory_format=layout).train()
    model.encoder.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    lab = torch.rand(batch, 3, size, size).mul(100).to(memory_format=layout)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(lab[:, :1])
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(output / 110, lab[:, 1:] / 110).backward()
        optimizer.step()
    return batch / seconds(step, 7)


def benchmark_loop(folder: Path) -> None:
    data = copied_samples(folder / "loop", 3)
    save_checkpoint(folder / "start.tar", ColorNet())
    train(data=data, out=folder / "out", epochs=1, batch_size=16, size=256, device="cpu",
          init=str(folder / "start.tar"))
    training = read_checkpoint(folder / "out" / "last.tar")["training"]
    rate = training["photographs"] / training["scores"]["seconds"]
    bare = bare_rate(256, 16, use_bf16("auto", torch.device("cpu")), True)
    report("training loop over the bare network, 256 px, batch 16",
           ratio(rate, bare), "0.95")


def benchmark_data(folder: Path) -> None:
    data = copied_samples(folder / "data", 1)
    prepare(data)
    dataset = ColorizeData(data / "processed" / "train.npy", train=True)
    paths = find_photos(data / "train")

    def usual():  # decode, resize and convert each file each time
        for path in paths:
            image = Image.open(path).convert("RGB")
            rgb = np.asarray(ImageOps.fit(image, (256, 256), Image.Resampling.LANCZOS))
            torch.from_numpy(rgb2lab(rgb)).permute(2, 0, 1).float()

    def ours():
        for start in range(0, len(paths), 16):
            numbers = range(start, min(start + 16, len(paths)))
            decode_lab(torch.stack([dataset[n] for n in numbers]))
    report("batches over decoding each file each time",
           ratio(len(paths) / seconds(ours), len(paths) / seconds(usual), 0), "30")


def benchmark_build(folder: Path) -> None:
    (folder / "build" / "train").mkdir(parents=True)
    for i in range(12):  # each another: copies of one photograph would be found
        large = scaled_sample("RGB", 4000, 3000)
        large.putpixel((0, 0), (i, i, i))
        large.save(folder / "build" / "train" / f"{i}.jpg", quality=92)
    paths = find_photos(folder / "build" / "train")

    def decode():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda path: Image.open(path).load(), paths))
    bare, start = len(paths) / seconds(decode, 1), time.perf_counter()
    prepare(folder / "build")
    ours = len(paths) / (time.perf_counter() - start)
    report("building arrays over Pillow's bare decode, 12-megapixel JPEG", ratio(ours, bare), "0.4")


def process(folder: Path, *arguments) -> tuple[float, str]:
    """Seconds of a whole Python process in a folder, and what it prints."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, arguments)], check=True, cwd=folder,
                          capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def benchmark_inference(folder: Path) -> None:
    scaled_sample("L", 4000, 3000).save(folder / "large.jpg")
    bare = process(folder, "-c", "import torch, torchvision")[0]
    for name in ("out.png", "out.jpg"):
        ours = process(folder, ROOT / "main.py", "inference", "--model", PRETRAINED,
                       "--image", "large.jpg", "--output", name)[0]
        report(f"12 megapixels to {name[-3:].upper()}, whole process over import torch, seconds",
               ratio(ours, bare), "")


def benchmark_folder(folder: Path) -> None:
    """Seconds for 8 photographs of 768 x 512 pixels, and for 8 of as many shapes."""
    shapes = {"equal": [(768, 512)] * 8,
              "mixed": [(768 - 32 * i, 512 + 48 * i) for i in range(8)]}
    for kind, sizes in shapes.items():
        (folder / kind).mkdir()
        for i, size in enumerate(sizes):
            scaled_sample("L", *size).save(folder / kind / f"{i}.png")
        runs = iter(range(9))
        took = seconds(lambda: inference(image=[str(folder / kind)], model=str(PRETRAINED),
                                         output=folder / f"{kind}{next(runs)}", device="cpu"), 1)
        report(f"a folder of 8 photographs of {kind} shape", f"{took:.2f} s", "")


def benchmark_large(folder: Path) -> None:
    """Seconds and peak memory (VmHWM) of a whole process on large gray scans."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import main; main.main(sys.argv[2:]); "
            "print([line for line in open('/proc/self/status') if 'VmHWM' in line][0].split()[1])")
    for megapixels in (10, 100):
        height = int((megapixels * 1e6 / 2) ** 0.5)
        scaled_sample("L", 2 * height, height).save(folder / "scan.tif")
        took, said = process(folder, "-c", code, ROOT, "inference", "--image", "scan.tif",
                             "--model", PRETRAINED, "--output", f"color{megapixels}.tif")
        report(f"a gray scan of {megapixels} megapixels, TIFF to TIFF, whole process",
               f"{took:.1f} s = {took / megapixels:.2f} s/MP",
               f"{int(said.split()[-1]) / 1e6:.2f} GB at most")


def benchmark_bf16(folder: Path) -> None:
    plain, fast = bare_rate(256, 16, False, False), bare_rate(256, 16, True, True)
    report("bf16 and channels_last over float32 contiguous, training step", ratio(fast, plain), "")


# ------------------------------------------------------- bringing ab to full resolution

def resized(plane: np.ndarray, shape, method) -> np.ndarray:
    """(h, w, ...) to the shape (H, W), plane by plane."""
    planes = np.moveaxis(plane.reshape(*plane.shape[:2], -1), -1, 0)
    images = [Image.fromarray(np.ascontiguousarray(p, np.float32)) for p in planes]
    out = [np.asarray(image.resize(shape[::-1], method)) for image in images]
    return np.stack(out, axis=-1).reshape(*shape, *plane.shape[2:])


def guided(ab, small, L):
    """The fast guided filter (He and Sun 2015), radius 1: a and b fitted small, applied large."""
    slope = guide_slope(small, ab)
    intercept = ab - slope * small[..., None]
    return resized(slope, L.shape, Image.Resampling.BILINEAR) * L[..., None] \
        + resized(intercept, L.shape, Image.Resampling.BILINEAR)


def joint_bilateral(ab, small, L):
    """Joint bilateral upsampling (Kopf et al. 2007): 5x5 neighbours, by distance and L."""
    y, x = ((np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(L.shape, small.shape))
    total, weights = 0.0, 0.0
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            j = np.clip(np.rint(y).astype(int) + dy, 0, small.shape[0] - 1)
            i = np.clip(np.rint(x).astype(int) + dx, 0, small.shape[1] - 1)
            near = np.exp(-((j - y)[:, None] ** 2 + (i - x)[None] ** 2) / 2)
            alike = np.exp(-(small[np.ix_(j, i)] - L) ** 2 / (2 * 5.0 ** 2))
            weight = (near * alike + 1e-9)[..., None]
            total, weights = total + weight * ab[np.ix_(j, i)], weights + weight
    return total / weights


def edge_aware(ab, small, L):
    return guided_upsampler(small, ab, L.shape[1], L.shape[0])(L, 0)


def lab_of(image: Image.Image) -> np.ndarray:
    return rgb2lab(np.asarray(image)).astype(np.float32)


def benchmark_edges(folder: Path) -> None:
    """Mean CIEDE2000 over the sample validation photographs of ab brought back to full size."""
    methods = {"bilinear": lambda ab, small, L: resized(ab, L.shape, Image.Resampling.BILINEAR),
               "bicubic": lambda ab, small, L: resized(ab, L.shape, Image.Resampling.BICUBIC),
               "guided filter": guided, "joint bilateral": joint_bilateral, "ours": edge_aware}
    model, errors = load_checkpoint(PRETRAINED)[0], {}
    for path in find_photos(SAMPLES / "val"):
        image = Image.open(path).convert("RGB").reduce(2)  # JPEG stores colour at half the size
        lab = lab_of(image)
        for kind, factor in (("true", 4), ("true", 8), ("true", 16), ("predicted", 4)):
            small = working_copy(image, min(image.size) // factor)
            colored = small if kind == "true" else colorize(model, small, min(small.size))
            ab = lab_of(colored)[..., 1:]
            for name, method in methods.items():
                made = np.dstack([lab[..., 0], method(ab, lightness(small), lab[..., 0])])
                error = deltaE_ciede2000(lab, made).mean()
                errors.setdefault(f"{kind} x{factor}", {}).setdefault(name, []).append(error)
    print(f"{'CIEDE2000, ab reduced by':<26}" + "".join(f"{column:>15}" for column in errors))
    for name in methods:
        cells = (f"{np.mean(column[name]):>15.2f}" for column in errors.values())
        print(f"{name:<26}" + "".join(cells))


def benchmark_predict(folder: Path) -> None:
    """A photograph's whole prediction over one pass of the network at its working size."""
    model, image = load_checkpoint(PRETRAINED)[0], scaled_sample("L", 384, 256)
    L = torch.rand(1, 1, 256, 384) * 100
    with torch.inference_mode():
        bare = seconds(lambda: model(L), 7)
    ours = seconds(lambda: predict(model, image, 256), 5)
    report("prediction of a photograph over one pass of the network, seconds",
           ratio(ours, bare, 2), "under 4")


if __name__ == "__main__":
    names = ["loop", "data", "build", "inference", "folder", "large", "bf16", "edges", "predict"]
    with tempfile.TemporaryDirectory() as temporary:
        for name in sys.argv[1:] or names:
            globals()[f"benchmark_{name}"](Path(temporary))
