import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tcq.models import resnet

SHORT = {"stages": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("stem", "bottleneck"), [pytest.param("imagenet", True, marks=pytest.mark.whole), ("cifar", False)]
)
def test_resnets(stem, bottleneck):
    images = jnp.asarray(np.random.RandomState(0).rand(4, 16, 16, 3), jnp.float32)
    model = resnet.ResNet(**SHORT, bottleneck=bottleneck, stem=stem)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    x, moved = jax.jit(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]))(variables)
    assert x.shape == (4, 2048 if bottleneck else 512) and x.dtype == jnp.float32
    old, new = variables["batch_stats"], moved["batch_stats"]
    assert all(bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
    low = model.clone(dtype=jnp.bfloat16)
    y, moved = jax.jit(lambda v: low.apply(v, images, train=True, mutable=["batch_stats"]))(variables)
    assert y.dtype == jnp.float32 and {v.dtype for v in jax.tree.leaves(moved)} == {jnp.dtype("float32")}
    y, x = (np.asarray(jax.jit(lambda v, m=m: m.apply(v, images))(variables)) for m in (low, model))
    np.testing.assert_allclose(y, x, atol=0.05 * np.abs(x).max())


def test_frozen_blocks_of_a_resnet_keep_their_statistics():
    images = jnp.asarray(np.random.RandomState(0).rand(4, 8, 8, 3), jnp.float32)
    for frozen, still in ((0, 0), (2, 3), (-1, 5)):
        model = resnet.ResNet(**SHORT, bottleneck=False, stem="cifar", frozen_blocks=frozen)
        variables = jax.jit(model.init)(jax.random.key(0), images)
        _, moved = jax.jit(lambda v, m=model: m.apply(v, images, train=True, mutable=["batch_stats"]))(variables)
        same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), variables["batch_stats"], moved["batch_stats"])
        places = ["stem_norm"] + [f"stage_{i}_block_0" for i in range(4)]
        assert [all(jax.tree.leaves(same[p])) for p in places] == [True] * still + [False] * (5 - still)


def test_batch_statistics_are_of_all_devices():
    images = jnp.asarray(np.random.RandomState(0).rand(16, 8, 8, 3), jnp.float32)
    alone = resnet.ResNet(**SHORT, bottleneck=False, stem="cifar")
    variables = jax.jit(alone.init)(jax.random.key(0), images)
    x, want = jax.jit(lambda v: alone.apply(v, images, train=True, mutable=["batch_stats"]))(variables)
    shared = alone.clone(axis_name="i")
    run = jax.pmap(
        lambda v, x: shared.apply(v, x, train=True, mutable=["batch_stats"]),
        axis_name="i",
        in_axes=(None, 0),
        out_axes=(0, None),
        devices=jax.devices()[:2],
    )
    y, got = run(variables, images.reshape(2, 8, 8, 8, 3))
    np.testing.assert_allclose(y.reshape(16, -1), x, atol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)
