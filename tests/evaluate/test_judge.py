import json
import shutil

import numpy as np
import pytest

import small
from tcq.data.source import Source
from tcq.evaluate import judge, kinds
from tcq.evaluate.report import EvaluateError


@pytest.fixture
def workdir(digits_run, tmp_path):
    return shutil.copytree(digits_run, tmp_path / "run")


def stored(workdir):
    return [json.loads(line) for line in (workdir / judge.ANSWERS).read_text().splitlines()]


def test_labels_answer_and_answers_are_kept(workdir):
    done = small.main("judge", f"--workdir={workdir}", "--answers=3", "--labels")
    assert done.returncode == 0 and "3 answers: " in done.stdout and "--config.loss.clip=" in done.stdout
    rows = stored(workdir)
    assert len(rows) == len({(r["first"], r["second"]) for r in rows}) == 3 * kinds.NEIGHBOURS
    source = judge.prepare(workdir, count=1, labels=True)[0]
    label = dict(zip(source.names, source.labels, strict=True))
    assert all(r["same"] == (label[r["first"]] == label[r["second"]]) for r in rows)
    assert len({r["same"] for r in rows}) == 2
    done = small.main("judge", f"--workdir={workdir}", "--answers=5", "--labels")
    again = stored(workdir)
    assert "5 answers: " in done.stdout and again[: len(rows)] == rows and len(again) == 5 * kinds.NEIGHBOURS
    assert small.main("judge", f"--workdir={workdir}", "--answers=5", "--labels").stdout == done.stdout


def test_images_that_share_one_of_several_labels_are_of_one_kind():
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]], bool)
    source = Source(images=np.zeros((4, 8, 8, 3), np.uint8), labels=labels, names=list("abcd"), classes=[], skipped=[])
    assert judge.by_labels(source)(0, [1, 2, 3]) == [True, False, True]


def test_questions_end_with_the_pairs(workdir, monkeypatch):
    monkeypatch.setattr(judge, "IMAGES", 3)
    for _ in range(2):
        done = small.main("judge", f"--workdir={workdir}", "--labels")
        assert done.returncode == 0 and "2 answers: " in done.stdout
    assert len({frozenset((r["first"], r["second"])) for r in stored(workdir)}) == len(stored(workdir)) == 3


def test_a_bucket_is_refused():
    small.assert_refused(small.main("judge", "--workdir=gs://bucket/run"), "is in a bucket")


def test_a_file_of_other_lines_is_refused_and_a_cut_line_is_not(workdir):
    (workdir / judge.ANSWERS).write_text('{"first": "a", "second": "b", "same": true}\n{"first": "a", "sec')
    source, judge_by = judge.prepare(workdir, count=1, labels=True)
    assert judge_by(judge.by_labels(source)).answers == 1
    lines = (workdir / judge.ANSWERS).read_text().splitlines()
    assert [set(json.loads(line)) for line in lines[2:]] == kinds.NEIGHBOURS * [set(judge.KEYS)]
    for line in ('{"first": "a"}', "3", '{"first": [], "second": "b", "same": true}'):
        (workdir / judge.ANSWERS).write_text(line + "\n")
        with pytest.raises(EvaluateError, match="is no answer: it needs first, second, same"):
            judge_by(judge.by_labels(source))


def test_a_person_sees_a_picture_and_can_stop(workdir):
    given, questions = iter(["perhaps", "", "1 9", "3, 1", "0", "Q"]), []
    done = judge.run(workdir, count=50, labels=False, read=lambda question: questions.append(question) or next(given))
    assert done.answers == 2 and len({*questions}) == 1
    assert str(workdir / judge.PICTURE) in questions[0] and "which are the same kind of thing" in questions[0]
    same = [r["same"] for r in stored(workdir)]
    assert same == [True, False, True] + [False] * (2 * kinds.NEIGHBOURS - 3)
    assert (workdir / judge.PICTURE).stat().st_size > 1000
