import numpy as np
import pytest

from tcq import encode, ranking
from tcq.data import sources
from tcq.evaluate import retrieval
from tcq.runtime import devices


@pytest.fixture(scope="module")
def encoded(run):
    """The encoder, the labels of all images, and their features and codes."""
    encoder = encode.load(run)
    source = sources.open_source(encoder.config.data)
    return encoder, source.labels, encode.encode(encoder, source.images)


@pytest.fixture(scope="module")
def world(encoded):
    """The labels of all images, and scores of each against all."""
    encoder, labels, both = encoded
    return labels, retrieval.scorers(encoder, both, both)


def test_accelerators_score_in_turn_and_give_the_same(encoded, world, monkeypatch):
    encoder, labels, both = encoded
    used, scores = set(), ranking.scores

    def recorded(tables, codes, *, norms=None):
        used.update(codes.devices())
        return scores(tables, codes, norms=norms)

    monkeypatch.setattr(ranking, "scores", recorded)
    monkeypatch.setattr(devices, "accelerated", lambda: True)
    spread = retrieval.scorers(encoder, both, both)
    for name in ("asymmetric", "symmetric", "float"):
        wanted = retrieval.retrieve(world[1][name], labels, labels, k=50, ks=[1, 50])
        found = retrieval.retrieve(spread[name], labels, labels, k=50, ks=[1, 50], max_scores=1)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(used) == -(-len(labels) // ranking.ROWS) > 1  # as many as there are blocks


def test_the_block_size_does_not_matter(world):
    labels, scorers = world
    results = [
        retrieval.retrieve(scorers["asymmetric"], labels, labels, k=50, ks=[1, 50], max_scores=120 * b)
        for b in (1, 7, 1000)
    ]
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_query_can_be_excluded_from_its_answers(world):
    labels, scorers = world
    score, places = scorers["float"], np.arange(len(labels))
    options = {"k": 119, "ks": [1, 119]}
    included = retrieval.retrieve(score, labels, labels, **options)
    excluded = retrieval.retrieve(score, labels, labels, own=places, **options)
    assert included.precision[0] == 1 > excluded.precision[0]
    np.testing.assert_array_equal(excluded.relevant, included.relevant - 1)
    for q in (0, 50):  # equals a database without it
        others = np.delete(places, q)
        one = retrieval.retrieve(
            lambda block, q=q, others=others: score(slice(q, q + 1))[:, others],
            labels[q : q + 1],
            labels[others],
            **options,
        )
        np.testing.assert_allclose(one.average_precision, excluded.average_precision[q], atol=1e-12)
