"""The questions of `tcq judge` on a page: real requests on the loopback interface."""

import io
import json
import shutil
import signal
import socket
import subprocess
import threading
import time

import numpy as np
import pytest
from PIL import Image

import small
from judging import judging
from serving import ask
from tcq import web
from tcq.evaluate import judge, judge_page, kinds
from tcq.runtime import signals


@pytest.fixture
def workdir(digits_run, tmp_path):
    return shutil.copytree(digits_run, tmp_path / "run")


def reply(address, number, answer):
    status, _, state = ask(address, f"/api/answers/{number}", json.dumps({"answer": answer}).encode())
    assert status == 200, state
    return state


def test_a_person_answers_on_the_page(workdir):
    source, judge_by = judge.prepare(workdir, count=3, labels=False)
    with judging(judge_by, source) as (address, ends):
        _, headers, page = ask(address, "/")
        assert b"the same kind of thing as the first?" in page
        assert "default-src 'none'" in headers["content-security-policy"]
        state, seen = ask(address, "/api/question?after=0")[2], []
        for given in ([2, 8], [], [1, 1]):
            names = state["names"]
            assert len(names) == 1 + kinds.NEIGHBOURS
            seen += [(names[0], name, place in given) for place, name in enumerate(names[1:], 1)]
            for place in (0, 3, 8):
                _, headers, png = ask(address, f"/api/pictures/{state['number']}/{place}")
                pixels = source.images[source.names.index(names[place])]
                with Image.open(io.BytesIO(png)) as image:
                    shown = np.asarray(image.convert("RGB").resize(pixels.shape[:2], Image.Resampling.NEAREST))
                np.testing.assert_array_equal(shown, np.broadcast_to(pixels, shown.shape))
                assert headers["content-type"] == "image/png" and image.width >= 160
            state = reply(address, state["number"], given)
        assert state["result"].startswith("3 answers: ") and "--config.loss.clip=" in state["result"]
    rows = [json.loads(line) for line in (workdir / judge.ANSWERS).read_text().splitlines()]
    assert [(r["first"], r["second"], r["same"]) for r in rows] == seen
    assert ends[0].answers == 3 and judge.text(ends[0]) == state["result"]


def test_a_page_of_an_earlier_process_answers_nothing():
    earlier, now = judge_page.Exchange(), judge_page.Exchange()
    assert earlier.question.number != now.question.number
    thread = threading.Thread(target=now.ask, args=(1, [2, 3], 0))
    thread.start()
    number = now.after(0).number
    now.reply(earlier.question.number + 1, [1])
    assert now.answer is None and now.question.number == number
    now.close()
    thread.join(10)


def test_before_the_first_question_there_is_none_to_show(monkeypatch):
    monkeypatch.setattr(judge_page, "WAIT", 0.01)
    exchange = judge_page.Exchange()
    assert exchange.after(0).images == () and not exchange.after(0).result


@pytest.mark.whole
@pytest.mark.parametrize("delay", [0, 0.5, 2])
def test_a_signal_ends_the_page_whatever_it_does(workdir, delay):
    command = small.command("judge", f"--workdir={workdir}", "--page", "--port=0", "--answers=500")
    process = subprocess.Popen(command, env=small.environment(), stderr=subprocess.PIPE, text=True)
    while "questions at" not in (line := process.stderr.readline()):
        assert line, "it ended"
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    shown = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGINT and "stopped by SIGINT" in shown, shown
    assert "Traceback" not in shown


def test_only_the_open_question_is_answered_and_by_numbers(workdir):
    source, judge_by = judge.prepare(workdir, count=9, labels=False)
    with judging(judge_by, source) as (address, ends):
        number = ask(address, "/api/question?after=0")[2]["number"]
        after = reply(address, number, [1])["number"]
        assert after == number + 1
        assert reply(address, number, [1])["number"] == after  # a second click: nothing new
        for place in (f"{number}/0", f"{after}/9", f"{after + 1}/0"):
            assert ask(address, f"/api/pictures/{place}")[0] == 404
        wrong = (b"null", b'"perhaps"', b"[0]", b"[9]", b"[true]", b"[1.0]", b'["1"]', b"{}", b"1")
        bodies = [b'{"answer": ' + value + b"}" for value in wrong]
        for body in (b"", b"{}", b"[]", b"[" * 900, b"\xff", *bodies):
            status, _, error = ask(address, f"/api/answers/{after}", body)
            assert status == 400 and "a list of numbers from 1 to 8" in error["error"]
        assert ask(address, f"/api/answers/{after}", b"x" * 2000)[0] == 413
        for text in ("-1", "x", "9" * 30, "%C2%B2"):
            assert ask(address, f"/api/answers/{text}", b'{"answer": [1]}')[0] == 400
            assert ask(address, f"/api/pictures/{after}/{text}")[0] == 400
        foreign = ask(address, "/api/question", None, {"Origin": "http://example.org"})
        assert foreign[0] == 403
        state = reply(address, after, "stop")
        assert state["result"].startswith("1 answer: ")
    assert ends[0].answers == 1


def test_an_answer_that_does_not_arrive_ends(workdir, monkeypatch):
    monkeypatch.setattr(judge_page, "ANSWER_SECONDS", 0.3)
    source, judge_by = judge.prepare(workdir, count=9, labels=False)
    with judging(judge_by, source) as (address, _):
        number = ask(address, "/api/question?after=0")[2]["number"]
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            head = f"POST /api/answers/{number} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 20\r\n\r\n"
            client.sendall(head.encode() + b"{")
            assert b" 408 " in client.recv(100)
        reply(address, number, "stop")


def test_a_signal_stops_the_page_and_answers_are_kept(workdir):
    source, judge_by = judge.prepare(workdir, count=9, labels=False)
    with judging(judge_by, source, ends_itself=False) as (address, ends):
        reply(address, ask(address, "/api/question?after=0")[2]["number"], [])
    assert isinstance(ends[0], signals.Stopped)
    rows = (workdir / judge.ANSWERS).read_text().splitlines()
    assert [json.loads(r)["same"] for r in rows] == [False] * kinds.NEIGHBOURS


def test_an_error_of_the_judge_ends_the_page(workdir):
    source, _ = judge.prepare(workdir, count=9, labels=False)

    def fails(ask):
        raise ValueError("no pairs")

    with judging(fails, source) as (_, ends):
        pass
    assert isinstance(ends[0], ValueError) and "no pairs" in str(ends[0])


def test_a_port_in_use_is_refused(workdir):
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        done = small.main("judge", f"--workdir={workdir}", "--page", f"--port={port}")
        small.assert_refused(done, f"--port={port}: Address already in use")
    assert issubclass(web.PageError, ValueError)
