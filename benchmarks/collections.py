"""What a collection that changes costs: time and peak memory of each command, beside a script that encodes all again.

    python benchmarks/collections.py --images=100000 --folder=collection

It makes small JPEG files, trains a small model for two steps, and runs each command in a process of its own, whose peak
memory the kernel tells. The script decodes and encodes all images with the same model, and writes the codes.
"""

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from PIL import Image
from tcq import encode
encoder = encode.load(sys.argv[1])
side = encoder.config.data.image_size
paths = sorted(p for p in Path(sys.argv[2]).rglob("*.jpg"))
def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
codes = []
with ThreadPoolExecutor() as pool:
    for first in range(0, len(paths), 4096):
        codes.append(encode.codes(encoder, np.stack(list(pool.map(read, paths[first:first + 4096])))))
np.save(sys.argv[3], np.concatenate(codes))
"""


def make_images(folder: Path, count: int) -> None:
    """Writes `count` different JPEG files of 64 x 64 pixels, 1,000 in a folder."""
    random = np.random.RandomState(0)
    for number in range(count):
        path = folder / f"{number // 1000:04d}" / f"{number:07d}.jpg"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.randint(0, 256, (4, 4, 3)).astype(np.uint8))
        out = io.BytesIO()
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(out, "JPEG", quality=75)
        path.write_bytes(out.getvalue())


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory (MiB) of a command."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()}")
    return time.monotonic() - start, usage.ru_maxrss / 2**10


def tcq(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tcq", *arguments]


def main() -> None:
    """Prints a table and, as JSON, the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, required=True, help="for images, cache, workdir and index")
    a = parser.parse_args()
    photos, run, index = a.folder / "photos", a.folder / "run", a.folder / "index"
    os.environ["XDG_CACHE_HOME"] = str(a.folder / "cache")
    for left in (index, run, a.folder / "cache", a.folder / "moved"):
        shutil.rmtree(left, ignore_errors=True)
    print(f"making {a.images:,} images", file=sys.stderr)
    make_images(photos, a.images)
    first = photos / "0000"
    flags = ["width=32", "depth=1", "heads=2", "patch=16"]
    keys = ["data.image_size=64", "data.batch_size=64", "train.total_steps=2", "data.labels=none", "data.resident=0"]
    measure(
        tcq("train", f"--config=configs/folder.py:{first}", f"--workdir={run}")
        + [f"--config.model.{f}" for f in flags]
        + [f"--config.{k}" for k in keys]
    )
    rows: dict[str, tuple[float, float]] = {}
    rows["index all"] = measure(tcq("index", f"--workdir={run}", f"--images={photos}", f"--out={index}"))
    rows["script, all"] = measure([sys.executable, "-c", SCRIPT, str(run), str(photos), str(a.folder / "codes.npy")])
    shutil.rmtree(a.folder / "index2", ignore_errors=True)
    rows["index all, decoded"] = measure(
        tcq("index", f"--workdir={run}", f"--images={photos}", f"--out={a.folder / 'index2'}")
    )
    new = photos / "new.jpg"
    Image.fromarray(np.random.RandomState(os.getpid()).randint(0, 256, (64, 64, 3)).astype(np.uint8)).save(new)
    rows["add 1"] = measure(tcq("index", f"--out={index}", "--add", f"--images={photos}"))
    rows["remove 1"] = measure(tcq("index", f"--out={index}", "--remove", str(new)))
    new.unlink()
    rows["update, nothing new"] = measure(tcq("index", f"--out={index}", "--update"))
    photos.rename(a.folder / "moved")
    rows["move all, --add"] = measure(tcq("index", f"--out={index}", "--add", f"--images={a.folder / 'moved'}"))
    (a.folder / "moved").rename(photos)
    rows["move all, --root"] = measure(tcq("index", f"--out={index}", f"--root={photos}"))
    rows["search"] = measure(tcq("search", f"--index={index}", f"--query={next(first.iterdir())}"))
    base = rows["script, all"][0]
    import jax

    print(
        f"{a.images:,} images of 64 x 64, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"jax {jax.__version__}"
    )
    print("| command | seconds | of the script | peak MiB |\n|---|---|---|---|")
    for name, (seconds, peak) in rows.items():
        print(f"| {name} | {seconds:.1f} | {seconds / base:.2f} | {peak:,.0f} |")
    print(json.dumps({"images": a.images, **{name: [round(x, 2) for x in row] for name, row in rows.items()}}))


if __name__ == "__main__":
    main()
