import numpy as np
import pytest
from sklearn.cluster import KMeans

import small
from tcq import encode
from tcq.config import checks
from tcq.models import kmeans, retriever


@pytest.fixture(scope="module")
def points():
    random = np.random.RandomState(0)
    centres = random.randn(2, 8, 5) * 3
    return (centres[:, random.randint(0, 8, 400)] + random.randn(2, 400, 5)).swapaxes(0, 1).astype("f4")


def spread(points, centres):
    return ((points[:, :, None] - centres[None]) ** 2).sum(-1).min(-1).mean(0)


def test_centres_are_as_close_as_those_of_scikit_learn(points):
    got = kmeans.kmeans(points, 8, spherical=False)
    assert got.shape == (2, 8, 5) and got.dtype == np.float32
    want = [KMeans(8, n_init=10, random_state=0).fit(points[:, m]).inertia_ / 400 for m in range(2)]
    assert (spread(points, got) < 1.3 * np.array(want)).all()
    np.testing.assert_array_equal(got, kmeans.kmeans(points, 8, spherical=False))


def test_spherical_centres_are_directions(points):
    lengths = np.random.RandomState(1).uniform(0.1, 9, (400, 2, 1)).astype("f4")
    got = kmeans.kmeans(points * lengths, 8, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(got, kmeans.kmeans(points, 8, spherical=True), atol=1e-4)


@pytest.mark.parametrize("metric", [pytest.param("l2", marks=pytest.mark.whole), "ip"])
def test_a_retriever_starts_with_less_distortion_than_from_drawn_features(metric):
    error = {}
    for init in ("data", "kmeans"):
        c = small.config(f"quantizer.init={init}", f"quantizer.metric={metric}")
        images, _, start = small.first_step(c)
        encoder = encode.Encoder(c, retriever.from_config(c), {"params": start.params}, 0)
        features, codes = encode.encode(encoder, images)
        parts = features.reshape(64, 2, 4)
        if metric == "ip":
            parts = parts / np.linalg.norm(parts, axis=-1, keepdims=True)
        error[init] = np.mean((parts - encoder.codebooks[np.arange(2), codes]) ** 2)
    assert error["kmeans"] < 0.95 * error["data"]


def test_too_few_images_are_refused(points):
    with pytest.raises(ValueError, match="9 codewords needs at least as many images, got 5"):
        kmeans.kmeans(points[:5], 9, spherical=False)
    c = small.config("quantizer.init=kmeans", "quantizer.init_images=3")
    with pytest.raises(checks.ConfigError, match="cannot make 4 codewords of 3 images"):
        checks.check_run(c, num_devices=1, num_train=100, num_validation=0)
