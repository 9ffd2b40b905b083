"""Time and memory of the clipped loss with its gradient, against a dense loss, optax, PyTorch and open_clip.

    python benchmarks/loss.py time --batches 256 1024 4096          # one device
    python benchmarks/loss.py memory                                # compiled for 8 devices, B from 1,024 to 262,144
    python benchmarks/loss.py run --batch=65536                     # executed on 8 devices: time and peak memory
    python benchmarks/loss.py plot                                  # docs/loss.png from the results of the first two

"dense" is the usual implementation: (2b, 2B) similarities, `top_k` for the clipped ones, automatic differentiation.
Times are medians of interleaved repetitions; ratios are to tcq without clipping in the same run. The rows of PyTorch
(the same dense loss, and open_clip's ClipLoss between 2B and 2B features) need torch and open_clip (`make peers`).
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

DEVICES = 8
FLAGS = (  # simulated devices of one CPU wait for each other for a long time
    f"--xla_force_host_platform_device_count={DEVICES} --xla_cpu_collective_call_terminate_timeout_seconds=7200 "
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=7200"
)
SHARES = (0.0, 0.01, 0.1, 0.25)
TEMPERATURE = 0.2
OUT = Path("runs")


def dense(a: Any, b: Any, *, clip: int, axis_name: str | None = None) -> Any:
    """Clipped NT-Xent, all similarities at once."""
    import jax
    import jax.numpy as jnp

    a, b = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    views = (a, b)
    if axis_name:
        views = tuple(jax.lax.all_gather(x, axis_name, tiled=True) for x in (a, b))
    columns, rows = jnp.concatenate(views), jnp.concatenate([a, b])
    similarity = jnp.matmul(rows, columns.T, precision="highest")
    n, batch, local = len(columns), len(columns) // 2, jnp.arange(len(a))
    first = jax.lax.axis_index(axis_name) * len(a) if axis_name else 0
    own = jnp.concatenate([first + local, batch + first + local])[:, None]
    column = jnp.arange(n)
    negatives = jnp.where((column == own) | (column == (own + batch) % n), -jnp.inf, similarity)
    positive = jnp.sum(rows * jnp.concatenate([b, a]), axis=1)
    if clip:
        _, clipped = jax.lax.top_k(jax.lax.stop_gradient(negatives), clip)
        negatives = negatives.at[jnp.arange(len(rows))[:, None], clipped].set(-jnp.inf)
    logits = jnp.concatenate([positive[:, None], negatives], axis=1) / TEMPERATURE
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[:, 0])


def features(batch: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two noisy views of points of ten classes."""
    random = np.random.RandomState(0)
    points = random.randn(10, width)[np.arange(batch) % 10] + 2 * random.randn(batch, width)
    first, second = ((points + random.randn(batch, width)).astype("f4") for _ in range(2))
    return first, second


def jax_cases(batch: int, width: int, largest_dense: int) -> dict[str, Callable[[], Any]]:
    from tcq import losses

    cases: dict[str, Callable[[], Any]] = {}

    def add(name: str, loss: Callable[[Any, Any], Any]) -> None:
        cases[name] = compiled_in_jax(loss, batch, width)

    for share in SHARES:
        clip = int(share * (2 * batch - 2))
        add(f"tcq, clip {share:.0%}", lambda a, b, k=clip: losses.nt_xent(a, b, temperature=TEMPERATURE, clip=k)[0])
    for share in SHARES[1:]:
        options: dict[str, Any] = {"clip": share * (2 * batch - 2), "clip_scope": "batch", "temperature": TEMPERATURE}
        add(f"tcq, clip {share:.0%} of the batch", lambda a, b, o=options: losses.nt_xent(a, b, **o)[0])
    for share in SHARES if batch <= largest_dense else ():
        clip = int(share * (2 * batch - 2))
        add(f"dense JAX, clip {share:.0%}", lambda a, b, k=clip: dense(a, b, clip=k))
    return cases


def optax_cases(batch: int, width: int, _: int) -> dict[str, Callable[[], Any]]:
    import jax.numpy as jnp
    import optax

    if batch > 1024:  # it forms (2B, 2B, D) numbers
        return {}
    labels = jnp.tile(jnp.arange(batch), 2)

    def loss(a: Any, b: Any) -> Any:
        return optax.losses.ntxent(jnp.concatenate([a, b]), labels, temperature=TEMPERATURE)

    return {"optax.ntxent": compiled_in_jax(loss, batch, width)}


def compiled_in_jax(loss: Callable[[Any, Any], Any], batch: int, width: int) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    a, b = map(jnp.asarray, features(batch, width))
    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return lambda: jax.block_until_ready(run(a, b))


def torch_cases(batch: int, width: int, largest_dense: int) -> dict[str, Callable[[], Any]]:
    try:
        import torch
    except ImportError:
        return {}
    a, b = (torch.from_numpy(x).requires_grad_() for x in features(batch, width))

    def dense_torch(clip: int) -> Any:
        x = torch.nn.functional.normalize(torch.cat([a, b]))
        similarity = x @ x.T
        n, place = len(x), torch.arange(len(x))
        partner = (place + n // 2) % n
        positive = similarity[place, partner]
        mask = torch.zeros(n, n, dtype=torch.bool)
        mask[place, place] = mask[place, partner] = True
        negatives = similarity.masked_fill(mask, float("-inf"))
        if clip:
            negatives = negatives.scatter(1, torch.topk(negatives.detach(), clip).indices, float("-inf"))
        logits = torch.cat([positive[:, None], negatives], 1) / TEMPERATURE
        return torch.mean(torch.logsumexp(logits, 1) - logits[:, 0])

    def backward(loss: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            a.grad = b.grad = None
            loss().backward()
            return a.grad

        return run

    cases = {}
    for share in SHARES if batch <= largest_dense else ():
        clip = int(share * (2 * batch - 2))
        cases[f"dense PyTorch, clip {share:.0%}"] = backward(lambda k=clip: dense_torch(k))  # type: ignore[misc]
    spec = importlib.util.find_spec("open_clip")
    if spec and spec.submodule_search_locations:  # only the file of its loss: the package imports torchvision
        file = Path(spec.submodule_search_locations[0], "loss.py")
        loss_spec = importlib.util.spec_from_file_location("open_clip_loss", file)
        assert loss_spec and loss_spec.loader
        module = importlib.util.module_from_spec(loss_spec)
        loss_spec.loader.exec_module(module)
        loss = module.ClipLoss()

        def clip_loss() -> Any:
            x, y = (torch.nn.functional.normalize(torch.cat(pair)) for pair in ((a, b), (b, a)))
            return loss(x, y, 1 / TEMPERATURE)

        cases["open_clip ClipLoss"] = backward(clip_loss)
    return cases


def measure_time(arguments: argparse.Namespace) -> None:
    import jax

    rows: list[dict[str, Any]] = []
    reference: dict[int, float] = {}  # by batch: seconds of tcq without clipping, the first case
    for make in (jax_cases, optax_cases, torch_cases):  # not interleaved: the threads of two libraries would compete
        for batch in arguments.batches:
            cases = make(batch, arguments.width, arguments.largest_dense)
            times: dict[str, list[float]] = {name: [] for name in cases}
            calls = max(1, 2**18 // batch**2)
            for _ in range(arguments.repeats):
                for name, run in cases.items():
                    run()
                    start = time.perf_counter()
                    for _ in range(calls):
                        run()
                    times[name].append((time.perf_counter() - start) / calls)
            for name, values in times.items():
                seconds = float(np.median(values))
                reference.setdefault(batch, seconds)
                rows.append({"batch": batch, "name": name, "seconds": seconds, "ratio": seconds / reference[batch]})
                print(
                    f"B {batch:>7,}  {name:<26} {seconds * 1e3:>10,.1f} ms  x {seconds / reference[batch]:.2f}",
                    flush=True,
                )
    _write("loss_time.json", {"machine": machine(), "device": jax.devices()[0].device_kind, "rows": rows})


def compiled(batch: int, width: int, name: str) -> Any:
    """Loss and gradient on 8 devices, compiled, with 1 % of the negatives clipped."""
    import jax
    import jax.numpy as jnp

    from tcq import losses

    clip = int(0.01 * (2 * batch - 2))

    def body(a: Any, b: Any) -> Any:
        def loss(a: Any, b: Any) -> Any:
            if name == "dense":
                return jax.lax.pmean(dense(a, b, clip=clip, axis_name="i"), "i")
            options = {"temperature": TEMPERATURE, "clip": clip, "axis_name": "i", "gather": name}
            return losses.nt_xent(a, b, **options)[0]

        return jax.value_and_grad(loss, (0, 1))(a, b)

    shape = jax.ShapeDtypeStruct((DEVICES, batch // DEVICES, width), jnp.float32)
    return jax.pmap(body, axis_name="i").lower(shape, shape).compile()


def measure_memory(arguments: argparse.Namespace) -> None:
    rows = []
    print("temporary MiB on each of 8 devices, as compiled: dense, blocked (gather all), blocked (ring)")
    for batch in arguments.batches:
        sizes = {}
        for name in ("dense", "all", "ring"):
            sizes[name] = compiled(batch, arguments.width, name).memory_analysis().temp_size_in_bytes / 2**20
        rows.append({"batch": batch, **sizes})
        print(f"B {batch:>7,}  " + "  ".join(f"{v:>12,.1f}" for v in sizes.values()), flush=True)
    _write("loss_memory.json", {"machine": machine(), "width": arguments.width, "rows": rows})


def execute(arguments: argparse.Namespace) -> None:
    import jax

    batch, width = arguments.batch, arguments.width
    views = [x.reshape(DEVICES, -1, width) for x in features(batch, width)]
    from tcq import losses

    clip = int(0.01 * (2 * batch - 2))

    def body(a: Any, b: Any) -> Any:
        def loss(a: Any, b: Any) -> Any:
            count = int(0.01 * (2 * DEVICES * len(a) - 2))
            options = {"temperature": TEMPERATURE, "clip": count, "axis_name": "i", "gather": arguments.gather}
            return losses.nt_xent(a, b, **options)[0]

        return jax.value_and_grad(loss, (0, 1))(a, b)

    run = jax.pmap(body, axis_name="i")
    jax.block_until_ready(run(*(v[:, :16] for v in views)))  # so that the memory before has what every call needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    loss, gradients = jax.block_until_ready(run(*views))
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    norm = float(np.sqrt(sum(np.sum(np.asarray(g) ** 2) for g in gradients)))
    print(
        f"B {batch:,}, clip {clip:,} of {2 * batch - 2:,}, gather {arguments.gather}: loss {float(loss[0]):.6f}, ",
        end="",
    )
    print(f"gradient norm {norm:.4e}; {seconds:.0f} s with compiling")
    print(f"the process grew by {grown:.2f} GiB, {grown / DEVICES:.2f} GiB for each of {DEVICES} devices; {machine()}")


def plot(_: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    times, memory = (json.loads((OUT / f"loss_{name}.json").read_text()) for name in ("time", "memory"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    batches = [row["batch"] for row in memory["rows"]]
    styles = {"dense": ("s--", "dense, top_k"), "all": ("o-", "blocked, gather all"), "ring": ("^:", "blocked, ring")}
    for name, (style, label) in styles.items():
        left.loglog(batches, [row[name] for row in memory["rows"]], style, label=label)
    left.axhline(1024, color="gray", linewidth=0.8)
    left.set(xlabel="global batch B", ylabel="temporary MiB of each of 8 devices", title="memory, clip 1 %")
    left.legend()
    kinds = ("tcq", "dense JAX", "dense PyTorch")
    batch = max(row["batch"] for row in times["rows"] if row["name"].startswith("dense"))
    for kind, style in zip(kinds, ("o-", "s--", "D-."), strict=True):
        seconds = {r["name"]: r["seconds"] for r in times["rows"] if r["batch"] == batch}
        values = [seconds.get(f"{kind}, clip {share:.0%}") for share in SHARES]
        if None not in values:
            right.plot([100 * s for s in SHARES], np.array(values, float) * 1e3, style, label=kind)
    right.set(
        xlabel="% of the negatives clipped", ylabel="ms, loss and gradient", title=f"time, B = {batch:,}, one CPU"
    )
    right.set(yscale="log")
    right.legend()
    figure.tight_layout()
    figure.savefig("docs/loss.png", dpi=110)


def machine() -> str:
    parts = [f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"]
    for name in ("jax", "numpy", "optax", "torch", "open_clip_torch"):
        try:
            parts.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


def _write(name: str, record: dict[str, Any]) -> None:
    OUT.mkdir(exist_ok=True)
    (OUT / name).write_text(json.dumps(record, indent=2) + "\n")
    print(record["machine"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    timing = commands.add_parser("time")
    timing.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096])
    timing.add_argument("--largest_dense", type=int, default=4096, help="largest batch of the dense losses")
    timing.add_argument("--repeats", type=int, default=7)
    memory = commands.add_parser("memory")
    memory.add_argument("--batches", type=int, nargs="+", default=[2**i for i in range(10, 19)])
    running = commands.add_parser("run")
    running.add_argument("--batch", type=int, default=65536)
    running.add_argument("--gather", choices=("all", "ring"), default="all")
    drawing = commands.add_parser("plot")
    for command, function in ((timing, measure_time), (memory, measure_memory), (running, execute), (drawing, plot)):
        command.add_argument("--width", type=int, default=128)
        command.set_defaults(function=function)
    arguments = parser.parse_args()
    if arguments.function in (measure_memory, execute):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    arguments.function(arguments)


if __name__ == "__main__":
    main()
