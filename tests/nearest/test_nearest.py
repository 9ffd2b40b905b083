"""Exact search against the scores of all items."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcq import nearest, ranking
from tcq.nearest import buckets, candidates, scan, shards
from tcq.runtime import devices

SHAPES = [
    (1, 2),
    (2, 4),
    (3, 5),
    (4, 16),
    (8, 16),
    (3, 16),
    (16, 16),
    (2, 20),
    (7, 100),
    (2, 256),
    (4, 256),
    (1, 300),
    (2, 300),
    (1, 2**16),
]


def world(seed, shape, count, *, distinct, coarse, cosine):
    """Tables of 3 queries and codes. Few distinct codes and coarse entries give ties."""
    num_codebooks, num_codewords = shape
    random = np.random.RandomState(seed)
    pool = random.randint(0, num_codewords, (distinct, num_codebooks))
    codes = pool[random.randint(0, distinct, count)].astype(np.uint8 if num_codewords <= 256 else np.uint16)
    tables = random.randn(3, num_codebooks, num_codewords).astype("f4") * 10
    tables = np.round(tables) if coarse else tables
    norms = random.uniform(0.5, 2, pool.shape[0]).astype("f4")[random.randint(0, distinct, count)] if cosine else None
    return tables, codes, norms


def truth(tables, codes, norms, k, allowed=None):
    """The stable sort of all scores, added in the order of `ranking.scores` in float32."""
    if codes.shape[1] % 2 == 0 and tables.shape[2] <= 16:
        parts = [tables[:, m, codes[:, m]] + tables[:, m + 1, codes[:, m + 1]] for m in range(0, codes.shape[1], 2)]
    else:
        parts = [tables[:, m, codes[:, m]] for m in range(codes.shape[1])]
    scores = np.zeros((len(tables), len(codes)), np.float32)
    for part in parts:
        scores = scores + part
    scores = scores if norms is None else scores * (np.float32(1) / norms)
    ids = np.arange(len(codes)) if allowed is None else np.flatnonzero(allowed)
    order = np.argsort(-scores[:, ids], axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores[:, ids], order, 1), ids[order]


def engines(codes, num_codewords, norms):
    yield scan.build(codes, num_codewords, norms=norms)
    yield buckets.build(codes, num_codewords, norms=norms)
    if candidates.fits(codes.shape[1], num_codewords, norms) and len(codes):
        yield candidates.build(codes, num_codewords)


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from(SHAPES),
    count=st.integers(1, 600),
    distinct=st.integers(1, 1000),
    coarse=st.booleans(),
    cosine=st.booleans(),
    k=st.integers(1, 30) | st.just(1000),
    share=st.none() | st.sampled_from([0.0, 0.02, 0.3, 0.9]),
)
def test_every_engine_gives_the_stable_sort_of_all_scores(seed, shape, count, distinct, coarse, cosine, k, share):
    tables, codes, norms = world(seed, shape, count, distinct=distinct, coarse=coarse, cosine=cosine)
    allowed = None if share is None else np.random.RandomState(seed).rand(count) < share
    wanted = truth(tables, codes, norms, k, allowed)
    for engine in engines(codes, shape[1], norms):
        for first in (buckets.FIRST, 1):  # one bucket at first, so that there are several rounds
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(buckets, "FIRST", first)
                patch.setattr(buckets, "FIRST_ITEMS", 0 if first == 1 else buckets.FIRST_ITEMS)
                scores, ids = nearest.top_k(engine, tables, k, allowed=allowed)
            np.testing.assert_array_equal(ids, wanted[1], err_msg=nearest.name(engine))
            np.testing.assert_array_equal(scores, wanted[0])


@pytest.mark.parametrize("shape", [(4, 16), (8, 16), (16, 16), (2, 256), (4, 256), (8, 256)])
@pytest.mark.parametrize("cosine", [False, True])
def test_the_scores_have_the_bits_of_the_ranking(shape, cosine):
    """Of many items, in blocks of a few."""
    tables, codes, norms = world(0, shape, 5000, distinct=3000, coarse=False, cosine=cosine)
    wanted = ranking.top_k(tables, codes, 50, norms=norms)
    for engine in engines(codes, shape[1], norms):
        for found, want in zip(nearest.top_k(engine, tables, 50), wanted, strict=True):
            np.testing.assert_array_equal(found, want, err_msg=nearest.name(engine))


@pytest.mark.parametrize("shape", [(16, 16), (5, 9), (6, 20), (8, 256), (4, 16)])
def test_the_proof_holds_and_is_found(shape):
    """FAISS's scores are within the error, and nearly all queries are proven without a scan."""
    tables, codes, _ = world(1, shape, 20_000, distinct=20_000, coarse=False, cosine=False)
    engine = candidates.build(codes, shape[1])
    answers = candidates.search(engine, tables, 20, None)
    wanted = truth(tables, codes, None, 20)
    assert sum(a is not None for a in answers) >= 2
    for query, answer in enumerate(answers):
        if answer is not None:
            np.testing.assert_array_equal(answer[1], wanted[1][query])
    worst, ids = candidates._ask(engine, tables, 2000)
    exact = truth(tables, codes, None, len(codes))
    error = candidates._error(engine, tables)
    for query in range(len(tables)):
        outside = np.setdiff1d(np.arange(len(codes)), ids[query])
        best = exact[0][query][np.isin(exact[1][query], outside)].max()
        assert best <= worst[query] + error[query]
        assert error[query] < 0.1 * np.ptp(exact[0][query])


@pytest.mark.parametrize("shape", [(4, 16), (8, 16), (4, 256), (16, 16)])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.4, 0.02])
def test_rounds_and_blocks_do_not_matter(monkeypatch, shape, coarse, cosine, share):
    """Starting with one bucket or k candidates, in blocks of a few items; with ties between them if coarse."""
    for module, name, value in (
        (buckets, "FIRST", 1),
        (buckets, "FIRST_ITEMS", 0),
        (buckets, "BLOCK", 50),
        (scan, "BLOCK", 100),
        (candidates, "FIRST", 1),
        (candidates, "LEAST", 0),
        (candidates, "MOST", 1),
    ):
        monkeypatch.setattr(module, name, value)
    tables, codes, norms = world(5, shape, 20_000, distinct=20_000, coarse=False, cosine=cosine)
    tables = np.round(tables / 10) if coarse else tables
    allowed = None if share == 1 else np.random.RandomState(0).rand(len(codes)) < share
    wanted = truth(tables, codes, norms, 50, allowed)
    assert not coarse or cosine or len(np.unique(wanted[0][0])) < 20
    for engine in engines(codes, shape[1], norms):
        scores, ids = nearest.top_k(engine, tables, 50, allowed=allowed)
        np.testing.assert_array_equal(ids, wanted[1], err_msg=nearest.name(engine))
        np.testing.assert_array_equal(scores, wanted[0])


def test_queries_with_and_without_a_proof():
    tables, codes, _ = world(6, (16, 16), 20_000, distinct=20_000, coarse=False, cosine=False)
    tables[1] = 0  # all items tie
    engine = candidates.build(codes, 16)
    assert [a is None for a in candidates.search(engine, tables, 10, None)] == [False, True, False]
    np.testing.assert_array_equal(nearest.top_k(engine, tables, 10)[1], truth(tables, codes, None, 10)[1])


def test_most_items_are_not_looked_at(monkeypatch):
    tables, codes, _ = world(2, (8, 16), 200_000, distinct=150_000, coarse=False, cosine=False)
    engine = buckets.build(codes, 16)
    seen = []
    merge = buckets._merge
    monkeypatch.setattr(
        buckets, "_merge", lambda items, *rest: seen.append(np.diff(items.starts)[rest[3]].sum()) or merge(items, *rest)
    )
    nearest.top_k(engine, tables, 10)
    assert 30 <= sum(seen) < 0.4 * 3 * len(codes)


@pytest.mark.parametrize(
    ("count", "shape", "cosine", "kind"),
    [
        (1000, (4, 16), False, scan.Scan),
        (40_000, (4, 16), True, buckets.Buckets),
        (40_000, (4, 16), False, candidates.Candidates),
        (200_000, (2, 256), False, buckets.Buckets),
        (40_000, (2, 300), False, buckets.Buckets),
        (40_000, (8, 16), False, candidates.Candidates),
        (40_000, (8, 16), True, buckets.Buckets),
        (600_000, (4, 256), False, buckets.Buckets),
        (40_000, (16, 16), False, candidates.Candidates),
        (40_000, (16, 16), True, scan.Scan),
    ],
)
def test_the_engine_is_chosen_by_items_and_bits(count, shape, cosine, kind):
    _, codes, norms = world(3, shape, count, distinct=1000, coarse=False, cosine=cosine)
    assert type(nearest.build(codes, shape[1], norms=norms)) is kind


def test_queries_that_are_not_numbers_and_a_k_below_one():
    tables, codes, _ = world(4, (16, 16), 2000, distinct=2000, coarse=False, cosine=False)
    engine = candidates.build(codes, 16)
    with pytest.raises(ValueError, match="k 0 must be at least 1"):
        nearest.top_k(engine, tables, 0)
    with pytest.raises(ValueError, match="the tables of the queries hold NaN"):
        nearest.top_k(engine, np.where(tables == tables.max(), np.nan, tables), 5)
    tables[0, 0, 0] = -np.inf
    np.testing.assert_array_equal(nearest.top_k(engine, tables, 5)[1], truth(tables, codes, None, 5)[1])
    scores, ids = nearest.top_k(engine, tables[:0], 5)
    assert scores.shape == ids.shape == (0, 5)


@pytest.mark.parametrize(("shape", "count", "k"), [((16, 16), 1000, 30), ((3, 5), 7, 20), ((4, 300), 601, 64)])
@pytest.mark.parametrize("cosine", [False, True])
def test_devices_that_share_the_items_give_the_same(monkeypatch, shape, count, k, cosine):
    """In blocks of a few items on 8 devices; fewer items than devices; more answers than items."""
    monkeypatch.setattr(shards, "BLOCK", 16)
    monkeypatch.setattr(shards, "QUERIES", 2)
    for coarse in (False, True):
        tables, codes, norms = world(3, shape, count, distinct=count // 3, coarse=coarse, cosine=cosine)
        engine = shards.build(codes, shape[1], norms=norms)
        assert nearest.name(engine) == "scan of all items on 8 devices"
        assert {s.device for s in engine.on_devices["columns"].addressable_shards} == set(jax.local_devices())
        for share in (None, 0.0, 0.02, 0.3, 0.9):
            allowed = None if share is None else np.random.RandomState(0).rand(count) < share
            wanted = truth(tables, codes, norms, k, allowed)
            scores, ids = nearest.top_k(engine, tables, k, allowed=allowed)
            np.testing.assert_array_equal(ids, wanted[1])
            np.testing.assert_array_equal(scores, wanted[0])


def test_items_below_every_number_come_before_those_not_allowed():
    """Scores of -inf and inf, and 0 and -0, which are equal."""
    assert len(set(shards._numbers(jnp.array([0.0, -0.0])).tolist())) == 1
    tables = np.array([[[-np.inf, -0.0, 0.0, 1.0, -1.0, np.inf]]], np.float32)
    codes = np.tile(np.arange(6, dtype=np.uint8), 20)[:, None]
    allowed = np.arange(len(codes)) % 2 == 0
    wanted = truth(tables, codes, None, 70, allowed)
    engine = shards.build(codes, 6)
    scores, ids = nearest.top_k(engine, tables, 70, allowed=allowed)
    np.testing.assert_array_equal(ids, wanted[1])
    np.testing.assert_array_equal(scores, wanted[0])


def test_accelerators_share_very_many_items(monkeypatch):
    monkeypatch.setattr(nearest, "MANY_ON_DEVICES", nearest.FEW + 1)
    codes = np.zeros((nearest.FEW + 1, 8), np.uint8)
    assert isinstance(nearest.build(codes, 16), candidates.Candidates)
    monkeypatch.setattr(devices, "accelerated", lambda: True)
    engine = nearest.build(codes, 16)
    assert isinstance(engine, shards.Shards)
    scores, ids = nearest.top_k(engine, np.ones((1, 8, 16), np.float32), 3)
    assert ids.tolist() == [[0, 1, 2]] and scores.tolist() == [[8, 8, 8]]
    assert isinstance(nearest.build(codes[:, :4], 16), buckets.Buckets | candidates.Candidates)
    assert isinstance(nearest.build(codes[:-1], 16), scan.Scan)
