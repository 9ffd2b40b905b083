import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tcq import config as configs
from tcq import quantizer
from tcq.models import retriever, vit

SMALL = {"width": 16, "depth": 2, "heads": 2, "patch": 4}


def features(images, train=False, rngs=None, **attributes):
    model = vit.ViT(**(SMALL | attributes))
    params = model.init(jax.random.key(0), images)
    return model.apply(params, images, train=train, rngs=rngs), params


@pytest.fixture
def images():
    return jnp.asarray(np.random.RandomState(0).rand(3, 8, 8, 3), jnp.float32)


@pytest.mark.parametrize("pooling", vit.POOLINGS)
@pytest.mark.parametrize("positions", vit.POSITIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes(images, pooling, positions, dtype):
    x, params = features(images, pooling=pooling, positions=positions, dtype=jnp.dtype(dtype))
    assert x.shape == (3, 64 if pooling == "flat" else 16) and x.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    full, _ = features(images, pooling=pooling, positions=positions)
    np.testing.assert_allclose(x, full, atol=0.1)


def test_an_image_does_not_see_its_neighbours(images):
    alone, _ = features(images[1:2], pooling="cls")
    together, _ = features(images, pooling="cls")
    np.testing.assert_allclose(alone[0], together[1], atol=1e-5)


def test_positions_matter_and_every_patch_is_seen(images):
    swapped = jnp.concatenate([images[:, 4:], images[:, :4]], axis=1)
    for positions in vit.POSITIONS:
        a, _ = features(images, pooling="mean", positions=positions)
        b, _ = features(swapped, pooling="mean", positions=positions)
        assert float(jnp.abs(a - b).max()) > 1e-3
    model = vit.ViT(**SMALL)
    params = model.init(jax.random.key(0), images)
    seen = jax.grad(lambda x: jnp.sum(model.apply(params, x) ** 2))(images)
    assert (np.abs(seen).reshape(3, 2, 4, 2, 4, 3).max(axis=(2, 4, 5)) > 0).all()


@pytest.mark.parametrize("rate", ["dropout", "drop_path"])
def test_dropout_and_stochastic_depth_act_only_in_training(images, rate):
    quiet, _ = features(images, **{rate: 0.5})
    plain, _ = features(images)
    np.testing.assert_array_equal(quiet, plain)
    a, _ = features(images, train=True, rngs={"dropout": jax.random.key(1)}, **{rate: 0.5})
    b, _ = features(images, train=True, rngs={"dropout": jax.random.key(2)}, **{rate: 0.5})
    assert float(jnp.abs(a - b).max()) > 1e-3


def test_stochastic_depth_keeps_the_expectation():
    x = jnp.ones((4000, 1, 2))
    y = vit.DropPath(0.25).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(y).round(4)) == {0.0, np.float32(1.3333)}
    assert abs(float(y.mean()) - 1) < 0.05
    np.testing.assert_array_equal(y[..., 0], y[..., 1])


# As timm counts them with num_classes=0 at 224 pixels and patch 16, less one width: we fold the position of the class
# token into the token.
COUNTS = {"Ti": 5_524_224, "S": 21_665_280, "B": 85_797_888, "L": 303_300_608}


@pytest.mark.parametrize("name", vit.SIZES)
def test_parameter_counts_of_the_named_sizes(name):
    model = vit.ViT(*vit.SIZES[name], patch=16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == COUNTS[name]


def small_config(**quantizer_changes) -> ConfigDict:
    c = configs.load("configs/digits.py")
    c.model.update(**SMALL)
    c.quantizer.update(**quantizer_changes)
    return c


@pytest.mark.parametrize("metric", quantizer.METRICS)
def test_retriever_outputs_fit_each_other(images, metric):
    c = small_config(metric=metric)
    model = retriever.from_config(c)
    pixels = np.random.RandomState(1).randint(0, 256, (64, 8, 8, 3)).astype(np.uint8)
    params = retriever.init(jax.random.key(0), model, pixels, from_data=True)
    out = model.apply({"params": params}, images)
    weights = quantizer.soft_assign(out.features, params["codebooks"], scale=c.quantizer.scale, metric=metric)
    np.testing.assert_allclose(out.weights, weights, atol=1e-5)
    np.testing.assert_allclose(out.reconstructions, quantizer.reconstruct(weights, out.codebooks), atol=1e-5)
    lengths = np.linalg.norm(out.codebooks, axis=-1)
    assert (metric == "ip") == bool(np.allclose(lengths, 1, atol=1e-5))


def test_initialisation_from_data_centres_scales_and_takes_codewords_from_features():
    model = retriever.from_config(small_config())
    pixels = np.random.RandomState(1).randint(0, 256, (64, 8, 8, 3)).astype(np.uint8)
    params = retriever.init(jax.random.key(0), model, pixels, from_data=True)
    x = np.asarray(model.apply({"params": params}, jnp.asarray(pixels, jnp.float32) / 255).features)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-4)
    subvectors = x.reshape(64, 8, 16)
    np.testing.assert_allclose((subvectors**2).sum(-1).mean(), 1, rtol=1e-3)
    for m in range(8):
        distances = np.linalg.norm(subvectors[:, m, None] - np.asarray(params["codebooks"])[m], axis=-1)
        np.testing.assert_allclose(distances.min(0), 0, atol=1e-4)
        assert len(set(distances.argmin(0))) == 16  # 16 different images
    random = retriever.init(jax.random.key(0), model, pixels, from_data=False)
    assert not np.allclose(random["codebooks"], params["codebooks"])
    few = retriever.init(jax.random.key(0), model, pixels[:5], from_data=True)
    assert np.isfinite(few["codebooks"]).all()
