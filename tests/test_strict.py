"""tcq under the strict flags of JAX: its own functions, and every command, whatever optax and flax take for granted."""

import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small
from tcq import losses, quantizer, ranking

STRICT = [("jax_numpy_dtype_promotion", "strict"), ("jax_enable_x64", True), ("jax_debug_nans", True)]


@pytest.mark.parametrize(("flag", "value"), STRICT)
@pytest.mark.parametrize("scope", losses.SCOPES)
@pytest.mark.whole
def test_losses_are_float32_and_the_same(flag, value, scope):
    a, b = (np.random.RandomState(i).randn(16, 8).astype("f4") for i in (0, 1))

    def values():
        def loss(x):
            return losses.nt_xent(x, jnp.asarray(b), temperature=0.3, clip=3, clip_scope=scope)[0]

        return jax.value_and_grad(loss)(jnp.asarray(a))

    want = values()
    before = getattr(jax.config, flag)
    jax.config.update(flag, value)
    try:
        loss, gradient = values()
        codebooks = jnp.asarray(np.random.RandomState(2).randn(2, 4, 4).astype("f4"))
        codes = quantizer.hard_assign(jnp.asarray(a), codebooks, metric="l2")
        scores, _ = ranking.top_k(ranking.lookup_table(a, np.asarray(codebooks), metric="l2"), np.asarray(codes), 3)
    finally:
        jax.config.update(flag, before)
    assert loss.dtype == gradient.dtype == np.float32 and scores.dtype == np.float32
    np.testing.assert_allclose(loss, want[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, want[1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "value"), [*STRICT, ("jax_debug_infs", True)])
def test_commands(flag, value, tmp_path):
    environment = small.environment() | {flag.upper(): "1" if value is True else value}
    flags = small.flags("train.total_steps=4", "loss.clip_scope=batch", "loss.queue=8", "model.dtype=bfloat16")
    run = ["train", "--config=configs/digits.py", f"--workdir={tmp_path}", *flags]
    for command in (run, ["evaluate", f"--workdir={tmp_path}"]):
        done = subprocess.run(small.command(*command), env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
