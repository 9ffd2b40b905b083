import json
import shutil

import numpy as np
import pytest

import small
from tcq.evaluate import judge


def curve(u, half, slope):
    return 1 / (1 + (np.asarray(u) / half) ** slope)


def simulate(half, slope, seed, count, *, rank=None):
    """Answers of a judge for whom p(u) is a curve; ranks are chosen by the posterior, or drawn evenly."""
    random, answers = np.random.RandomState(seed), []
    for _ in range(count):
        u = judge.next_rank(judge.posterior(answers)) if rank is None else rank(random)
        answers.append((u, bool(random.rand() < curve(u, half, slope))))
    return answers


RANKS = judge.pair_ranks(np.random.RandomState(0).randn(30, 30))


@pytest.mark.parametrize(("half", "slope"), [(0.02, 2.0), (0.1, 3.0), (0.005, 1.0)])
def test_the_interval_holds_the_share(half, slope):
    u = (np.arange(10**6) + 0.5) / 10**6
    truth = curve(u, half, slope).mean()
    results = [judge.judgement(simulate(half, slope, seed, 50), RANKS) for seed in range(8)]
    assert sum(r.low <= truth <= r.high for r in results) >= 6
    assert np.median([abs(np.log(r.share / truth)) for r in results]) < 0.6
    expected = [curve(u, half, slope)[u < r.clip].mean() for r in results]
    assert abs(np.mean([r.precision for r in results]) - np.mean(expected)) < 0.15


def test_chosen_questions_tell_more_than_random_ones():
    def width(rank):
        results = [judge.judgement(simulate(0.02, 2.0, seed, 30, rank=rank), RANKS) for seed in range(4)]
        return np.mean([np.log(r.high / r.low) for r in results])

    assert width(None) < 0.7 * width(lambda random: random.rand())


def test_ranks_are_shares_of_more_similar_pairs():
    similarity = np.random.RandomState(0).randn(6, 6)
    ranks = judge.pair_ranks(similarity)
    both = np.maximum(similarity, similarity.T)
    values = both[np.triu_indices(6, 1)]
    np.testing.assert_allclose(ranks[1, 4], (values >= both[1, 4]).sum() / 15)
    np.testing.assert_array_equal(ranks, ranks.T)


def test_many_or_few_of_ones_kind_decide_the_scope():
    labels = np.repeat(np.arange(31), [60] + [3] * 30)
    for kinds, scope in ((labels, "batch"), (np.arange(len(labels)) % 10, "anchor")):
        same = kinds[:, None] == kinds
        ranks = judge.pair_ranks(same + 0.01 * np.random.RandomState(0).rand(*same.shape))
        share = same[np.triu_indices(len(same), 1)].mean()
        answers = [(float(u), bool(u < share)) for u in judge.RANKS]
        result = judge.judgement(answers, ranks)
        assert result.scope == scope
        assert f"--config.loss.clip_scope={scope}" in result.overrides
        careful = {"batch": judge.BATCH_PART, "anchor": 1.0}[scope] * result.share
        assert result.low * judge.BATCH_PART < result.clip <= careful * 1.001


def test_labels_answer_and_answers_are_kept(digits_run, tmp_path):
    workdir = shutil.copytree(digits_run, tmp_path / "run")
    done = small.main("judge", f"--workdir={workdir}", "--answers=6", "--labels")
    assert done.returncode == 0 and "6 answers: " in done.stdout and "--config.loss.clip=" in done.stdout
    rows = [json.loads(line) for line in (workdir / judge.ANSWERS).read_text().splitlines()]
    assert len(rows) == len({(r["first"], r["second"]) for r in rows}) == 6
    done = small.main("judge", f"--workdir={workdir}", "--answers=9", "--labels")
    again = [json.loads(line) for line in (workdir / judge.ANSWERS).read_text().splitlines()]
    assert "9 answers: " in done.stdout and again[:6] == rows and len(again) == 9


def test_questions_end_with_the_pairs(digits_run, tmp_path, monkeypatch):
    workdir = shutil.copytree(digits_run, tmp_path / "run")
    monkeypatch.setattr(judge, "IMAGES", 3)
    for _ in range(2):
        done = small.main("judge", f"--workdir={workdir}", "--labels")
        assert done.returncode == 0 and "3 answers: " in done.stdout
    assert len((workdir / judge.ANSWERS).read_text().splitlines()) == 3


def test_a_bucket_is_refused():
    small.assert_refused(small.main("judge", "--workdir=gs://bucket/run"), "is in a bucket")


def test_a_person_sees_a_picture_and_can_stop(digits_run, tmp_path):
    workdir = shutil.copytree(digits_run, tmp_path / "run")
    given = iter(["perhaps", "Y", "n", "q"])
    done = judge.run(workdir, count=50, labels=False, read=lambda question: next(given))
    assert done.answers == 2
    assert [json.loads(r)["same"] for r in (workdir / judge.ANSWERS).read_text().splitlines()] == [True, False]
    assert (workdir / judge.PICTURE).stat().st_size > 1000
