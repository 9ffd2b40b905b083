"""Decodes damaged files of all formats and modes, made from a seed, within limits of time and memory.

    python benchmarks/fuzz_images.py --count=20000 --seed=0

A worker process decodes one file at a time. The table counts, for each format, files that were decoded, repaired and
refused, and what must not happen: a crash, a hang, an error of another kind. With OpenCV installed (pip install
opencv-python-headless) each decoded file is compared with its result; --keep=FOLDER keeps files on which they differ.
"""

import argparse
import io
import json
import multiprocessing
import platform
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

SECONDS = 20.0  # for one file
MEMORY = 4 * 2**30  # bytes of address space
SIDE = 16  # of the squares that are compared
TOLERANCE = 24.0  # mean difference of their pixels, of 255
MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "GIF": ("L", "P"),
    "BMP": ("1", "L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"),
    "PPM": ("1", "L", "RGB"),
    "AVIF": ("RGB", "RGBA"),
    "JPEG2000": ("L", "RGB", "RGBA"),
}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "JPEG": ({}, {"progressive": True}, {"subsampling": 0, "optimize": True}),
    "PNG": ({}, {"compress_level": 0}),
    "TIFF": ({}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"compression": "tiff_adobe_deflate"}),
    "WEBP": ({}, {"lossless": True}),
}


def originals(random: np.random.RandomState) -> list[tuple[str, bytes]]:
    """Whole files of all formats and modes, with and without an orientation."""
    files = []
    for format, modes in MODES.items():
        for mode in modes:
            for options in VARIANTS.get(format, ({},)):
                for turned in (False, True):
                    out = io.BytesIO()
                    exif = Image.Exif()
                    if turned:
                        exif[0x0112] = 6
                    extra = {"exif": exif} if format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
                    try:
                        _picture(random, mode).save(out, format, **options, **extra)
                    except (OSError, ValueError, KeyError):  # this format has not this mode
                        continue
                    files.append((format, out.getvalue()))
    return files


def _picture(random: np.random.RandomState, mode: str) -> Image.Image:
    """A smooth random picture, which a shift or another order of colours changes."""
    size = int(random.randint(24, 160)), int(random.randint(24, 160))
    coarse = Image.fromarray(random.randint(0, 256, (6, 6, 4)).astype(np.uint8), "RGBA")
    smooth = coarse.resize(size, Image.Resampling.BICUBIC)
    if mode == "I;16":
        return Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(np.asarray(smooth.convert("L")).astype(np.float32) / 255)
    return smooth.convert("RGBA" if mode in ("RGBA", "LA") else "RGB").convert(mode)


def damage(random: np.random.RandomState, data: bytes, other: bytes) -> tuple[str, bytes]:
    """One kind of damage, and the damaged file."""
    kinds = ("bits", "cut", "splice", "number", "zeros", "twice", "insert", "whole")
    kind = kinds[random.randint(len(kinds))]
    raw = bytearray(data)
    place = int(random.randint(len(raw)))
    if kind == "bits":
        for where in random.randint(0, len(raw), random.randint(1, 20)):
            raw[where] ^= 1 << random.randint(8)
    elif kind == "cut":
        raw = raw[: place if random.rand() < 0.5 else len(raw) - random.randint(1, 40)]
    elif kind == "splice":
        head = int(random.randint(1, min(200, len(raw), len(other))))
        raw[:head] = other[:head]
    elif kind == "number":
        raw[place : place + 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\xff\xff"][
            random.randint(4)
        ]
    elif kind == "zeros":
        raw[place : place + 64] = bytes(len(raw[place : place + 64]))
    elif kind == "twice":
        raw[place:place] = raw[place : place + int(random.randint(1, 200))]
    elif kind == "insert":
        raw[place:place] = random.bytes(int(random.randint(1, 50)))
    return kind, bytes(raw)


def work(pipe: Any) -> None:
    """Decodes files until the pipe is closed, and says for each what happened."""
    from tcq.data import images

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while True:
        data = pipe.recv()
        if data is None:
            return
        try:
            decoded = images.read(data, size=SIDE, resize=images.Resize("squash"))
            outcome = "repaired" if decoded.repaired else "decoded"
            pipe.send((outcome, decoded.pixels.astype(float), peer(data)))
        except images.UnreadableError as error:
            pipe.send((f"error: {error}", None, None))
        except images.ImageError:
            pipe.send(("refused", None, None))
        except BaseException as error:
            pipe.send((f"error: {type(error).__name__}: {error}"[:100], None, None))


def peer(data: bytes) -> np.ndarray | None:
    """The same square by OpenCV; None without it, or if it cannot decode the file."""
    try:
        import cv2
    except ImportError:
        return None
    try:
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    if found is None:
        return None
    image = Image.fromarray(np.ascontiguousarray(found[..., ::-1]))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0), float)


class Worker:
    """A process that decodes, and is replaced when it crashes or hangs."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def decode(self, data: bytes) -> tuple[str, Any, Any]:
        """The outcome for one file."""
        self._pipe.send(data)
        try:
            if self._pipe.poll(SECONDS if self._warm() else 120):
                outcome: tuple[str, Any, Any] = self._pipe.recv()
                return outcome
            self._process.kill()
            self._start()
            return "hang", None, None
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self._start()
            return f"crash: {code}", None, None

    def _warm(self) -> bool:
        warm, self._seen = getattr(self, "_seen", False), True
        return warm


def _agrees(pixels: Any, other: Any) -> bool:
    return pixels is not None and other is not None and bool(np.abs(pixels - other).mean() <= TOLERANCE)


def main() -> None:
    """Prints a table and, as JSON, the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for files that must not happen, and on which decoders differ")
    a = parser.parse_args()
    random = np.random.RandomState(a.seed)
    files = originals(random)
    counts: dict[str, Counter[str]] = {}
    bad: list[str] = []
    worker, start = Worker(), time.monotonic()
    agreed = [_agrees(*worker.decode(data)[1:]) for _, data in files]  # OpenCV drops alpha, and turns only JPEG files
    for number in range(a.count):
        chosen, spliced = random.randint(len(files)), random.randint(len(files))
        format, whole = files[chosen]
        kind, data = damage(random, whole, files[spliced][1])
        outcome, pixels, other = worker.decode(data)
        counter = counts.setdefault(format, Counter())
        counter[outcome.partition(":")[0]] += 1
        compared = agreed[chosen] and (kind != "splice" or agreed[spliced]) and other is not None
        differs = compared and not _agrees(pixels, other)
        counter["differs"] += int(differs)
        counter["compared"] += int(compared)
        if differs or outcome.partition(":")[0] in ("error", "crash", "hang"):
            bad.append(f"{number} {format} {kind} {outcome}")
            if a.keep:
                a.keep.mkdir(parents=True, exist_ok=True)
                (a.keep / f"{a.seed}-{number}-{format}-{kind}-{outcome.partition(':')[0]}").write_bytes(data)
    columns = ("decoded", "repaired", "refused", "error", "crash", "hang", "compared", "differs")
    print(
        f"{len(files)} originals, {a.count:,} files, seed {a.seed}, {time.monotonic() - start:,.0f} s, "
        f"Python {platform.python_version()}, Pillow {PIL.__version__}"
    )
    print("\n".join(bad[:40]))
    print("| format | " + " | ".join(columns) + " |")
    for format, counter in counts.items():
        print(f"| {format} | " + " | ".join(f"{counter[c]:,}" for c in columns) + " |")
    total = sum(counts.values(), Counter())
    print("| all | " + " | ".join(f"{total[c]:,}" for c in columns) + " |")
    print(json.dumps({"seed": a.seed, **{c: total[c] for c in columns}}))


if __name__ == "__main__":
    main()
