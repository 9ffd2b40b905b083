"""tcq: unlabelled images to a compact, searchable index.

Exit status 0: done; 1: failed on the way; 2: the arguments, the config or a file is invalid; 128 + n: stopped by signal
  n.
"""

import argparse
import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tcq import cli_duplicates, cli_index, cli_search, flags
from tcq.runtime import log, signals, storage


def console() -> None:
    """The console script `tcq`: handles signals, and exits with the status of the command."""
    signals.install()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold any bytes
    status = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    A user's mistake is one message, without a traceback.
    """
    parser = make_parser()
    arguments, overrides = parser.parse_known_args(argv)
    _check_arguments(parser, arguments, overrides)
    log.show(logging.WARNING if arguments.quiet else getattr(logging, arguments.log_level.upper()))
    if "distributed" in arguments and (arguments.distributed or arguments.coordinator):
        return _run_as_one_of_several(arguments, overrides)
    return _run(arguments, overrides)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="tcq", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_train,
        _add_sweep,
        _add_evaluate,
        _add_judge,
        _add_embed,
        cli_index.add_encode,
        cli_index.add_index,
        cli_search.add_search,
        cli_duplicates.add_duplicates,
        cli_search.add_serve,
        cli_index.add_export,
        cli_index.add_push,
        _add_prepare,
        _add_cache,
        _add_doctor,
    ):
        add(commands)
    return parser


def _check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Exits with a message for an unknown flag, or an incomplete --coordinator."""
    for argument in overrides:
        takes_overrides = "config" in arguments or arguments.command == "evaluate"
        if not takes_overrides or not argument.startswith(("--config.", "--noconfig.")):
            parser.error(f"unknown argument {argument!r} for {arguments.command}")
    if "distributed" in arguments:
        given = [f"--{name}" for name in ("processes", "process_id") if getattr(arguments, name) is not None]
        if given and not arguments.coordinator:
            parser.error(f"{' and '.join(given)} must come with --coordinator=HOST:PORT, the address of process 0")
        if arguments.coordinator and len(given) < 2:
            parser.error("--coordinator needs --processes=N and --process_id=I, which differs for each process")


def _run_as_one_of_several(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs a command as one process of a run; the other processes learn if this one fails."""
    import jax

    from tcq.runtime import processes

    try:
        processes.join(
            coordinator=arguments.coordinator, processes=arguments.processes, process_id=arguments.process_id
        )
        if not processes.is_first():
            sys.stdout = open(os.devnull, "w")  # only process 0 prints results
        status = _run(arguments, overrides)
    except processes.ProcessError as error:
        print(f"tcq {arguments.command}: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError:
        traceback.print_exc()
        processes.wait_for_diagnosis()
        processes.fail("a device or a collective failed, see its log", 1)
        return 1
    except BaseException as error:
        traceback.print_exc()
        processes.fail(f"{type(error).__name__}: {error}", 1)
        return 1
    if status > 128:
        processes.exit_stopped(status)
    if status:
        processes.fail(f"status {status}, see its log", status)
    processes.leave()
    return status


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs a command, and prints the errors that a user can fix as one message."""
    from tcq.runtime import processes

    try:
        if arguments.compiles:
            from tcq.runtime import devices

            devices.cache_compilations()
        return arguments.run(arguments, overrides)
    except signals.Stopped as stopped:
        print(f"tcq {arguments.command}: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"tcq {arguments.command}: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError) as error:
        if not type(error).__module__.startswith("tcq."):
            raise  # a defect of tcq: show its traceback
        print(f"tcq {arguments.command}: {error}", file=sys.stderr)
        return 2 if processes.is_refusal(error) else 1


def _add_train(commands: flags.Commands) -> None:
    help = "train a model, or resume training; --config.group.key=value overrides a key"
    parser = flags.add_command(commands, "train", help, _train, compiles=True)
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="for example configs/digits.py")
    parser.add_argument(
        "--workdir", type=flags.path, required=True, help="folder, or gs:// URL, of everything of this run"
    )
    parser.add_argument("--allow_changes", action="store_true", help="resume with another config than the run had")
    parser.add_argument(
        "--profile", type=flags.steps, metavar="START:STOP", help="write a trace of these steps to the workdir"
    )
    parser.add_argument(
        "--evaluate",
        type=flags.checkpoint,
        metavar="CHECKPOINT",
        help="score at the end: best (by validation) or latest",
    )
    flags.add_distributed(parser)


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from tcq import config, train

    loaded = config.load(arguments.config, overrides, workdir=arguments.workdir)
    train.train(loaded, arguments.workdir, profile=arguments.profile, allow_changes=arguments.allow_changes)
    print(f"trained: {arguments.workdir}")
    if arguments.evaluate:
        _score(arguments.workdir, arguments.evaluate)
    return 0


def _add_sweep(commands: flags.Commands) -> None:
    parser = flags.add_command(
        commands, "sweep", "train and score a grid of configs, with a table and a plot; resumable", _sweep
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="for example configs/digits.py")
    parser.add_argument("--grid", required=True, help="for example 'loss.clip=0,0.1; train.seed=0,1,2'")
    parser.add_argument(
        "--workdir", type=flags.path, required=True, help="gets table.csv, table.md, sweep.png and cells/"
    )
    parser.add_argument("--jobs", type=flags.positive, default=1, help="cells at a time (default: 1)")
    parser.add_argument(
        "--axes", default="", metavar="KEY[,KEY]", help="keys of the x axis and of the lines of the plot"
    )
    parser.add_argument(
        "--checkpoint",
        type=flags.checkpoint,
        default="best",
        help="checkpoint to score: best (by validation) or latest (default: best)",
    )


def _sweep(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from tcq import sweep

    a = arguments
    axes = a.axes.split(",") if a.axes else []
    sweep.sweep(a.config, a.grid, a.workdir, overrides=overrides, jobs=a.jobs, checkpoint=a.checkpoint, axes=axes)
    for name in (sweep.TABLE, sweep.MARKDOWN, sweep.PLOT):
        print(f"{a.workdir}/{name}")
    return 0


def _add_evaluate(commands: flags.Commands) -> None:
    help = "score a trained model under its protocol; --config.eval.key=value overrides a convention"
    parser = flags.add_command(commands, "evaluate", help, _evaluate, compiles=True)
    parser.add_argument(
        "--workdir",
        type=flags.path,
        required=True,
        help="workdir of the training run; results.json and pictures are written to it",
    )
    flags.add_checkpoint(parser)
    parser.add_argument("--root", type=flags.path, help="where the image folder of the run is now, if it was moved")
    parser.add_argument("--recorded", metavar="JSON", help='file {"mAP": {name: value}} of scores to add to the table')
    flags.add_distributed(parser)


def _evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    a = arguments
    _score(a.workdir, a.checkpoint, overrides=overrides, recorded=a.recorded, root=a.root)
    return 0


def _score(
    workdir: str,
    checkpoint: str,
    *,
    overrides: Sequence[str] = (),
    recorded: str | None = None,
    root: str | None = None,
) -> None:
    from tcq import evaluate
    from tcq.evaluate import clipped, report

    figures = evaluate.read_recorded(recorded) if recorded else None
    results = evaluate.evaluate(workdir, which=checkpoint, overrides=overrides, root=root)
    print(evaluate.table(results, figures))
    written = (report.RESULTS, report.QUERIES, report.CURVES, report.GALLERY, clipped.CLIPPED)
    for name in [report.beside(n, overrides) for n in written]:
        if storage.read(storage.join(workdir, name)) is not None:
            print(f"{workdir}/{name}")


def _add_judge(commands: flags.Commands) -> None:
    help = "ask which images are the same kind of thing, and say how much to clip"
    parser = flags.add_command(commands, "judge", help, _judge, compiles=True)
    parser.add_argument("--workdir", type=flags.path, required=True, help="workdir of a short first training run")
    parser.add_argument(
        "--answers", type=flags.positive, default=50, help="answers in all, about 8 images each (default: 50)"
    )
    by = parser.add_mutually_exclusive_group()
    by.add_argument("--labels", action="store_true", help="let the labels of the images answer")
    by.add_argument("--page", action="store_true", help="ask on a page in the browser, not in the terminal")
    flags.add_address(parser, port=8001)


def _judge(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq import web
    from tcq.evaluate import judge

    a = arguments
    if not a.page:
        print(judge.text(judge.run(a.workdir, count=a.answers, labels=a.labels)))
        return 0
    web.check_installed("tcq judge --page")
    from tcq.evaluate import judge_page

    source, judge_by = judge.prepare(a.workdir, count=a.answers, labels=False)
    print(judge.text(judge_page.run(judge_by, source, host=a.host, port=a.port, proxy=a.proxy)))
    return 0


def _add_embed(commands: flags.Commands) -> None:
    help = (
        "embed a source, and views of its images, by a function or by weights, into a folder of .npy and Parquet files"
    )
    parser = flags.add_command(commands, "embed", help, _embed, compiles=True)
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", required=True, help="a config with model.embedder or model.weights"
    )
    parser.add_argument("--out", type=flags.path, required=True, help="new folder, for data.source=embeddings:<folder>")
    flags.add_distributed(parser)


def _embed(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from tcq import config, embed

    count = embed.write(config.load(arguments.config, overrides), arguments.out)
    print(f"embedded {count:,} images: {arguments.out}")
    return 0


def _add_prepare(commands: flags.Commands) -> None:
    parser = flags.add_command(
        commands, "prepare", "prepare a dataset once from its published files, without network", _prepare
    )
    parser.add_argument("--dataset", required=True, help="cifar10, mirflickr25k, nus_wide or nus_wide/concepts81")
    parser.add_argument(
        "--files", type=flags.path, default="", help="folder of the files (default: <data_dir>/downloads/manual)"
    )
    parser.add_argument(
        "--data_dir", type=flags.path, default="", help="folder of TFDS datasets (default: that of TFDS)"
    )
    parser.add_argument("--unverified", action="store_true", help="accept other files than the published ones")


def _prepare(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq.data.datasets import prepare

    folder = prepare.prepare(
        arguments.dataset, files=arguments.files, data_dir=arguments.data_dir, verify=not arguments.unverified
    )
    print(f"prepared: {folder}")
    return 0


def _add_cache(commands: flags.Commands) -> None:
    parser = flags.add_command(commands, "cache", "show what is cached, or delete what has not been used", _cache)
    parser.add_argument("--cache_dir", type=flags.path, default="", help="as data.cache_dir (default: that of tcq)")
    parser.add_argument(
        "--delete_unused", type=flags.number(0), metavar="DAYS", help="delete what was not used for DAYS; 0: all"
    )


def _cache(arguments: argparse.Namespace, _: list[str]) -> int:
    from tcq.data import cleaning

    home = Path(arguments.cache_dir) if arguments.cache_dir else storage.cache_home()
    if arguments.delete_unused is not None:
        deleted = cleaning.delete_unused(home, days=arguments.delete_unused)
        print(f"deleted {deleted / 2**20:,.1f} MiB")
    print(home)
    for part in cleaning.usage(home):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(part.used)) if part.used else "-"
        print(f"{part.bytes / 2**20:>12,.1f} MiB  {part.items:>9,}  {used:<16}  {part.what}")
    return 0


def _add_doctor(commands: flags.Commands) -> None:
    help = "check versions and devices, and whether a config, its images and a workdir fit them"
    parser = flags.add_command(commands, "doctor", help, _doctor)
    parser.add_argument("--config", metavar="FILE[:ARG]", help="for example configs/digits.py")
    parser.add_argument("--workdir", type=flags.path, help="check whether it is shared and writable, and what it holds")
    parser.add_argument(
        "--expect_processes", type=flags.positive, metavar="N", help="fail unless the run has this many processes"
    )
    parser.add_argument(
        "--expect_devices",
        type=flags.positive,
        metavar="N",
        help="fail unless all processes together have this many devices",
    )
    flags.add_distributed(parser)


def _doctor(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from tcq import doctor
    from tcq.runtime import processes

    expected = doctor.Expected(arguments.expect_processes, arguments.expect_devices)
    findings = doctor.report(arguments.config, overrides, workdir=arguments.workdir, expected=expected)
    print("\n".join(findings.lines))
    if processes.is_first():
        for problem in findings.problems:
            print(f"tcq doctor: {problem}", file=sys.stderr)
    return 2 if findings.problems else 0
