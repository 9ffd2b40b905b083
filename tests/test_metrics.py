import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from tcq import metrics


@st.composite
def rankings(draw):
    n = draw(st.integers(1, 6))
    scores = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=n, max_size=n))
    return scores, draw(st.lists(st.booleans(), min_size=n, max_size=n)), draw(st.integers(1, n + 1))


@settings(deadline=None, max_examples=150)
@given(rankings(), st.sampled_from(metrics.DENOMINATORS))
def test_expected_ap_equals_the_mean_over_all_orders(ranking, denominator):
    scores, relevance, k = ranking
    ours = metrics.mean_average_precision(np.array([scores]), np.array([relevance]), k=k, denominator=denominator)
    k = min(k, len(scores))
    np.testing.assert_allclose(ours, np.mean(oracle.all_aps(scores, relevance, k, denominator)), atol=1e-12)


@settings(deadline=None, max_examples=150)
@given(rankings(), st.sampled_from(metrics.DENOMINATORS))
def test_best_and_worst_order_relevant_items_within_ties(ranking, denominator):
    scores, relevance, k = ranking
    n, k = len(scores), min(k, len(scores))
    for ties, sign in (("best", -1), ("worst", 1)):
        order = sorted(range(n), key=lambda i: (-scores[i], sign * relevance[i]))
        ours = metrics.mean_average_precision(
            np.array([scores]), np.array([relevance]), k=k, ties=ties, denominator=denominator
        )
        np.testing.assert_allclose(ours, oracle.one_ap([relevance[i] for i in order], k, denominator), atol=1e-12)
        if denominator != "hits":
            every = oracle.all_aps(scores, relevance, k, denominator)
            np.testing.assert_allclose(ours, max(every) if ties == "best" else min(every), atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(rankings())
def test_hits_under_every_rule_for_ties(ranking):
    scores, relevance, _ = ranking
    n, every = len(scores), oracle.orders(ranking[0])
    counts = np.array([np.cumsum([relevance[i] for i in o]) for o in every])
    for ties, truth in (("expected", counts.mean(0)), ("best", counts.max(0)), ("worst", counts.min(0))):
        ours = metrics.hits(np.array([scores]), np.array([relevance]), ks=list(range(1, n + 1)), ties=ties)
        np.testing.assert_allclose(ours[0], truth, atol=1e-12, err_msg=ties)
    stable = sorted(range(n), key=lambda i: -scores[i])
    ours = metrics.hits(np.array([scores]), np.array([relevance]), ks=list(range(1, n + 1)), ties="index")
    np.testing.assert_array_equal(ours[0], np.cumsum([relevance[i] for i in stable]))


def test_worked_by_hand():
    scores, relevance = np.array([[4.0, 3, 2, 1]]), np.array([[True, False, True, True]])
    value = metrics.mean_average_precision(scores, relevance, k=3)
    np.testing.assert_allclose(value, (1 / 1 + 2 / 3) / 2)
    np.testing.assert_allclose(metrics.mean_average_precision(scores, relevance, k=99), (1 + 2 / 3 + 3 / 4) / 3)


def test_a_query_without_hits_scores_zero_and_counts():
    scores, relevance = np.array([[2.0, 1], [2, 1]]), np.array([[True, False], [False, False]])
    assert metrics.mean_average_precision(scores, relevance, k=2) == 0.5
    assert metrics.mean_average_precision(scores, relevance, k=2, ties="index") == 0.5


def test_queries_with_nothing_relevant_may_be_left_out():
    scores, relevance = np.array([[2.0, 1], [2, 1]]), np.array([[False, True], [False, False]])
    assert metrics.mean_average_precision(scores, relevance, k=1, empty="skip") == 0.0  # no hit, but something relevant
    assert metrics.mean_average_precision(scores, relevance, k=2, empty="skip") == 0.5
    assert metrics.mean_average_precision(scores, relevance, k=2, empty="zero") == 0.25
    with pytest.raises(ValueError, match="no item of the database is relevant to any of the 1 queries"):
        metrics.mean_average_precision(scores[1:], relevance[1:], k=2, empty="skip")


@pytest.mark.parametrize("denominator", metrics.DENOMINATORS)
def test_best_possible_is_the_score_of_relevance_itself(denominator):
    relevance = np.random.RandomState(0).rand(20, 30) < np.linspace(0, 1, 20)[:, None]
    for k in (1, 7, 30):
        ideal = metrics.average_precision(relevance.astype(float), relevance, k=k, denominator=denominator, ties="best")
        ours = metrics.best_possible(relevance.sum(1), k=k, denominator=denominator)
        np.testing.assert_allclose(ours, ideal, atol=1e-12)


def test_ties_by_index_take_the_database_order():
    scores = np.zeros((1, 4))
    assert metrics.mean_average_precision(scores, np.array([[True, False, False, False]]), k=4, ties="index") == 1.0
    assert metrics.mean_average_precision(scores, np.array([[False, False, False, True]]), k=4, ties="index") == 0.25
    assert metrics.mean_average_precision(scores, np.array([[False, False, False, True]]), k=2, ties="index") == 0.0


def test_large_tie_group_across_the_cut_matches_sampling():
    random = np.random.RandomState(0)
    scores = random.randint(0, 3, 400).astype(float)
    relevance = random.rand(400) < 0.3
    exact = metrics.mean_average_precision(scores[None], relevance[None], k=200)
    samples = []
    for _ in range(3000):
        order = np.lexsort([random.rand(400), -scores])
        samples.append(oracle.one_ap(relevance[order], 200))
    assert abs(exact - np.mean(samples)) < 4 * np.std(samples) / np.sqrt(3000)


def test_without_ties_all_rules_agree():
    random = np.random.RandomState(1)
    scores, relevance = random.rand(5, 300), random.rand(5, 300) < 0.1
    for k in (1, 10, 300):
        by_index = metrics.average_precision(scores, relevance, k=k, ties="index")
        for ties in metrics.TIES:
            np.testing.assert_allclose(
                metrics.average_precision(scores, relevance, k=k, ties=ties), by_index, rtol=1e-9
            )
        np.testing.assert_allclose(
            by_index, [oracle.one_ap(r[np.argsort(-s)], k) for s, r in zip(scores, relevance, strict=True)]
        )


@pytest.mark.parametrize("kind", ["smooth", "few values", "outlier", "infinite", "a row", "constant", "huge"])
def test_many_items_give_what_a_full_sort_gives(kind, monkeypatch):
    """Rows of 10,000 items and more are not sorted as a whole."""
    random = np.random.RandomState(0)
    scores = random.randn(4, 12_000)
    scores = {
        "smooth": scores,
        "few values": np.round(scores, 1),
        "outlier": np.where(scores > 3.5, 1e30, scores),
        "infinite": np.where(scores > 3, np.inf, np.where(scores < -3, -np.inf, scores)),
        "a row": np.where(np.arange(4)[:, None] == 1, -np.inf, scores),  # beside others in the same block
        "constant": np.zeros_like(scores),
        "huge": scores * 3e307,
    }[kind]
    relevance = random.rand(4, 12_000) < np.array([0, 0.001, 0.1, 0.9])[:, None]
    cuts = np.unique(np.geomspace(1, 12_000, 40).astype(int))
    for dtype in (np.float64, np.float32) if kind != "huge" else (np.float64,):
        for ties in metrics.TIES:
            options = {"k": 700, "cuts": cuts, "ties": ties}
            with monkeypatch.context() as patch:
                patch.setattr(metrics, "BLOCK", 36_000)  # three rows, and one
                ours = metrics.search(scores.astype(dtype), relevance, **options)
                patch.setattr(metrics, "MANY", 10**9)
                whole = metrics.search(scores.astype(dtype), relevance, **options)
            for a, b in zip(ours, whole, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12)
    order = np.argsort(-scores[2], kind="stable")
    np.testing.assert_array_equal(
        metrics.hits(scores[2:3], relevance[2:3], ks=cuts, ties="index")[0], np.cumsum(relevance[2][order])[cuts - 1]
    )


def test_random_order_is_a_constant_score():
    relevance = np.zeros((1, 50_000), bool)
    relevance[0, :5000] = True
    value = metrics.mean_average_precision(np.zeros((1, 50_000)), relevance, k=1000)
    assert 0.1 < value < 0.11  # the base rate, a little more by the formula


def test_float16_scores_of_many_items():
    random = np.random.RandomState(0)
    scores, relevance = random.randn(2, 12_000).astype("f2"), random.rand(2, 12_000) < 0.1
    for ties in metrics.TIES:
        ours = metrics.mean_average_precision(scores, relevance, k=100, ties=ties)
        assert ours == metrics.mean_average_precision(scores.astype("f8"), relevance, k=100, ties=ties)


@pytest.mark.parametrize("denominator", metrics.DENOMINATORS)
def test_random_order_is_the_expectation_of_equal_scores(denominator):
    relevant, cuts = np.array([0, 3, 50, 3]), [1, 20, 50]
    relevance = np.arange(50) < relevant[:, None]
    ours = metrics.random_order(relevant, 50, k=20, cuts=cuts, denominator=denominator)
    same = metrics.search(np.zeros((4, 50)), relevance, k=20, cuts=cuts, denominator=denominator)
    for a, b in zip(ours, same, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("ties", metrics.TIES)
def test_scores_may_be_of_any_number_type(dtype, ties):
    scores = np.array([[0, 1, 1, 0]], dtype)
    relevance = np.array([[False, True, True, False]])
    assert metrics.mean_average_precision(scores, relevance, k=4, ties=ties) == 1.0


def test_hits_are_expectations_over_tied_orders():
    scores, relevance = np.array([[1.0, 1, 1, 0]]), np.array([[True, False, False, True]])
    np.testing.assert_allclose(metrics.hits(scores, relevance, ks=[1, 2, 3, 4]), [[1 / 3, 2 / 3, 1, 2]])


def test_errors_carry_the_numbers(untyped):
    with pytest.raises(ValueError, match=r"\(1, 3\) and relevance \(1, 2\)"):
        metrics.mean_average_precision(np.zeros((1, 3)), np.zeros((1, 2), bool), k=1)
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        metrics.mean_average_precision(np.array([[np.nan, 1]]), np.zeros((1, 2), bool), k=1)
    with pytest.raises(ValueError, match="k 0"):
        metrics.mean_average_precision(np.zeros((1, 3)), np.zeros((1, 3), bool), k=0)
    with pytest.raises(ValueError, match="ties 'random' is unknown"):
        metrics.mean_average_precision(np.zeros((1, 3)), np.zeros((1, 3), bool), k=1, ties="random")
    with pytest.raises(ValueError, match="denominator 'k' is unknown"):
        metrics.average_precision(np.zeros((1, 3)), np.zeros((1, 3), bool), k=1, denominator="k")
    with pytest.raises(ValueError, match="cut-off 4 must be from 1 to the number of items, 3"):
        metrics.hits(np.zeros((1, 3)), np.zeros((1, 3), bool), ks=[1, 4])
