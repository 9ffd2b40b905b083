import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from tcq import metrics


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_expected_ap_equals_the_mean_over_all_orders(data):
    n = data.draw(st.integers(1, 6))
    scores = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=n, max_size=n))
    relevance = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    k = data.draw(st.integers(1, n + 1))
    ours = metrics.mean_average_precision(np.array([scores]), np.array([relevance]), k=k)
    np.testing.assert_allclose(ours, oracle.expected_ap(scores, relevance, min(k, n)), atol=1e-12)


def test_worked_by_hand():
    scores, relevance = np.array([[4.0, 3, 2, 1]]), np.array([[True, False, True, True]])
    value = metrics.mean_average_precision(scores, relevance, k=3)
    np.testing.assert_allclose(value, (1 / 1 + 2 / 3) / 2)
    np.testing.assert_allclose(metrics.mean_average_precision(scores, relevance, k=99), (1 + 2 / 3 + 3 / 4) / 3)


def test_a_query_without_hits_scores_zero_and_counts():
    scores, relevance = np.array([[2.0, 1], [2, 1]]), np.array([[True, False], [False, False]])
    assert metrics.mean_average_precision(scores, relevance, k=2) == 0.5
    assert metrics.mean_average_precision(scores, relevance, k=2, ties="index") == 0.5


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


def test_without_ties_both_conventions_agree():
    random = np.random.RandomState(1)
    scores, relevance = random.rand(5, 300), random.rand(5, 300) < 0.1
    for k in (1, 10, 300):
        by_index = metrics.average_precision(scores, relevance, k=k, ties="index")
        np.testing.assert_allclose(metrics.average_precision(scores, relevance, k=k), by_index, rtol=1e-12)
        np.testing.assert_allclose(
            by_index, [oracle.one_ap(r[np.argsort(-s)], k) for s, r in zip(scores, relevance, strict=True)]
        )


def test_random_order_is_a_constant_score():
    relevance = np.zeros((1, 50_000), bool)
    relevance[0, :5000] = True
    value = metrics.mean_average_precision(np.zeros((1, 50_000)), relevance, k=1000)
    assert 0.1 < value < 0.11  # the base rate, a little more by the formula


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
    with pytest.raises(ValueError, match="'best' is unknown"):
        metrics.mean_average_precision(np.zeros((1, 3)), np.zeros((1, 3), bool), k=1, ties="best")
    with pytest.raises(ValueError, match="cut-off 4 is above the 3 items"):
        metrics.hits(np.zeros((1, 3)), np.zeros((1, 3), bool), ks=[1, 4])
