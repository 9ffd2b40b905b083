import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tcq.evaluate import baselines
from tcq.models import embedder, opq, retriever


def test_the_rotation_has_orthogonal_rows():
    train = np.random.RandomState(0).randn(300, 12).astype("f4")
    rotation = opq.rotation(train, num_codebooks=4, num_codewords=16, width=10, seed=0)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(8), atol=1e-4)
    with pytest.raises(ValueError, match="at least 16 vectors for its rotation, got 15"):
        opq.rotation(train[:15], num_codebooks=4, num_codewords=16, width=10, seed=0)


@pytest.mark.parametrize(("count", "numbers"), [(65, 112), pytest.param(100, 512, marks=pytest.mark.whole)])
def test_fewer_rows_than_the_width(count, numbers):
    """In a process of its own: FAISS would damage the memory of this one."""
    code = f"""
import numpy as np
from tcq.models import opq
rows = np.random.RandomState(0).randn({count}, {numbers}).astype("f4")
r = opq.rotation(rows, num_codebooks=8, num_codewords=16, width=128, seed=0)
np.testing.assert_allclose(r.T @ r, np.eye(r.shape[1]), atol=1e-4)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_seed_starts_from_its_own_rotation():
    """Another seed leads to another solution, which is as good; the same seed leads to the same one."""
    random = np.random.RandomState(0)
    train = (random.randn(60, 12)[random.randint(0, 60, 900)] + random.randn(900, 12)).astype("f4")
    rotations, losses = {}, {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1), ("FAISS", None)):
        rotations[name] = opq.rotation(train, num_codebooks=3, num_codewords=16, width=12, seed=seed)
        losses[name] = _loss_of_pq(train @ rotations[name], num_codebooks=3)
    np.testing.assert_allclose(rotations["first"], rotations["again"], atol=1e-4)
    for other in ("other", "FAISS"):
        assert np.abs(rotations["first"] - rotations[other]).max() > 0.1
        assert losses[other] == pytest.approx(losses["first"], rel=0.03)
    assert losses["first"] < 0.98 * _loss_of_pq(train, num_codebooks=3)


def test_the_key_of_a_retriever_chooses_the_solution():
    points = np.random.RandomState(0).randn(300, 8).astype("f4")
    model = retriever.Retriever(embedder.Standardize(8), 2, 16, 4, 10.0, "ip")
    first, again, other = (
        np.asarray(
            retriever.init(jax.random.key(seed), model, points, codewords="opq")["params"]["projection"]["kernel"]
        )
        for seed in (0, 0, 1)
    )
    np.testing.assert_allclose(first, again, atol=1e-4)
    assert np.abs(first - other).max() > 0.1


def _loss_of_pq(rows: np.ndarray, *, num_codebooks: int) -> float:
    codebooks, codes = baselines.faiss_pq(rows, [rows], num_codebooks=num_codebooks, num_codewords=16)
    decoded = np.concatenate([codebooks[m][codes[:, m]] for m in range(num_codebooks)], axis=1)
    return float(np.mean((rows - decoded) ** 2))


def test_the_rotation_is_for_the_number_of_codewords():
    """Codes of 16 codewords lose less of 16-number vectors than after a rotation for 256."""
    random = np.random.RandomState(0)
    train = (random.randn(40, 16)[random.randint(0, 40, 1500)] + random.randn(1500, 16)).astype("f4")
    losses = {}
    for rotated_for in (16, 256):
        rotation = opq.rotation(train, num_codebooks=4, num_codewords=rotated_for, width=16, seed=0)
        losses[rotated_for] = _loss_of_pq(train @ rotation, num_codebooks=4)
    assert losses[16] < 0.98 * losses[256], losses


@pytest.mark.parametrize(("numbers", "width"), [(40, 8), (12, 4)])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_a_retriever_of_embeddings_starts_with_the_projection_of_opq(numbers, width, metric):
    """Its codes lose less than those of a random projection; missing columns of narrow embeddings are zero."""
    random = np.random.RandomState(0)
    points = (random.randn(30, numbers)[random.randint(0, 30, 600)] + 0.7 * random.randn(600, numbers)).astype("f4")
    model = retriever.Retriever(embedder.Standardize(numbers), 4, 16, width, 10.0, metric)
    losses = {}
    for init in ("kmeans", "opq"):
        variables = jax.tree.map(jnp.asarray, retriever.init(jax.random.key(0), model, points, codewords=init))
        features = np.asarray(model.apply(variables, jnp.asarray(points), method="features")).reshape(600, 4, width)
        if metric == "ip":
            features = features / np.linalg.norm(features, axis=-1, keepdims=True)
        words = np.asarray(variables["params"]["codebooks"])
        distance = ((features[:, :, None] - words[None]) ** 2).sum(-1).min(-1)
        losses[init] = distance.mean() / (features**2).sum(-1).mean()
    assert losses["opq"] < 0.95 * losses["kmeans"], losses
    kernel = np.asarray(variables["params"]["projection"]["kernel"]).reshape(numbers, 4, width)
    assert np.all((np.abs(kernel).sum(axis=0) > 0) == (np.arange(width) < numbers // 4)[None])


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_whitening_is_that_of_the_definition(strength):
    random = np.random.RandomState(0)
    views = (random.randn(50, 1, 5) + random.randn(50, 4, 5) * [3, 1, 1, 0.5, 0.1]).astype("f4")
    white = opq.whitening(views, strength=strength).astype("f8")
    apart = (views - views.mean(1, keepdims=True)).reshape(-1, 5).astype("f8")
    values, vectors = np.linalg.eigh(apart.T @ apart)
    ridge = opq.RIDGE * values.mean()
    wanted = vectors @ np.diag((values + ridge) ** (-strength / 2)) @ vectors.T
    np.testing.assert_allclose(white / np.linalg.norm(white), wanted / np.linalg.norm(wanted), atol=1e-5)


def test_directions_in_which_views_differ_are_shrunk():
    """Items differ as much in all directions; views only in the first half, which then has smaller weights."""
    random = np.random.RandomState(0)
    items = random.randn(600, 8)
    views = (items[:, None] + random.randn(600, 3, 8) * np.repeat([3, 0.1], 4)).astype("f4")
    model = retriever.Retriever(embedder.Standardize(8), 2, 16, 4, 10.0, "ip")
    variables = retriever.init(jax.random.key(0), model, items.astype("f4"), codewords="opq", views=views)
    lengths = np.linalg.norm(variables["params"]["projection"]["kernel"], axis=1)
    assert lengths[4:].min() > 3 * lengths[:4].max()
