"""Time to open, change and filter an index of random codes: python benchmarks/index.py --items=1e6

It is written below --folder, a temporary one by default, and has two own columns. Every figure is of a new process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = {
    "import tcq.index, for comparison": "",
    "open, files mapped": "index.open_index(path, verify=False)",
    "open, and compare hashes": "index.open_index(path)",
    "open, and read all codes": "index.open_index(path, verify=False).codes",
    "remove one image": "index.remove(path, ['/photos/photo 3.jpg'])",
    "filter on an own column": "index.where(index.open_index(path, verify=False), 'year >= 2015')",
    "compact": "index.compact(path)",
}


def main() -> None:
    """Prints a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=float, default=1e6)
    parser.add_argument("--folder", default="")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(arguments.folder or temporary, "index")
        _write(path, int(arguments.items))
        size = sum(p.stat().st_size for p in path.iterdir())
        print(f"{int(arguments.items):,} images, {size / 2**20:,.0f} MiB")
        for name, code in STEPS.items():
            print(f"{name:<34} {_measure(code, path) * 1000:10,.1f} ms", flush=True)


def _write(path: Path, count: int) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    import synthetic
    from tcq.index import store

    index = synthetic.index(count=count, codebooks=8, codewords=256)
    store.write(path, index.replace(sha256={}), [])


def _measure(code: str, path: Path) -> float:
    """Seconds that a call takes in a new process, beside importing."""
    lines = (
        "import json, time",
        "from tcq import index",
        f"path = {str(path)!r}",
        "start = time.perf_counter()",
        code,
        "print(json.dumps(time.perf_counter() - start))",
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    whole = time.perf_counter() - start
    return float(json.loads(done.stdout)) if code else whole


if __name__ == "__main__":
    main()
