"""Processes as one run: they join it, exchange small values, and detect failed processes.

Everything goes through JAX's coordination service, which process 0 hosts. With one process nothing happens.
"""

import hashlib
import json
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax

from tcq.runtime import signals, storage

HEARTBEAT = 1.0  # seconds between two heartbeats of a process
SILENT = float(
    os.environ.get("TCQ_SILENT_SECONDS", "20")
)  # seconds without a heartbeat after which a process counts as dead
STALLED = float(os.environ.get("TCQ_STALLED_SECONDS", "1800"))  # a run in which no process advances for so long ends
STOP_TOGETHER = 8.0  # seconds within which all processes of a stopped run are done
JAX_HEARTBEAT = 60  # seconds; JAX's own check, which does not say which process is gone
_DAY = 86_400_000  # milliseconds; a process that is gone is noticed by its heartbeat instead
T = TypeVar("T")

logger = logging.getLogger(__name__)


class ProcessError(RuntimeError):
    """The processes of a run cannot come together, or one failed; the message names it."""


class RefusedError(ValueError):
    """Process 0 refused arguments, config or file; the message is the one of process 0."""


class _Run:
    """What this process knows of its run."""

    exchanges = 0
    phase = "starting"
    watching = False


def join(*, coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the run; without arguments as JAX detects it (TPU, SLURM, Kubernetes, Open MPI).

    Call it before anything uses a device. From then on the other processes log only errors.
    Raises ProcessError if the processes cannot come together.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would replace the handler of SIGTERM
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process_id,
            heartbeat_timeout_seconds=JAX_HEARTBEAT,
            shutdown_timeout_seconds=30,
        )
    except (RuntimeError, ValueError) as error:
        how = f"coordinator {coordinator}, {processes} processes, this is {process_id}"
        raise ProcessError(
            f"the processes cannot connect ({how if coordinator else 'detected by JAX'}): {error}\n"
            f"give each of them --coordinator=HOST:PORT of process 0, --processes and --process_id"
        ) from None
    if not is_first():
        logging.getLogger("tcq").setLevel(logging.ERROR)
    _Run.watching = True
    threading.Thread(target=_watch, name="processes", daemon=True).start()


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, the one that writes and logs."""
    return jax.process_index() == 0


def share(count: int) -> tuple[int, int]:
    """Start and stop of this process's part of `count` pieces of work."""
    n, i = jax.process_count(), jax.process_index()
    return i * count // n, (i + 1) * count // n


def set_phase(text: str) -> None:
    """Sets what this process is doing, which the others report if it stops responding."""
    _Run.phase = text


def exchange(value: Any) -> list[Any]:
    """The values of all processes, in their order.

    All of them have to call it; values are small and fit JSON.
    """
    if not several():
        return [value]
    _Run.exchanges += 1
    client, prefix = _client(), f"tcq/exchange/{_Run.exchanges}"
    client.key_value_set(f"{prefix}/{jax.process_index()}", json.dumps(value))
    texts = [client.blocking_key_value_get(f"{prefix}/{i}", _DAY) for i in range(jax.process_count())]
    return [json.loads(text) for text in texts]


def on_first(function: Callable[[], T]) -> T:
    """The result of a function that only process 0 calls while the others wait.

    The result fits JSON. If the function raises, all processes raise: RefusedError or ProcessError, or Stopped if
    process 0 was stopped.
    """
    if not several():
        return function()
    if not is_first():
        outcome = exchange(None)[0]
        if "stopped" in outcome:
            signals.request(outcome["stopped"])
            signals.check()
        if "error" in outcome:
            raise (RefusedError if outcome["refused"] else ProcessError)(f"process 0: {outcome['error']}")
        return outcome["value"]
    try:
        value = function()
    except signals.Stopped:
        exchange({"stopped": signals.requested()})
        raise
    except Exception as error:
        exchange({"error": str(error), "refused": is_refusal(error)})
        raise
    exchange({"value": value})
    return value


@contextmanager
def entered_by_first(make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Enters a context, such as a lock, in process 0 only.

    If that raises, all processes raise as in `on_first`.
    """
    with ExitStack() as stack:
        on_first(lambda: bool(stack.enter_context(make())))
        yield


def is_refusal(error: Exception) -> bool:
    """Whether an error says that a call, config, file or file system cannot work.

    The exit status is then 2.
    """
    ours = type(error).__module__.startswith("tcq.")
    return isinstance(error, OSError) or (ours and isinstance(error, ValueError))


def require_same(what: str, value: Any) -> None:
    """Raises ProcessError in all processes if a value differs from that of process 0.

    The error names the processes whose value differs.
    """
    text = json.dumps(value, sort_keys=True)
    values = exchange([hashlib.sha256(text.encode()).hexdigest(), platform.node()])
    different = [f"process {i} on {host}" for i, (digest, host) in enumerate(values) if digest != values[0][0]]
    if different:
        raise ProcessError(
            f"the {what} of {', '.join(different)} differ from those of process 0 on {values[0][1]}: "
            f"all processes need the same"
        )


def require_visible(path: str | Path) -> None:
    """Raises ProcessError in all processes if one of them does not see a file.

    Process 0 has written the file. The error names the processes that do not see it.
    """
    values = exchange([storage.read(path) is not None, platform.node()])
    missing = [f"process {i} on {host}" for i, (visible, host) in enumerate(values) if not visible]
    if missing:
        raise ProcessError(f"{path} is not found by {', '.join(missing)}: all processes have to share the folder")


def agree_to_stop() -> None:
    """Raises Stopped in all processes if any got a signal to stop. All have to call it."""
    names = [name for name in exchange(signals.requested()) if name]
    if names:
        signals.request(names[0])
        signals.check()


def leave() -> None:
    """Leaves the run without an error."""
    if _Run.watching:
        _Run.watching = False
        _send_heartbeat(leaving=True)


def fail(message: str, status: int) -> None:
    """Tells the other processes why this one ends, so that they do not wait for it, and exits."""
    if not _Run.watching:
        return
    _Run.watching = False
    try:
        _client().key_value_set(f"tcq/failed/{jax.process_index()}", f"{platform.node()}: {message.splitlines()[0]}")
        time.sleep(3 * HEARTBEAT)
    except Exception:  # process 0, which hosts the service, is gone as well
        pass
    _exit(status)


def exit_stopped(status: int) -> None:
    """Exits after a signal, once the others have stopped or 2 x `STOP_TOGETHER` has passed."""
    if not _Run.watching:
        return
    _Run.watching = False
    try:
        _client().key_value_set(f"tcq/stopped/{jax.process_index()}", str(status))
        _ask_to_stop()
        _send_heartbeat(leaving=True)
        end = time.monotonic() + 2 * STOP_TOGETHER
        while time.monotonic() < end and len(_client().key_value_dir_get("tcq/stopped/")) < jax.process_count():
            time.sleep(HEARTBEAT / 4)
        time.sleep(HEARTBEAT if is_first() else 0)  # process 0 hosts the service that the others read
    except Exception:  # process 0, which hosts the service, is gone as well
        pass
    _exit(status)


def wait_for_diagnosis() -> None:
    """Waits after a failed collective until the watchdog has named the failed process."""
    if _Run.watching:
        time.sleep(SILENT + 5 * HEARTBEAT)


def _client() -> Any:
    from jax._src import distributed  # the only way to JAX's key-value store; Orbax takes it, too

    return distributed.global_state.client


def _read(folder: str) -> dict[int, str]:
    """Entries of a folder of the key-value store, by number of the process that wrote them."""
    return {int(key.rpartition("/")[2]): value for key, value in _client().key_value_dir_get(f"tcq/{folder}/")}


def _send_heartbeat(*, leaving: bool = False) -> None:
    beat = {"time": time.time(), "host": platform.node(), "pid": os.getpid(), "phase": _Run.phase, "leaving": leaving}
    beat["polls"] = signals.polls()
    _client().key_value_set(f"tcq/alive/{jax.process_index()}", json.dumps(beat), allow_overwrite=True)


def _ask_to_stop() -> None:
    """Tells the other processes of a signal to stop, if this one got one."""
    if signals.requested():
        _client().key_value_set(f"tcq/stop/{jax.process_index()}", str(signals.requested()), allow_overwrite=True)


def _watch() -> None:
    """Sends heartbeats, and watches the other processes.

    It ends this process when another one fails, is silent, stalls, or stops by a signal.
    """
    observations = _Observations()
    while _Run.watching:
        try:
            _send_heartbeat()
            _ask_to_stop()
            for name in _read("stop").values():
                signals.request(name)
            failed, stopped = _read("failed"), _read("stopped")
            alive = {i: json.loads(text) for i, text in _read("alive").items()}
        except Exception as error:
            if _Run.watching:
                _end(f"process 0, which hosts the coordination service, is gone ({str(error).splitlines()[0][:200]})")
            return
        if not _Run.watching:
            return
        reason = (
            observations.stop_reason(stopped)
            or observations.failure(failed)
            or observations.silence(alive)
            or observations.stall(alive)
        )
        if reason:
            _end(*reason)
        time.sleep(HEARTBEAT)


class _Observations:
    """What the watchdog has seen of the other processes so far, and when."""

    def __init__(self) -> None:
        self.stopped_since: dict[int, float] = {}
        self.heartbeats: dict[int, tuple[float, float]] = {}  # of each process the last one, and when it was new
        self.phases: dict[int, tuple[str, int]] = {}
        self.advanced = time.monotonic()

    def stop_reason(self, stopped: dict[int, str]) -> tuple[str, int] | None:
        """The reason to exit if another process stopped over `STOP_TOGETHER` ago; else None."""
        now = time.monotonic()
        for i, status in stopped.items():
            if now - self.stopped_since.setdefault(i, now) > STOP_TOGETHER:
                return f"process {i} was stopped by a signal", int(status)
        return None

    def failure(self, failed: dict[int, str]) -> tuple[str, int] | None:
        """The reason to exit if another process reported a failure; else None."""
        others = {i: message for i, message in failed.items() if i != jax.process_index()}
        return next(((f"process {i} failed on {message}", 1) for i, message in others.items()), None)

    def silence(self, alive: dict[int, dict[str, Any]]) -> tuple[str, int] | None:
        """The reason to exit if another process sent no heartbeat for `SILENT` s; else None."""
        now = time.monotonic()
        for i, beat in alive.items():
            if self.heartbeats.get(i, (0.0, 0.0))[0] != beat["time"]:
                self.heartbeats[i] = beat["time"], now
            if now - self.heartbeats[i][1] > SILENT and not beat["leaving"] and i != jax.process_index():
                who = f"process {i} (pid {beat['pid']} on {beat['host']})"
                return f"{who} has sent no heartbeat for {SILENT:.0f} s; its last phase: {beat['phase']}", 1
        return None

    def stall(self, alive: dict[int, dict[str, Any]]) -> tuple[str, int] | None:
        """The reason to exit if no process has advanced for `STALLED` seconds; else None."""
        now = time.monotonic()
        phases = {i: (beat["phase"], beat["polls"]) for i, beat in alive.items()}
        if phases != self.phases:
            self.phases, self.advanced = phases, now
        if now - self.advanced <= STALLED:
            return None
        listed = "\n".join(f"  process {i} on {alive[i]['host']}: {p}" for i, (p, _) in sorted(phases.items()))
        return f"no process has advanced for {STALLED / 60:.0f} minutes:\n{listed}", 1


def _end(message: str, status: int = 1) -> None:
    logger.error(f"process {jax.process_index()} exits: {message}")
    _exit(status)


def _exit(status: int) -> None:
    """Exits without waiting for the other processes, as JAX would at a normal exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
