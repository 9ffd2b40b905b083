import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tcq import config as configs
from tcq import quantizer
from tcq.models import resnet, retriever, vit

SMALL = {"width": 16, "depth": 2, "heads": 2, "patch": 4}


@pytest.fixture
def images():
    return jnp.asarray(np.random.RandomState(0).rand(3, 8, 8, 3), jnp.float32)


# timm's counts without a classifier; of a ViT less one width, for we fold the position of the class token into the
# token.
PUBLISHED = {
    "vit_ti16": 5_524_416 - 192,
    "vit_s16": 21_665_664 - 384,
    "vit_b16": 85_798_656 - 768,
    "vit_l16": 303_301_632 - 1024,
    "resnet18": 11_176_512,
    "resnet34": 21_284_672,
    "resnet50": 23_508_032,
    "resnet101": 42_500_160,
}


@pytest.mark.whole
def test_docs_list_every_named_model_with_its_parameter_count():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", Path("docs/weights.md").read_text(), re.MULTILINE)
    table = {name: int(count.replace(",", "")) for name, count in rows}
    assert set(table) == {*vit.NAMED, *resnet.NAMED}
    assert {name: table[name] for name in PUBLISHED} == PUBLISHED
    for name, count in table.items():
        if name in vit.NAMED:
            (width, depth, heads), patch = vit.NAMED[name]
            one, two = (_count(vit.ViT(width, blocks, heads, patch=patch)) for blocks in (1, 2))
            assert one + (depth - 1) * (two - one) == count, name  # the blocks have the same parameters
        else:
            assert _count(resnet.ResNet(*resnet.NAMED[name])) == count, name


def _count(model):
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), image)["params"]))


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
    params = retriever.init(jax.random.key(0), model, pixels, codewords="data")["params"]
    out = model.apply({"params": params}, images)
    weights = quantizer.soft_assign(out.features, params["codebooks"], scale=c.quantizer.scale, metric=metric)
    np.testing.assert_allclose(out.weights, weights, atol=1e-5)
    np.testing.assert_allclose(out.reconstructions, quantizer.reconstruct(weights, out.codebooks), atol=1e-5)
    lengths = np.linalg.norm(out.codebooks, axis=-1)
    assert (metric == "ip") == bool(np.allclose(lengths, 1, atol=1e-5))


def test_initialisation_from_data_centres_scales_and_takes_codewords_from_features():
    model = retriever.from_config(small_config())
    pixels = np.random.RandomState(1).randint(0, 256, (64, 8, 8, 3)).astype(np.uint8)
    params = retriever.init(jax.random.key(0), model, pixels, codewords="data")["params"]
    x = np.asarray(model.apply({"params": params}, jnp.asarray(pixels, jnp.float32) / 255).features)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-4)
    subvectors = x.reshape(64, 8, 16)
    np.testing.assert_allclose((subvectors**2).sum(-1).mean(), 1, rtol=1e-3)
    for m in range(8):
        distances = np.linalg.norm(subvectors[:, m, None] - np.asarray(params["codebooks"])[m], axis=-1)
        np.testing.assert_allclose(distances.min(0), 0, atol=1e-4)
        assert len(set(distances.argmin(0))) == 16  # 16 different images
    random = retriever.init(jax.random.key(0), model, pixels, codewords="random")["params"]
    assert not np.allclose(random["codebooks"], params["codebooks"])
    few = retriever.init(jax.random.key(0), model, pixels[:5], codewords="data")["params"]
    assert np.isfinite(few["codebooks"]).all()
