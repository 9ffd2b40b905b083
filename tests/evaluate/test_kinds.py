import numpy as np
import pytest

import small
from tcq.evaluate import kinds


def curve(u, half, slope, top=1.0):
    return top / (1 + (np.asarray(u) / half) ** slope)


def collection(seed, n=200):
    return kinds.pair_ranks(np.random.RandomState(seed).randn(n, n))


def answers(ranks, same, seed, count, *, even=False):
    """Answers about a collection for whose pairs `same` is known; `even` draws pairs as if no answer told more."""
    random, found, is_open = np.random.RandomState(seed), [], ~np.eye(len(ranks), dtype=bool)
    for _ in range(count):
        if even:
            anchor, others = random.randint(len(ranks)), random.randint(len(ranks), size=kinds.NEIGHBOURS)
            others = others[others != anchor]
        else:
            anchor, others = kinds.draw(kinds.posterior(found), ranks, is_open, random)
            is_open[anchor] = is_open[others, anchor] = False
        found.append(kinds.likelihood(ranks[anchor, others], same[anchor, others]))
    return found


def judged(found, ranks):
    return kinds.judgement(found, found, ranks, 256)


@pytest.mark.parametrize(("half", "slope", "top"), [(0.02, 2.0, 1.0), (0.1, 3.0, 0.8), (0.02, 1.0, 1.0)])
def test_the_interval_holds_the_share(half, slope, top):
    u = (np.arange(10**6) + 0.5) / 10**6
    truth = curve(u, half, slope, top).mean()
    results = []
    for seed in range(4):
        ranks = collection(seed)
        drawn = np.triu(np.random.RandomState(seed).rand(*ranks.shape), 1)
        same = drawn + drawn.T < curve(ranks, half, slope, top)
        results.append(judged(answers(ranks, same, seed, 30), ranks))
    assert sum(r.low <= truth <= r.high for r in results) >= 3
    assert np.median([abs(np.log(r.share / truth)) for r in results]) < 0.25
    expected = [curve(u, half, slope, top)[u < r.share].mean() for r in results]
    assert abs(np.mean([r.precision for r in results]) - np.mean(expected)) < 0.08


def test_endless_answers_give_the_share_itself():
    """The curve lies between those of the grid. An answer has its expected likelihood."""
    u, asked = (np.arange(10**5) + 0.5) / 10**5, np.geomspace(1e-3, 1, 200)
    p = kinds.chance(asked)
    for half in 0.05 * 1.03 ** np.arange(6):
        same = curve(asked, half, 2.2)
        answer = np.log(np.maximum(p, 1e-12)) @ same + np.log(np.maximum(1 - p, 1e-12)) @ (1 - same)
        result = judged([answer] * 20, np.ones((2, 2)))
        assert abs(np.log(result.share / curve(u, half, 2.2).mean())) < 0.05
        assert result.low < result.share < result.high


def test_the_precision_is_that_of_the_scope():
    """One image is like all others: with scope "batch" its pairs are most of the clipped ones."""
    n = 60
    ranks = kinds.pair_ranks(
        np.where(np.arange(n)[:, None] * np.arange(n) == 0, 2.0, np.random.RandomState(0).rand(n, n))
    )
    for scope in ("anchor", "batch"):
        got = np.sort(kinds._clipped_ranks(ranks, 0.1, scope))
        if scope == "batch":
            want = np.sort(ranks[~np.eye(n, dtype=bool)])[: round(0.1 * n * (n - 1))]
        else:
            want = np.sort(
                np.concatenate([np.sort(np.delete(row, i))[: round(0.1 * (n - 1))] for i, row in enumerate(ranks)])
            )
        np.testing.assert_array_equal(got, want)


@pytest.mark.whole
def test_the_interval_holds_although_pairs_of_an_anchor_are_alike():
    """Kinds of different frequency, and features that tell little: the answers of one question depend."""
    holds, widths = 0, []
    for seed in range(8):
        random = np.random.RandomState(seed)
        labels = random.choice(11, size=200, p=np.r_[0.5, np.full(10, 0.05)])
        same = labels[:, None] == labels
        ranks = kinds.pair_ranks(random.randn(*same.shape))
        truth = same[np.triu_indices(len(same), 1)].mean()
        found = answers(ranks, same, seed, 20)
        result, together = judged(found, ranks), judged([sum(found)], ranks)
        holds += result.low <= truth <= result.high
        widths.append([np.log(r.high / r.low) for r in (result, together)])
    assert holds >= 7
    width, as_if_independent = np.mean(widths, axis=0)
    assert width > 1.3 * as_if_independent


def test_the_likelihood_is_that_of_independent_pairs():
    u, same = np.array([0.003, 0.2]), np.array([True, False])
    p = kinds.chance(u)
    np.testing.assert_allclose(kinds.likelihood(u, same), np.log(p[:, 0]) + np.log(1 - p[:, 1]), rtol=1e-12)
    one = np.exp(kinds.likelihood(u, same))
    np.testing.assert_allclose(kinds.posterior([np.log(one)]), one / one.sum(), rtol=1e-9)


@pytest.mark.whole
def test_chosen_questions_tell_more_than_even_ones():
    def width(even):
        found = []
        for seed in range(4):
            ranks = collection(seed)
            same = np.random.RandomState(seed).rand(*ranks.shape) < curve(ranks, 0.02, 2.0)
            found.append(judged(answers(ranks, same, seed, 20, even=even), ranks))
        return np.mean([np.log(r.high / r.low) for r in found])

    assert width(False) < 0.7 * width(True)


def test_a_question_has_open_pairs_of_many_ranks():
    random = np.random.RandomState(0)
    ranks, is_open = collection(0, 40), ~np.eye(40, dtype=bool)
    is_open[:, 20:] = False
    weights = kinds.posterior([kinds.likelihood(np.array([0.01, 0.5]), np.array([True, False]))])
    for _ in range(20):
        anchor, others = kinds.draw(weights, ranks, is_open, random)
        assert is_open[anchor, others].all() and len({*others}) == len(others) <= kinds.NEIGHBOURS
        assert np.ptp(ranks[anchor, others]) > 0.2
    assert kinds.draw(weights, ranks, np.zeros_like(is_open), random) is None


@pytest.mark.whole
def test_pairs_are_drawn_as_often_as_their_answers_are_uncertain():
    ranks, random = collection(0, 60), np.random.RandomState(1)
    is_open, weights = ~np.eye(60, dtype=bool), np.zeros_like(kinds.posterior([]))
    u = np.array([0.01, 0.1, 0.5])
    weights[np.argmin(abs(kinds.chance(u) - curve(u, 0.1, 2.0)).sum(axis=1))] = 1
    counts = np.zeros_like(ranks)
    for _ in range(3000):
        anchor, others = kinds.draw(weights, ranks, is_open, random)
        counts[anchor, others] += 1
    p = weights @ kinds.chance(np.clip(ranks, 0, 0.999)).reshape(len(weights), -1)
    wanted = np.sqrt(p * (1 - p)).reshape(ranks.shape) * is_open
    for low, high in ((0.0, 0.05), (0.05, 0.2), (0.2, 0.5), (0.5, 0.99)):
        here = (ranks > low) & (ranks <= high)
        np.testing.assert_allclose(counts[here].sum() / counts.sum(), wanted[here].sum() / wanted.sum(), rtol=0.1)


def test_ranks_are_shares_of_more_similar_pairs():
    similarity = np.random.RandomState(0).randn(6, 6)
    ranks = kinds.pair_ranks(similarity)
    both = np.maximum(similarity, similarity.T)
    values = both[np.triu_indices(6, 1)]
    np.testing.assert_allclose(ranks[1, 4], (values >= both[1, 4]).sum() / 15)
    np.testing.assert_array_equal(ranks, ranks.T)


def test_a_share_of_all_is_not_the_count_of_one():
    assert "--config.loss.clip=0.99" in kinds.Judgement(1.0, 0.9, 1.0, "anchor", 1.0, 5).overrides


def answered(ranks, same, count=40):
    """Answers about all images in turn, by ranks of all pairs and of those of the anchor."""
    own, random, found = kinds.anchor_ranks(ranks), np.random.RandomState(0), []
    for anchor in random.permutation(len(ranks))[:count]:
        others = random.permutation(np.delete(np.arange(len(ranks)), anchor))[:8]
        others[:4] = np.argsort(own[anchor])[[0, 2, 5, 12]]
        found.append([kinds.likelihood(r[anchor, others], same[anchor, others]) for r in (ranks, own)])
    return [list(x) for x in zip(*found, strict=True)]


def test_many_or_few_of_ones_kind_decide_the_scope():
    """Skewed kinds; even ones; even kinds of which some have more similar images than others."""
    skewed, even = np.repeat(np.arange(31), [60] + [3] * 30), np.arange(150) % 15
    noise = np.random.RandomState(0).rand(150, 150)
    near = np.where((even[:, None] < 3) & (even < 3), 2.0, 0.0)
    for of, similarity, scope in (
        (skewed, (skewed[:, None] == skewed) + 0.01 * noise, "batch"),
        (even, (even[:, None] == even) + 0.01 * noise, "anchor"),
        (even, (even[:, None] == even) + near + 0.01 * noise, "anchor"),
    ):
        same = of[:, None] == of
        ranks = kinds.pair_ranks(similarity)
        share = same[np.triu_indices(len(same), 1)].mean()
        result = kinds.judgement(*answered(ranks, same), ranks, 256)
        assert result.scope == scope, (result, kinds.skew(ranks, share / 2), kinds.gain(*answered(ranks, same)))
        assert f"--config.loss.clip_scope={scope}" in result.overrides
        assert f"--config.loss.clip={result.share:.3g}" in result.overrides
    assert kinds.skew(ranks, share / 2) > kinds.SKEW  # so the last one is decided by the answers


def test_ranks_of_an_anchor_are_shares_of_its_pairs():
    ranks = kinds.pair_ranks(np.random.RandomState(0).randn(6, 6))
    own = kinds.anchor_ranks(ranks)
    for i in range(6):
        others = np.delete(np.arange(6), i)
        np.testing.assert_allclose(own[i, others], [(ranks[i, others] <= ranks[i, j]).sum() / 5 for j in others])
    np.testing.assert_array_equal(np.diag(own), 1.0)


def test_the_gain_is_a_ratio_of_mean_likelihoods():
    first, second = np.log(np.random.RandomState(0).rand(2, 3, 9))
    want = np.log(np.exp(first.sum(axis=0)).mean() / np.exp(second.sum(axis=0)).mean()) / 3
    np.testing.assert_allclose(kinds.gain(list(first), list(second)), want, rtol=1e-9)
    assert kinds.gain([], []) == 0


@pytest.mark.parametrize(("batch_size", "scope"), [(32, "batch"), (256, "anchor")])
def test_fewer_than_three_of_each_anchor_are_clipped_of_the_batch(batch_size, scope):
    """Each of 40 kinds is as frequent, so only their number decides, as with kinds= of the configs."""
    labels = np.arange(400) % 40
    same = labels[:, None] == labels
    ranks = kinds.pair_ranks(same + 0.01 * np.random.RandomState(0).rand(*same.shape))
    share = same[np.triu_indices(len(same), 1)].mean()
    found = 3 * [kinds.likelihood(kinds.RANKS, share > kinds.RANKS)]
    result = kinds.judgement(found, found, ranks, batch_size)
    assert result.scope == scope and (result.share * (2 * batch_size - 2) < 3) == (scope == "batch")


@pytest.mark.parametrize("batch_size", [4, 33, 64, 256])
def test_what_is_printed_clips_a_pair(batch_size):
    """Although nothing is alike: tcq train refuses to clip none."""
    ranks = kinds.pair_ranks(np.random.RandomState(0).rand(60, 60))
    found = 50 * [kinds.likelihood(np.geomspace(1e-3, 1, 8), np.zeros(8, bool))]
    result = kinds.judgement(found, found, ranks, batch_size)
    overrides = [o.removeprefix("--config.") for o in result.overrides]
    assert result.share < 2e-4 and result.scope == "batch"
    small.config(*overrides, f"data.batch_size={batch_size}")
