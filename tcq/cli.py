"""tcq: unlabelled images in, a compact searchable index out.

Exit status 0: done; 1: it broke on the way; 2: a call, config or file that cannot work.
"""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. What the user can mend is one message on standard error, without a traceback."""
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    for argument in overrides:
        takes = "config" in arguments or arguments.command == "evaluate"
        if not takes or not argument.startswith(("--config.", "--noconfig.")):
            parser.error(f"unrecognized argument {argument!r} for {arguments.command}")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may be any bytes
    if "distributed" in arguments:
        told = [f"--{name}" for name in ("processes", "process_id") if getattr(arguments, name) is not None]
        if told and not arguments.coordinator:
            parser.error(f"{' and '.join(told)} without --coordinator=HOST:PORT, where process 0 is")
        if arguments.coordinator and len(told) < 2:
            parser.error("--coordinator needs --processes=N and --process_id=I, different for each of them")
    if "distributed" in arguments and (arguments.distributed or arguments.coordinator):
        return _one_of_several(arguments, overrides)
    return _run(arguments, overrides)


def _one_of_several(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs a command as one process of a run. The others learn it when this one fails."""
    import jax

    from tcq.runtime import processes

    try:
        processes.join(
            coordinator=arguments.coordinator, processes=arguments.processes, process_id=arguments.process_id
        )
        if not processes.first():
            sys.stdout = open(os.devnull, "w")  # the first one speaks for all
        status = _run(arguments, overrides)
    except processes.ProcessError as error:
        print(f"tcq {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except jax.errors.JaxRuntimeError:
        traceback.print_exc()
        processes.wait_for_blame()
        processes.fail("a device or a collective failed, see its log", 1)
        return 1
    except BaseException as error:
        traceback.print_exc()
        processes.fail(f"{type(error).__name__}: {error}", 1)
        return 1
    if status > 128:
        processes.stopped(status)
    if status:
        processes.fail(f"status {status}, see its log", status)
    processes.leave()
    return status


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from tcq.runtime import processes, signals

    try:
        signals.install()
        if arguments.command in COMPILES:
            from tcq.runtime import devices as parallel

            parallel.keep_compiled()
        return RUN[arguments.command](arguments, overrides)
    except signals.Stopped as stopped:
        print(f"tcq {arguments.command}: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"tcq {arguments.command}: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError) as error:
        if not type(error).__module__.startswith("tcq."):
            raise  # a defect of ours: show where
        print(f"tcq {arguments.command}: {error}", file=sys.stderr)
        return 2 if processes.refused(error) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tcq", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, allow_abbrev=False)

    train = command("train", "train a model, or go on with one; --config.group.key=value overrides a key")
    train.add_argument("--config", required=True, metavar="FILE[:ARG]", help="for example configs/digits.py")
    train.add_argument("--workdir", type=os.path.expanduser, required=True, help="where everything of this run is kept")
    train.add_argument("--allow_changes", action="store_true", help="go on with another config than the run began with")
    train.add_argument(
        "--profile", type=_steps, metavar="FIRST:BEHIND", help="write a trace of these steps to the workdir"
    )
    train.add_argument("--evaluate", metavar="CHECKPOINT", help="score it at the end: best (by validation) or latest")

    sweep = command("sweep", "train and score a grid of configs; resumable; one table, one picture")
    sweep.add_argument("--config", required=True, metavar="FILE[:ARG]", help="for example configs/digits.py")
    sweep.add_argument("--grid", required=True, help="for example 'loss.clip=0,0.1; train.seed=0,1,2'")
    sweep.add_argument(
        "--workdir", type=os.path.expanduser, required=True, help="table.csv, table.md, sweep.png, cells/"
    )
    sweep.add_argument("--jobs", type=_positive, default=1, help="cells at a time (default 1)")
    sweep.add_argument("--checkpoint", default="best", help="which is scored: best (by validation) or latest")

    evaluate = command(
        "evaluate", "score a trained model under its protocol; --config.eval.key=value overrides a convention"
    )
    evaluate.add_argument(
        "--workdir",
        type=os.path.expanduser,
        required=True,
        help="of the training run; results.json and pictures go there",
    )
    evaluate.add_argument("--checkpoint", default="best", help="best (by validation), latest, or a step")
    evaluate.add_argument("--recorded", metavar="JSON", help='a file {"mAP": {name: value}} of figures to show beside')

    index = command("index", "encode a folder of images into an index; or add to one, or remove from it")
    index.add_argument("--workdir", type=os.path.expanduser, help="of the training run whose model encodes")
    index.add_argument("--checkpoint", default="best", help="best (by validation), latest, or a step")
    index.add_argument("--images", type=os.path.expanduser, help="folder of images, with all that is below it")
    index.add_argument(
        "--out", type=os.path.expanduser, required=True, help="the index: a folder that does not exist yet"
    )
    index.add_argument("--add", action="store_true", help="add --images to the existing index --out")
    index.add_argument(
        "--remove", nargs="+", metavar="PATH", help="remove these images or folders from the index --out"
    )

    search = command("search", "the indexed images nearest to a query image")
    search.add_argument("--index", type=os.path.expanduser, required=True, help="made by tcq index")
    search.add_argument(
        "--query", type=os.path.expanduser, required=True, nargs="+", metavar="IMAGE", help="one image or more"
    )
    search.add_argument("--k", type=_positive, default=10, help="how many (default 10)")
    search.add_argument("--gallery", type=os.path.expanduser, metavar="PNG", help="also draw the answers")

    export = command("export", "write an index for FAISS, or as NumPy arrays")
    export.add_argument("--index", type=os.path.expanduser, required=True)
    export.add_argument("--out", type=os.path.expanduser, required=True)
    export.add_argument("--format", choices=("faiss", "npz"), default="faiss")

    serve = command("serve", "a search page for an index, on this machine only")
    serve.add_argument("--index", type=os.path.expanduser, required=True)
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--k", type=_positive, default=10)

    prepare = command("prepare", "prepare a dataset once from its published files, without network")
    prepare.add_argument("--dataset", required=True, help="cifar10, mirflickr25k, nus_wide or nus_wide/concepts81")
    prepare.add_argument(
        "--files",
        type=os.path.expanduser,
        default="",
        help="folder of the files (default: <data_dir>/downloads/manual)",
    )
    prepare.add_argument(
        "--data_dir", type=os.path.expanduser, default="", help="where TFDS keeps datasets (default: its own choice)"
    )
    prepare.add_argument(
        "--unverified", action="store_true", help="take other files than the published ones, of the same layout"
    )

    doctor = command("doctor", "check versions, devices, and whether a config and its images fit them")
    doctor.add_argument("--config", metavar="FILE[:ARG]")
    doctor.add_argument("--workdir", type=os.path.expanduser, help="is it shared and writable, what does it hold")
    doctor.add_argument("--expect_processes", type=_positive, metavar="N", help="a problem if there are more or fewer")
    doctor.add_argument("--expect_devices", type=_positive, metavar="N", help="of all processes, likewise")

    for joined in (train, evaluate, index, doctor):
        joined.add_argument("--distributed", action="store_true", help="one process of several, as JAX detects it")
        joined.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where JAX does not detect it")
        joined.add_argument("--processes", type=_positive, metavar="N", help="how many, then")
        joined.add_argument("--process_id", type=int, metavar="I", help="which of them this is, from 0")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _steps(text: str) -> tuple[int, int]:
    first, _, behind = text.partition(":")
    if not (first.isdecimal() and behind.isdecimal() and 0 < int(first) < int(behind)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form 10:20, the first step and the one behind the last"
        )
    return int(first), int(behind)


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from tcq import config, train

    found = config.load(arguments.config, overrides, workdir=arguments.workdir)
    train.train(found, arguments.workdir, profile=arguments.profile, allow_changes=arguments.allow_changes)
    print(f"trained: {arguments.workdir}")
    if arguments.evaluate:
        _score(arguments.workdir, arguments.evaluate)
    return 0


def _sweep(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from tcq import sweep

    a = arguments
    sweep.sweep(a.config, a.grid, a.workdir, overrides=overrides, jobs=a.jobs, checkpoint=a.checkpoint)
    for name in ("table.csv", "table.md", "sweep.png"):
        print(f"{a.workdir}/{name}")
    return 0


def _evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    _score(arguments.workdir, arguments.checkpoint, overrides=overrides, recorded=arguments.recorded)
    return 0


def _score(workdir: str, checkpoint: str, *, overrides: Sequence[str] = (), recorded: str | None = None) -> None:
    from tcq import evaluate

    beside = evaluate.read_recorded(recorded) if recorded else None
    results = evaluate.evaluate(workdir, which=checkpoint, overrides=overrides)
    print(evaluate.table(results, beside))
    for name in ("results.json", "curves.png", "gallery.png"):
        print(f"{workdir}/{name}")


def _index(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq import index

    if arguments.remove:
        print(f"removed {index.remove(arguments.out, arguments.remove):,} images from {arguments.out}")
        return 0
    if not arguments.images:
        raise index.IndexFileError("--images is missing: the folder whose images are to be indexed")
    if arguments.add:
        count, skipped = index.add(arguments.out, arguments.images)
        print(f"added {count:,} images to {arguments.out}")
    else:
        if not arguments.workdir:
            raise index.IndexFileError("--workdir is missing: the training run whose model encodes the images")
        count, skipped = index.build(arguments.workdir, arguments.images, arguments.out, which=arguments.checkpoint)
        print(f"indexed {count:,} images: {arguments.out}")
    if skipped:
        print(f"{len(skipped):,} files skipped, listed with reasons in {arguments.out}/skipped.jsonl")
    return 0


def _search(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq import index

    opened = index.open_index(arguments.index)
    queries = index.read_queries(opened, arguments.query)
    answers = index.search(opened, queries, k=arguments.k)
    for query, hits in zip(arguments.query, answers, strict=True):
        if len(answers) > 1:
            print(f"# {query}")
        for rank, hit in enumerate(hits, 1):
            print(f"{rank}\t{hit.score:.6f}\t{hit.path}")
    if arguments.gallery:
        index.draw(opened, queries, answers, arguments.gallery)
        print(f"gallery: {arguments.gallery}", file=sys.stderr)
    return 0


def _export(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq.index import export

    print(export.export(arguments.index, arguments.out, format=arguments.format))
    return 0


def _serve(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq.index import serve

    serve.serve(arguments.index, port=arguments.port, k=arguments.k)
    return 0


def _prepare(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq.data.datasets import prepare

    made = prepare.prepare(
        arguments.dataset, files=arguments.files, data_dir=arguments.data_dir, verify=not arguments.unverified
    )
    print(f"prepared: {made}")
    return 0


def _doctor(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from tcq import doctor
    from tcq.runtime import processes

    expected = doctor.Expected(arguments.expect_processes, arguments.expect_devices)
    lines, problems = doctor.report(arguments.config, overrides, workdir=arguments.workdir, expected=expected)
    print("\n".join(lines))
    if processes.first():
        for problem in problems:
            print(f"tcq doctor: {problem}", file=sys.stderr)
    return 2 if problems else 0


COMPILES = ("train", "evaluate", "index", "search", "serve")
RUN = {
    "train": _train,
    "sweep": _sweep,
    "evaluate": _evaluate,
    "index": _index,
    "search": _search,
    "export": _export,
    "serve": _serve,
    "prepare": _prepare,
    "doctor": _doctor,
}


def console() -> None:
    """The console script `tcq`."""
    sys.exit(main())
