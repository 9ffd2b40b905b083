import faiss
import numpy as np
import pytest

from tcq import quantizer, ranking


@pytest.fixture
def world():
    random = np.random.RandomState(0)
    codebooks = random.randn(4, 16, 3).astype("f4")
    return random.randn(5, 12).astype("f4"), random.randint(0, 16, (200, 4)).astype(np.uint8), codebooks


def truth(queries, codes, codebooks, metric):
    items = np.asarray(quantizer.decode(codes, codebooks), np.float64)
    queries = queries.astype(np.float64)
    if metric == "l2":
        return -((queries[:, None] - items[None]) ** 2).sum(-1)
    inner = queries @ items.T
    if metric == "cosine":
        return inner / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(items, axis=1)
    return inner


@pytest.mark.parametrize("metric", ranking.METRICS)
def test_scores_are_those_of_the_decoded_items(world, metric):
    queries, codes, codebooks = world
    norms = ranking.code_norms(codes, codebooks) if metric == "cosine" else None
    scores = ranking.scores(ranking.lookup_table(queries, codebooks, metric=metric), codes, norms=norms)
    np.testing.assert_allclose(scores, truth(queries, codes, codebooks, metric), rtol=1e-4, atol=1e-4)
    decoded = np.asarray(quantizer.decode(codes, codebooks))
    np.testing.assert_allclose(ranking.dense_scores(queries, decoded, metric=metric), scores, rtol=1e-4, atol=1e-4)


def test_equal_codes_score_equal_bits(world):
    queries, codes, codebooks = world
    scores = np.asarray(
        ranking.scores(ranking.lookup_table(queries, codebooks, metric="l2"), np.concatenate([codes, codes]))
    )
    np.testing.assert_array_equal(scores[:, :200], scores[:, 200:])


@pytest.mark.parametrize("metric", ranking.METRICS)
def test_scores_have_the_same_bits_in_every_block(metric):
    random = np.random.RandomState(0)
    for M, K, d in ((8, 16, 16), (4, 256, 64)):
        codebooks, queries = random.randn(M, K, d).astype("f4"), random.randn(300, M * d).astype("f4")
        items = random.randn(500, M * d).astype("f4")
        for function, other in ((ranking.lookup_table, codebooks), (ranking.dense_scores, items)):
            whole = np.asarray(function(queries, other, metric=metric))
            for size in (ranking.ROWS, 2 * ranking.ROWS, 7 * ranking.ROWS):
                blocks = [queries[i : i + size] for i in range(0, 300, size)]
                parts = np.concatenate([np.asarray(function(b, other, metric=metric)) for b in blocks])
                np.testing.assert_array_equal(parts, whole)


@pytest.mark.parametrize("block_size", [1, 7, 64, 200, 10_000])
@pytest.mark.parametrize("k", [1, 10, 200, 500])
def test_top_k_is_the_stable_sort_whatever_the_block(world, k, block_size):
    queries, codes, codebooks = world
    codes = codes % 2  # many ties
    tables = ranking.lookup_table(queries, codebooks, metric="l2")
    scores = np.asarray(ranking.scores(tables, codes))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best, ids = ranking.top_k(tables, codes, k, block_size=block_size)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(best, np.take_along_axis(scores, order, 1))


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_faiss_gives_the_same_ranking(world, metric):
    queries, codes, codebooks = world
    peer = faiss.IndexPQ(12, 4, 4, faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(codebooks.ravel(), peer.pq.centroids)
    peer.is_trained = True
    peer.add_sa_codes(faiss.pack_bitstrings(codes.astype(np.int32), 4))
    values, _ = peer.search(queries, 10)
    ours, _ = ranking.top_k(ranking.lookup_table(queries, codebooks, metric=metric), codes, 10)
    np.testing.assert_allclose(ours, -values if metric == "l2" else values, rtol=1e-4, atol=1e-4)


def test_errors_carry_the_numbers(world, untyped):
    queries, codes, codebooks = world
    with pytest.raises(ValueError, match=r"\(5, 11\) do not fit codebooks \(4, 16, 3\): must be \(Q, 12\)"):
        ranking.lookup_table(queries[:, :11], codebooks, metric="l2")
    with pytest.raises(ValueError, match="'dot' is unknown"):
        ranking.lookup_table(queries, codebooks, metric="dot")
    with pytest.raises(ValueError, match="k 0 and"):
        ranking.top_k(ranking.lookup_table(queries, codebooks, metric="l2"), codes, 0)
