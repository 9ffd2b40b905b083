import logging
import subprocess
import sys

import small
from tcq.runtime import log


def test_a_library_user_sees_only_warnings():
    """No handler is added on import: Python prints warnings, and nothing else."""
    code = "import logging, tcq.train; l = logging.getLogger('tcq.train'); l.info('quiet'); l.warning('loud')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=small.environment())
    assert "loud" in done.stderr and "quiet" not in done.stderr and done.stdout == ""


def test_lines_have_time_and_level(capsys):
    try:
        log.show(logging.INFO)
        logger = logging.getLogger("tcq.anything")
        for level in ("debug", "info", "warning", "error"):
            getattr(logger, level)(f"a message of {level}")
    finally:
        logging.getLogger("tcq").handlers.clear()
        logging.getLogger("tcq").propagate = True
    lines = [line.split(" ", 1) for line in capsys.readouterr().err.splitlines()]
    assert [text for _, text in lines] == [
        "a message of info",
        "warning: a message of warning",
        "error: a message of error",
    ]
    assert all(len(time.split(":")) == 3 for time, _ in lines)


def test_progress_is_throttled_and_complete(monkeypatch, logs):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    progress = log.Progress(logging.getLogger("tcq.test"), "reading", 100, unit="files")
    for done in range(1, 101):
        now[0] += 0.25
        progress.update(done)
    assert logs.messages == [
        "reading: 20 of 100 files, 4/s, 0:00:20 left",
        "reading: 40 of 100 files, 4/s, 0:00:15 left",
        "reading: 60 of 100 files, 4/s, 0:00:10 left",
        "reading: 80 of 100 files, 4/s, 0:00:05 left",
        "reading: 100 of 100 files, 4/s, 0:00:00 left",
    ]


def test_short_tasks_are_silent(logs):
    progress = log.Progress(logging.getLogger("tcq.test"), "reading", 3)
    for done in (1, 2, 3):
        progress.update(done)
    assert logs.messages == []


def test_duration():
    assert [log.duration(s) for s in (0, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]
