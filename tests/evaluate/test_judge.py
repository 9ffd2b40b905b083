import json
import shutil
import signal

import numpy as np
import pytest

import small
from tcq import encode
from tcq.data import sources, splits
from tcq.data.source import Source
from tcq.evaluate import judge, kinds
from tcq.evaluate.report import EvaluateError
from tcq.runtime import locks, signals


@pytest.fixture
def workdir(digits_run, tmp_path):
    return shutil.copytree(digits_run, tmp_path / "run")


def stored(workdir):
    return [json.loads(line) for line in (workdir / judge.ANSWERS).read_text().splitlines()]


def test_answers_are_kept_and_count_again(workdir):
    source, judge_by = judge.prepare(workdir, count=3, labels=False)
    assert judge_by(judge.by_labels(source)).answers == 3
    rows = stored(workdir)
    assert len(rows) == len({(r["first"], r["second"]) for r in rows}) == 3 * kinds.NEIGHBOURS
    label = dict(zip(source.names, source.labels, strict=True))
    assert all(r["same"] == (label[r["first"]] == label[r["second"]]) for r in rows)
    assert len({r["same"] for r in rows}) == 2
    judge_by = judge.prepare(workdir, count=5, labels=False)[1]
    done = judge_by(judge.by_labels(source))
    again = stored(workdir)
    assert done.answers == 5 and again[: len(rows)] == rows and len(again) == 5 * kinds.NEIGHBOURS
    assert judge_by(judge.by_labels(source)) == done


def test_labels_neither_read_nor_change_the_answers_of_a_person(workdir):
    (workdir / judge.ANSWERS).write_text("not read")
    done = small.main("judge", f"--workdir={workdir}", "--answers=3", "--labels")
    assert done.returncode == 0 and "3 answers: " in done.stdout and "--config.loss.clip=" in done.stdout, done.stderr
    assert (workdir / judge.ANSWERS).read_text() == "not read"


@pytest.mark.parametrize("number", [0, 1])
def test_few_answers_say_little(workdir, number):
    given = iter(["1 2"] * number)

    def read(question):
        for answer in given:
            return answer
        raise EOFError  # Ctrl-D

    shown = judge.text(judge.run(workdir, count=50, labels=False, read=read))
    assert ("no answers, so nothing is known" in shown) == (number == 0) == ("--config" not in shown)
    assert ("a wide interval" in shown) == (number == 1)


def test_bytes_that_are_no_text_are_no_answer(workdir):
    given = iter([b"\xff 1", b"2", b"q"])
    done = judge.run(workdir, count=50, labels=False, read=lambda question: next(given).decode())
    assert done.answers == 1 and [r["same"] for r in stored(workdir)][:3] == [False, True, False]


def test_a_signal_ends_a_question_at_once(workdir):
    def read(question):
        signals.handle(signal.SIGINT, None)
        raise AssertionError("it goes on")

    try:
        with pytest.raises(signals.Stopped):
            judge.run(workdir, count=50, labels=False, read=read)
        signals.reset()
        signals.handle(signal.SIGINT, None)  # only a flag again
    finally:
        signals.reset()


def test_images_that_share_one_of_several_labels_are_of_one_kind():
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]], bool)
    source = Source(images=np.zeros((4, 8, 8, 3), np.uint8), labels=labels, names=list("abcd"), classes=[], skipped=[])
    assert judge.by_labels(source)(0, [1, 2, 3], 0) == [True, False, True]


def test_questions_end_with_the_pairs(workdir, monkeypatch, logs):
    monkeypatch.setattr(judge, "IMAGES", 3)
    for _ in range(2):
        source, judge_by = judge.prepare(workdir, count=50, labels=False)
        assert judge_by(judge.by_labels(source)).answers == 2
    assert "all pairs of 3 images are known" in logs.text
    assert len({frozenset((r["first"], r["second"])) for r in stored(workdir)}) == len(stored(workdir)) == 3


def test_a_bucket_is_refused():
    small.assert_refused(small.main("judge", "--workdir=gs://bucket/run"), "is in a bucket")


def test_a_file_of_other_lines_is_refused_and_a_cut_line_is_not(workdir):
    (workdir / judge.ANSWERS).write_text('{"first": "a", "second": "b", "same": true}\n{"first": "a", "sec')
    source, judge_by = judge.prepare(workdir, count=1, labels=False)
    assert judge_by(judge.by_labels(source)).answers == 1
    lines = (workdir / judge.ANSWERS).read_text().splitlines()
    assert [set(json.loads(line)) for line in lines[2:]] == kinds.NEIGHBOURS * [set(judge.KEYS)]
    form, types = "is no answer: it needs first, second, same", "must have two names, and true or false"
    for line, message in {
        '{"first": "a"}': form,
        "3": form,
        '{"first": [], "second": "b", "same": true}': form,
        '{"first": "a", "second": "b", "same": "false"}': types,
        '{"first": "a", "second": "b", "same": null}': types,
        '{"first": "a", "second": "a", "same": true}': types,
    }.items():
        (workdir / judge.ANSWERS).write_text(line + "\n")
        with pytest.raises(EvaluateError, match=message):
            judge_by(judge.by_labels(source))


def test_bytes_that_are_no_lines_are_passed_over(workdir):
    (workdir / judge.ANSWERS).write_bytes(b"\xff\xfe{\x00\n" + b"[" * 100_000 + b"\n" + b"9" * 5000 + b"\n")
    assert judge.run(workdir, count=1, labels=False, read=lambda question: "0").answers == 1


def test_one_process_at_a_time_asks(workdir):
    source, judge_by = judge.prepare(workdir, count=2, labels=False)

    def ask(*question):
        with pytest.raises(locks.LockedError, match="is in use by process"):
            judge.prepare(workdir, count=2, labels=False)[1](judge.by_labels(source))
        return None

    judge_by(ask)
    assert not (workdir / judge.LOCKED).exists()


def test_what_another_process_has_asked_meanwhile_is_not_asked_again(workdir, monkeypatch):
    """It ends between the start of this one and its lock."""
    source, judge_by = judge.prepare(workdir, count=4, labels=False)
    only, others = judge._only, [judge.prepare(workdir, count=3, labels=False)[1]]

    def _only(folder):
        if others:
            others.pop()(judge.by_labels(source))
        return only(folder)

    monkeypatch.setattr(judge, "_only", _only)
    assert judge_by(judge.by_labels(source)).answers == 4
    anchors = [r["first"] for r in stored(workdir)]
    assert len(set(anchors)) == 4 and len(anchors) == 4 * kinds.NEIGHBOURS


def test_images_of_one_name_are_told_apart(workdir):
    encoder = encode.load(workdir, which="latest")
    source = sources.open_source(encoder.config.data)
    alike = source._replace(names=["a.jpg"] * len(source.names))
    split = splits.of_source(source, encoder.config.data)
    found = [judge.judge(workdir, encoder, alike, split, judge.by_labels(source), count=n) for n in (5, 5)]
    assert found[0] == found[1] and found[0].answers == 5
    assert len({(r["first"], r["second"]) for r in stored(workdir)}) == 5 * kinds.NEIGHBOURS


def test_answers_count_although_others_have_one_name_now(workdir):
    encoder = encode.load(workdir, which="latest")
    source = sources.open_source(encoder.config.data)
    split = splits.of_source(source, encoder.config.data)
    judge.judge(workdir, encoder, source, split, judge.by_labels(source), count=3)
    shown = {name for r in stored(workdir) for name in (r["first"], r["second"])}
    renamed = [name if name in shown else "a.jpg" for name in source.names]
    alike = source._replace(names=renamed)
    assert judge.judge(workdir, encoder, alike, split, lambda *_: None, count=9).answers == 3


def test_other_images_than_those_of_the_run_are_refused(workdir):
    data = json.loads((workdir / "data.json").read_text())
    (workdir / "data.json").write_text(json.dumps(data | {"images": 1, "contents_sha256": "0", "names_sha256": "0"}))
    done = small.main("judge", f"--workdir={workdir}", "--labels")
    small.assert_refused(done, "the images have changed since this run began")


def test_a_person_sees_a_picture_and_can_stop(workdir):
    given, questions = iter(["perhaps", "", "1 9", "3, 1", "0", "Q"]), []
    done = judge.run(workdir, count=50, labels=False, read=lambda question: questions.append(question) or next(given))
    assert done.answers == 2 and [q.partition(":")[0] for q in questions] == [
        "1 of 50",
        "'perhaps' is no answer",
        "'' is no answer",
        "'1 9' is no answer",
        "2 of 50",
        "3 of 50",
    ]
    assert str(workdir / judge.PICTURE) in questions[0] and "which are the same kind of thing" in questions[0]
    assert all("numbers from 1 to 8, such as '1 4', 0 for none, q to stop" in q for q in questions)
    same = [r["same"] for r in stored(workdir)]
    assert same == [True, False, True] + [False] * (2 * kinds.NEIGHBOURS - 3)
    assert (workdir / judge.PICTURE).stat().st_size > 1000
