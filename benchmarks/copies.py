"""Which altered copies of photographs `tcq duplicates` finds, and the groups of other photographs that it makes.

python benchmarks/copies.py --images=photos --alter=altered              # writes copies of 300 photographs
tcq index build --workdir=run --images=altered --out=index
tcq index update --index=index --images=photos --keep
python benchmarks/copies.py --images=photos --alter=altered --index=index --likeness=0.9,0.97,0.99 --out=pictures

Copies are the file itself, a PNG, half the size, JPEG of quality 40, 5 % cut off each side, and text over it.
"""

import argparse
import collections
import random
import shutil
import time
from pathlib import Path

from PIL import Image, ImageDraw


def main() -> None:
    """Writes the copies, or prints a line for each likeness."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--alter", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--index")
    parser.add_argument("--likeness", default="0.97")
    parser.add_argument("--out", type=Path, help="folder for pictures of groups of photographs with other names")
    a = parser.parse_args()
    if not a.index:
        _alter(a.images, a.alter, a.count)
        return
    for likeness in a.likeness.split(","):
        _measure(a, float(likeness))


def _alter(images: Path, out: Path, count: int) -> None:
    """Writes six copies of each of some images, drawn with seed 0, to names that begin with that of the image."""
    out.mkdir(parents=True)
    for file in random.Random(0).sample(sorted(images.rglob("*.jpg")), count):
        name, image = _name(file), Image.open(file).convert("RGB")
        width, height = image.size
        image.resize((width // 2, height // 2)).save(out / f"{name}.half.jpg", quality=80)
        image.save(out / f"{name}.q40.jpg", quality=40)
        image.save(out / f"{name}.png.png")
        inner = (width // 20, height // 20, width - width // 20, height - height // 20)
        image.crop(inner).save(out / f"{name}.crop.jpg", quality=90)
        ImageDraw.Draw(image).text((width // 2, height // 2), "(c) someone 2026", fill="white")
        image.save(out / f"{name}.text.jpg", quality=90)
        shutil.copy(file, out / f"{name}.bytes.jpg")


def _name(file: Path) -> str:
    return f"{file.parent.name}__{file.stem}"


def _measure(a: argparse.Namespace, likeness: float) -> None:
    from tcq import index as indexes
    from tcq.index import duplicates

    index = indexes.open_index(a.index)
    start = time.perf_counter()
    groups = duplicates.find(index, likeness=likeness)
    seconds = time.perf_counter() - start
    altered = [Path(p) for p in index.paths if Path(p).parent == a.alter.resolve()]
    original = {_name(Path(p)): p for p in index.paths if Path(p).parent != a.alter.resolve()}
    first: dict[str, str] = {}  # the first image of what is linked with an image

    def root(path: str) -> str:
        while first.setdefault(path, path) != path:
            path = first[path]
        return path

    for group in groups:
        for copy in group.copies[1:]:
            first[root(copy.path)] = root(group.copies[0].path)
    found: collections.Counter[str] = collections.Counter()
    for path in altered:
        found[path.name.split(".")[-2]] += root(str(path)) == root(original[path.name.split(".")[0]])
    count = len(altered) // 6
    shares = ", ".join(f"{kind} {found[kind] / count:.3f}" for kind in sorted(found))
    others = [g for g in groups if g.kind == "near" and len({_base(a, c.path) for c in g.copies}) > 1]
    print(f"{likeness}: {shares}; {len(others)} groups of other photographs; {seconds:.0f} s for {len(index.rows):,}")
    if a.out:
        a.out.mkdir(exist_ok=True)
        for name, some in (("most", others[:24]), ("least", others[-24:])):
            duplicates.draw(index, some, a.out / f"{likeness}-{name}-alike.png")


def _base(a: argparse.Namespace, path: str) -> str:
    file = Path(path)
    return file.name.split(".")[0] if file.parent == a.alter.resolve() else _name(file)


if __name__ == "__main__":
    main()
