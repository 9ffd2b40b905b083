"""Several processes as one run: joining it, agreeing on small things, and noticing when one of them is gone.

All of it goes through JAX's coordination service, which process 0 hosts. Where there is one process nothing happens.
"""

import hashlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from tcq.runtime import log as journal
from tcq.runtime import signals
from tcq.runtime import storage as buckets

BEAT = 1.0  # seconds between signs of life
TOGETHER = 8.0  # seconds within which all processes are done that a signal stops
SILENT = 20.0  # without one for so long, a process is taken for dead
STALLED = 1800.0  # no process has got further for so long
JAX_HEARTBEAT = 60  # seconds; JAX's own check, which ends a process without our words
_DAY = 86_400_000  # milliseconds: who is gone is noticed by other means
T = TypeVar("T")


class ProcessError(RuntimeError):
    """The processes of a run cannot come together, or another one failed; the message names it."""


class RefusedError(ValueError):
    """The first process refused a call, config or file; the message is its own."""


class _Run:
    """What this process knows of the others."""

    exchanges = 0
    phase = "starting"
    watching = False


def join(*, coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the run; with no arguments as JAX detects it (TPU, SLURM, Kubernetes, Open MPI).

    Before anything touches a device. Raises ProcessError where that fails.
    """
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process_id,
            heartbeat_timeout_seconds=JAX_HEARTBEAT,
            shutdown_timeout_seconds=30,
        )
    except (RuntimeError, ValueError) as error:
        told = (
            f"coordinator {coordinator}, {processes} processes, this is {process_id}"
            if coordinator
            else "detection by JAX"
        )
        raise ProcessError(
            f"the processes cannot come together ({told}): {error}\n"
            f"give --coordinator=HOST:PORT of process 0, --processes and --process_id to each of them"
        ) from None
    journal.quiet = not first()
    _Run.watching = True
    threading.Thread(target=_watch, name="processes", daemon=True).start()


def several() -> bool:
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def share(count: int) -> tuple[int, int]:
    """From where to where this process does its part of so many pieces of work."""
    n, i = jax.process_count(), jax.process_index()
    return i * count // n, (i + 1) * count // n


def phase(text: str) -> None:
    """What this process does now, for the others to tell when it does not come back."""
    _Run.phase = text


def exchange(value: Any) -> list[Any]:
    """The values of all processes, in their order; small, and of what JSON can hold. All of them have to call it."""
    if not several():
        return [value]
    _Run.exchanges += 1
    client, prefix = _client(), f"tcq/exchange/{_Run.exchanges}"
    client.key_value_set(f"{prefix}/{jax.process_index()}", json.dumps(value))
    found = [client.blocking_key_value_get(f"{prefix}/{i}", _DAY) for i in range(jax.process_count())]
    return [json.loads(text) for text in found]


def on_first(function: Callable[[], T]) -> T:
    """What the first process makes of a function, of what JSON can hold; the others wait. Its error ends all of them."""
    if not several():
        return function()
    if not first():
        outcome = exchange(None)[0]
        if "stopped" in outcome:
            signals.ask(outcome["stopped"])
            signals.check()
        if "error" in outcome:
            raise (RefusedError if outcome["refused"] else ProcessError)(f"process 0: {outcome['error']}")
        return outcome["value"]
    try:
        value = function()
    except signals.Stopped:
        exchange({"stopped": signals.asked()})
        raise
    except Exception as error:
        exchange({"error": str(error), "refused": refused(error)})
        raise
    exchange({"value": value})
    return value


def refused(error: Exception) -> bool:
    """Whether an error says that a call, config, file or file system cannot work, which is exit status 2."""
    ours = type(error).__module__.startswith("tcq.")
    return isinstance(error, OSError) or (ours and isinstance(error, ValueError))


def same(what: str, value: Any) -> None:
    """Raises ProcessError in all processes, naming those where a value is another one than in process 0."""
    text = json.dumps(value, sort_keys=True)
    found = exchange([hashlib.sha256(text.encode()).hexdigest(), platform.node()])
    odd = [f"process {i} on {host}" for i, (digest, host) in enumerate(found) if digest != found[0][0]]
    if odd:
        raise ProcessError(
            f"the {what} of {', '.join(odd)} are not those of process 0 on {found[0][1]}: all need the same"
        )


def sees(path: str | Path) -> None:
    """Raises ProcessError in all processes, naming those that do not see a file which process 0 wrote."""
    found = exchange([buckets.read(path) is not None, platform.node()])
    blind = [f"process {i} on {host}" for i, (there, host) in enumerate(found) if not there]
    if blind:
        raise ProcessError(f"{path} is not there for {', '.join(blind)}: the folder has to be shared by all processes")


def agree_to_stop() -> None:
    """Raises Stopped in all processes if one of them was asked to stop. All of them have to call it."""
    found = [name for name in exchange(signals.asked()) if name]
    if found:
        signals.ask(found[0])
        signals.check()


def leave() -> None:
    """This process is done, without an error."""
    if _Run.watching:
        _Run.watching = False
        _beat(left=True)


def fail(message: str, status: int) -> None:
    """Ends this process of several, so that the others learn why instead of waiting for it."""
    if not _Run.watching:
        return
    _Run.watching = False
    try:
        _client().key_value_set(f"tcq/failed/{jax.process_index()}", f"{platform.node()}: {message.splitlines()[0]}")
        time.sleep(3 * BEAT)
    except Exception:  # the service is gone as well
        pass
    _exit(status)


def stopped(status: int) -> None:
    """Ends this process of several, which a signal stopped: when the others are done, too, or after a while."""
    if not _Run.watching:
        return
    _Run.watching = False
    try:
        _client().key_value_set(f"tcq/stopped/{jax.process_index()}", str(status))
        end = time.monotonic() + 2 * TOGETHER
        while time.monotonic() < end and len(_client().key_value_dir_get("tcq/stopped/")) < jax.process_count():
            time.sleep(BEAT / 4)
        time.sleep(BEAT if first() else 0)  # process 0 is who the others ask
    except Exception:  # the service is gone as well
        pass
    _exit(status)


def wait_for_blame() -> None:
    """After a collective broke: another process is probably gone, and the watch will say which one and end this one."""
    if _Run.watching:
        time.sleep(SILENT + 5 * BEAT)


def _client() -> Any:
    from jax._src import distributed  # JAX offers its key-value store nowhere else; Orbax takes it from here, too

    return distributed.global_state.client


def _beat(*, left: bool = False) -> None:
    told = {"time": time.time(), "host": platform.node(), "pid": os.getpid(), "phase": _Run.phase, "left": left}
    told["moves"] = journal.Moves.count
    _client().key_value_set(f"tcq/alive/{jax.process_index()}", json.dumps(told), allow_overwrite=True)


def _watch() -> None:
    """Tells the others that this process lives, and ends it when one of them does not, or asks to stop."""
    mine, moved = jax.process_index(), time.monotonic()
    since: dict[int, float] = {}
    heard: dict[int, tuple[float, float]] = {}  # what each said last, and when that was new
    phases: dict[int, tuple[str, int]] = {}
    while _Run.watching:
        try:
            _beat()
            failed = _numbered(_client().key_value_dir_get("tcq/failed/"))
            halted = _numbered(_client().key_value_dir_get("tcq/stopped/"))
            alive = {i: json.loads(v) for i, v in _numbered(_client().key_value_dir_get("tcq/alive/")).items()}
            if signals.asked():
                _client().key_value_set("tcq/stop", str(signals.asked()), allow_overwrite=True)
            for _, name in _client().key_value_dir_get("tcq/stop"):
                signals.ask(name)
        except Exception as error:
            if _Run.watching:
                _end(f"process 0, which the others report to, is gone ({str(error).splitlines()[0][:200]})")
            return
        now = time.monotonic()
        if not _Run.watching:
            return
        for i, status in halted.items():
            if now - since.setdefault(i, now) > TOGETHER:  # it is not to be waited for
                _end(f"process {i} was stopped by a signal", int(status))
        for i, message in failed.items():
            if i != mine:
                _end(f"process {i} failed on {message}")
        for i, told in alive.items():
            if heard.get(i, (0.0, 0.0))[0] != told["time"]:
                heard[i] = told["time"], now
            if now - heard[i][1] > SILENT and not told["left"] and i != mine:
                who = f"process {i} (pid {told['pid']} on {told['host']})"
                _end(f"{who} has given no sign of life for {SILENT:.0f} s; it was last at: {told['phase']}")
        if phases != (phases := {i: (told["phase"], told["moves"]) for i, told in alive.items()}):
            moved = now
        if now - moved > STALLED:
            listed = "\n".join(f"  process {i} on {alive[i]['host']}: {p}" for i, (p, _) in sorted(phases.items()))
            _end(f"no process has got further for {STALLED / 60:.0f} minutes:\n{listed}")
        time.sleep(BEAT)


def _numbered(entries: list[tuple[str, str]]) -> dict[int, str]:
    return {int(key.rpartition("/")[2]): value for key, value in entries}


def _end(message: str, status: int = 1) -> None:
    print(f"tcq: process {jax.process_index()} stops: {message}", file=sys.stderr)
    _exit(status)


def _exit(status: int) -> None:
    """Without waiting for the others, as JAX would at a usual exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
