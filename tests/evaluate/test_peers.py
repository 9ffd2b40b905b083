"""The same codes under our conventions and under those of the released code of three peers."""

import numpy as np
import pytest

import peers
from tcq import metrics, quantizer, ranking
from tcq.evaluate import retrieval


@pytest.fixture
def world():
    random = np.random.RandomState(0)
    codebooks = np.asarray(quantizer.unit_codewords(random.randn(3, 4, 5).astype("f4")))
    queries = random.randn(12, 15).astype("f4")
    codes = random.randint(0, 4, (300, 3)).astype(np.uint8)  # 64 different codes: many ties
    labels = [(random.rand(n, 6) < 0.15).astype(np.int64) for n in (12, 300)]
    labels[0][3] = 0  # a query without a label
    return queries, codebooks, codes, *labels


def relevance(query_labels, database_labels):
    return retrieval.relevance(query_labels.astype(bool), database_labels.astype(bool))


@pytest.mark.parametrize("k", [1, 10, 300])
def test_spq(world, k):
    queries, codebooks, codes, *labels = world
    scores = ranking.scores(ranking.lookup_table(queries, codebooks, metric="l2", squared=False), codes)
    ours = metrics.mean_average_precision(scores, relevance(*labels), k=k, ties="index")
    np.testing.assert_allclose(ours, peers.spq(*(np.float64(x) for x in world[:2]), codes, *labels, k), atol=1e-9)


@pytest.mark.parametrize("k", [1, 10, 300])
def test_mecoq(world, k):
    queries, codebooks, codes, *labels = world
    scores = ranking.scores(ranking.lookup_table(queries, codebooks, metric="ip"), codes)
    ours = metrics.mean_average_precision(scores, relevance(*labels), k=k, ties="index")
    np.testing.assert_allclose(ours, peers.mecoq(queries, codebooks, codes, *labels, k), atol=1e-9)


def test_mecoq_precision_recall_curve(world):
    queries, codebooks, codes, *labels = world
    scores = np.asarray(ranking.scores(ranking.lookup_table(queries, codebooks, metric="ip"), codes))
    result = metrics.search(scores, relevance(*labels), k=1, cuts=np.arange(1, 301), ties="index")
    precision, recall = peers.mecoq_curve(queries, codebooks, codes, *labels)
    np.testing.assert_allclose((result.hits / np.arange(1, 301)).mean(0), precision, atol=1e-9)
    np.testing.assert_allclose((result.hits / np.maximum(result.relevant, 1)[:, None]).mean(0), recall, atol=1e-9)


def test_deephash_leaves_out_the_item_ranked_last(world):
    *_, query_labels, database_labels = world
    random = np.random.RandomState(1)
    signs = [np.sign(random.randn(n, 12)) for n in (12, 300)]
    scores, relevant = signs[0] @ signs[1].T, relevance(query_labels, database_labels)
    theirs = peers.deephash(*signs, query_labels, database_labels)
    np.testing.assert_allclose(metrics.mean_average_precision(scores, relevant, k=299, ties="index"), theirs, atol=1e-9)
    assert abs(metrics.mean_average_precision(scores, relevant, k=300, ties="index") - theirs) > 1e-6


def test_squared_and_not_squared_distances_rank_differently(world):
    queries, codebooks, codes, *labels = world
    values = [
        metrics.mean_average_precision(
            ranking.scores(ranking.lookup_table(queries, codebooks, metric="l2", squared=s), codes),
            relevance(*labels),
            k=300,
        )
        for s in (True, False)
    ]
    assert abs(values[0] - values[1]) > 1e-4


def test_normalized_queries(world):
    queries, codebooks, *_ = world
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    parts = queries.reshape(12, 3, 5)
    subvectors = (parts / np.linalg.norm(parts, axis=2, keepdims=True)).reshape(12, 15)
    for normalize, same in (("none", queries), ("whole", unit), ("subvectors", subvectors)):
        for metric in ("ip", "l2"):
            ours = ranking.lookup_table(queries, codebooks, metric=metric, normalize=normalize)
            np.testing.assert_allclose(ours, ranking.lookup_table(same, codebooks, metric=metric), atol=1e-5)
