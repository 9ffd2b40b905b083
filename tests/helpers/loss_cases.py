"""Inputs of the loss, and how its results are compared."""

import jax
import jax.numpy as jnp
import numpy as np

from tcq import losses


def views(b=6, d=5, seed=0):
    random = np.random.RandomState(seed)
    return random.randn(b, d).astype("f4"), random.randn(b, d).astype("f4")


def assert_equals_the_oracle(got, want, rtol=1e-5):
    """Compares the loss, and the gradients relative to their largest entry."""
    (loss, gradients), (true_loss, true_gradients) = got, want
    np.testing.assert_allclose(loss, true_loss, rtol=rtol, atol=1e-12)
    for ours, truth in zip(gradients, true_gradients, strict=True):
        np.testing.assert_allclose(ours, truth, atol=rtol * max(np.abs(truth).max(initial=0), 1e-12))


def corners(b, seed=0):
    """Views whose unit vectors and similarities are exact in float32, with few values: many ties."""
    random = np.random.RandomState(seed)
    return random.choice([-0.5, 0.5], (b, 4)).astype("f4"), random.choice([-0.5, 0.5], (b, 4)).astype("f4")


def on_devices(function, arrays, devices):
    """function(*arrays of one device), mapped over devices along the axis "i"; every result has a device axis."""
    mapped = jax.pmap(function, axis_name="i", devices=jax.devices()[:devices])
    return mapped(*(x.reshape(devices, -1, *x.shape[1:]) for x in arrays))


def memory(batch, devices=8, **options):
    """Bytes of temporary memory on each device that XLA plans for loss and gradient."""

    def body(a, b):
        return jax.grad(lambda a, b: losses.nt_xent(a, b, temperature=0.2, axis_name="i", **options)[0], (0, 1))(a, b)

    views = [jax.ShapeDtypeStruct((devices, batch // devices, 128), jnp.float32)] * 2
    mapped = jax.pmap(body, axis_name="i", devices=jax.devices()[:devices])
    return mapped.lower(*views).compile().memory_analysis().temp_size_in_bytes
