"""What clipping buys: digits trained at several clips, temperatures and seeds; the choice is by validation only.

    python benchmarks/clipping.py --clip=0 --temperatures 0.5 0.7 1.0 --seeds 0 1 2 --out=runs/without_clipping.json
    python benchmarks/clipping.py --clip=0.1 --temperatures 1.0 --seeds 0 1 2 --out=runs/with_clipping.json

Prints and writes, for each temperature, mean and standard deviation over the seeds of the validation mAP and of the test
mAP (whole ranking, 32 bits, asymmetric). Each training takes about a minute on two CPU cores.
"""

import argparse
import json
import platform
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np

from tcq import config as configs
from tcq import evaluate, train


def measure(clip: str, temperature: float, seed: int, overrides: list[str], workdir: Path) -> dict[str, float]:
    """One training: validation and test mAP, and clip precision, all of the last checkpoint."""
    flags = [f"loss.clip={clip}", f"loss.temperature={temperature}", f"train.seed={seed}", "eval.every_steps=0"]
    validated = train.train(configs.load("configs/digits.py", flags + overrides), workdir)
    results = evaluate.evaluate(workdir, which="latest")
    return {
        "validation": validated["mAP"],
        "test": results["mAP"]["asymmetric"],
        "symmetric": results["mAP"]["symmetric"],
        "float": results["mAP"]["float"],
    } | {key: value for key, value in validated.items() if key == "clip_precision"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", default="0.1")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--override", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    rows = {}
    for temperature in arguments.temperatures:
        runs = []
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as workdir:
                runs.append(measure(arguments.clip, temperature, seed, arguments.override, Path(workdir)))
            print(f"clip {arguments.clip} temperature {temperature} seed {seed}: {runs[-1]}", flush=True)
        rows[temperature] = {
            key: {"mean": float(np.mean([r[key] for r in runs])), "sd": float(np.std([r[key] for r in runs]))}
            for key in runs[0]
        }
    best = max(rows, key=lambda t: rows[t]["validation"]["mean"])
    name = f"clip {arguments.clip}" if float(arguments.clip) else "without clipping"
    words = " ".join(
        f"--{k}={v}" if not isinstance(v, list) else f"--{k} {' '.join(map(str, v))}"
        for k, v in vars(arguments).items()
        if v
    )
    record = {
        "mAP": {
            f"recorded: {name}, temperature {best}, mean of {len(arguments.seeds)} seeds": rows[best]["test"]["mean"]
        },
        "command": f"python benchmarks/clipping.py {words}",
        "by_temperature": rows,
        "versions": {p: metadata.version(p) for p in ("jax", "flax", "optax", "numpy")},
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }
    Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["mAP"]))


if __name__ == "__main__":
    main()
