import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from tcq import losses


def views(b=6, d=5, seed=0):
    random = np.random.RandomState(seed)
    return random.randn(b, d).astype("f4"), random.randn(b, d).astype("f4")


@pytest.mark.parametrize("clip", [0, 1, 3, 9, 10])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5, 5.0])
def test_nt_xent_equals_the_oracle(clip, temperature):
    a, b = views()
    loss, _ = losses.nt_xent(a, b, temperature=temperature, clip=clip)
    np.testing.assert_allclose(loss, oracle.nt_xent(a, b, temperature, clip), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("pairing", losses.PAIRINGS)
@pytest.mark.parametrize("clip", [0, 4])
def test_contrastive_loss_equals_the_oracle(pairing, clip):
    (xa, xb), (za, zb) = views(seed=1), views(seed=2)
    loss, _ = losses.contrastive_loss(xa, xb, za, zb, pairing=pairing, temperature=0.3, clip=clip)
    np.testing.assert_allclose(loss, oracle.contrastive_loss(xa, xb, za, zb, pairing, 0.3, clip), rtol=2e-5)


def test_without_clipping_it_is_optax_ntxent():
    a, b = views(16, 8)
    labels = np.tile(np.arange(16), 2)
    peer = optax.losses.ntxent(jnp.concatenate([a, b]), jnp.asarray(labels), temperature=0.2)
    np.testing.assert_allclose(losses.nt_xent(a, b, temperature=0.2)[0], peer, rtol=1e-5)


def test_clipping_all_negatives_gives_exactly_zero_and_finite_gradients():
    a, b = views()

    def loss(a, b):
        return losses.nt_xent(a, b, temperature=0.1, clip=10)[0]

    for compile in (lambda f: f, jax.jit):
        value, grads = compile(jax.value_and_grad(loss, (0, 1)))(a, b)
        assert float(value) == 0.0
        assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("clip", [0, 1, 7, 10])
def test_a_clip_that_changes_from_step_to_step_is_the_same_loss(clip):
    a, b = views()
    changing = jax.jit(lambda clip: losses.nt_xent(a, b, temperature=0.1, clip=clip))
    loss, logs = changing(jnp.int32(clip))
    np.testing.assert_allclose(loss, losses.nt_xent(a, b, temperature=0.1, clip=clip)[0], rtol=1e-5)
    assert np.isfinite(logs["clip_similarity"])


def test_loss_never_grows_with_clip():
    a, b = views(8)
    values = [float(losses.nt_xent(a, b, temperature=0.2, clip=k)[0]) for k in range(15)]
    assert all(later <= earlier for earlier, later in zip(values, values[1:], strict=False))


def test_a_clipped_pair_gives_no_gradient_in_that_row():
    """The gradient equals that of a loss in which the oracle's clipped pairs are written out as absent."""
    a, b = views(5, 3)
    x = np.concatenate([a, b])
    s = oracle.unit(x.astype(np.float64)) @ oracle.unit(x.astype(np.float64)).T
    gone = np.zeros((10, 10), bool)
    for i, row in enumerate(oracle.clipped_rows(s, 3)):
        gone[i, list(row)] = True

    def explicit(x):
        x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
        logits = x @ x.T / 0.2
        total = 0.0
        for i in range(10):
            kept = [j for j in range(10) if j != i and not gone[i, j]]
            total += jax.nn.logsumexp(jnp.stack([logits[i, j] for j in kept])) - logits[i, (i + 5) % 10]
        return total / 10

    ours = jax.grad(lambda x: losses.nt_xent(x[:5], x[5:], temperature=0.2, clip=3)[0])(jnp.asarray(x))
    np.testing.assert_allclose(ours, jax.grad(explicit)(jnp.asarray(x)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [1, 2, 5, 9])
def test_exactly_clip_pairs_go_among_ties(clip):
    """All images equal: every similarity is 1, so a row keeps 10 - clip negatives of the same value as its positive."""
    a = np.ones((6, 4), "f4")
    loss, _ = losses.nt_xent(a, a, temperature=0.5, clip=clip)
    np.testing.assert_allclose(loss, np.log(1 + 10 - clip), rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("pairing", losses.PAIRINGS)
def test_loss_logs_and_gradients_do_not_depend_on_the_devices(devices, pairing):
    (xa, xb), (za, zb) = views(16, 8, 1), views(16, 8, 2)
    labels = np.arange(16) % 3

    def loss(arrays, axis_name=None, labels=labels):
        return losses.contrastive_loss(
            *arrays, pairing=pairing, temperature=0.2, clip=6, axis_name=axis_name, labels=labels
        )

    (one, one_logs), one_grads = jax.value_and_grad(loss, has_aux=True)((xa, xb, za, zb))

    def body(arrays, labels):
        (value, logs), grads = jax.value_and_grad(lambda x: loss(x, "i", labels), has_aux=True)(arrays)
        return value, logs, grads

    split = [x.reshape(devices, 16 // devices, 8) for x in (xa, xb, za, zb)]
    mapped = jax.pmap(body, axis_name="i", devices=jax.devices()[:devices])
    value, logs, grads = mapped(split, labels.reshape(devices, -1))
    np.testing.assert_allclose(value, np.full(devices, one), rtol=1e-5)
    for name in one_logs:
        np.testing.assert_allclose(logs[name][0], one_logs[name], rtol=1e-5, atol=1e-7, err_msg=name)
    # Each device holds the gradient of its own rows' inputs, summed over the rows of all: the mean loss is their 1/devices.
    for ours, truth in zip(grads, one_grads, strict=True):
        np.testing.assert_allclose(np.asarray(ours).reshape(16, 8) / devices, truth, rtol=1e-4, atol=1e-7)


def test_logs_say_what_was_clipped():
    random = np.random.RandomState(0)
    labels = np.repeat([0, 1], 4)
    centres = np.array([[3.0, 0, 0], [0, 3.0, 0]])[labels]
    a, b = ((centres + 0.1 * random.randn(8, 3)).astype("f4") for _ in range(2))
    _, logs = losses.nt_xent(a, b, temperature=0.2, clip=6, labels=labels)
    assert float(logs["clip_precision"]) == 1.0  # 3 other images of the class x 2 views
    assert float(logs["clip_recall"]) == 1.0
    np.testing.assert_allclose(logs["false_negative_rate"], 6 / 14, rtol=1e-6)
    _, logs = losses.nt_xent(a, b, temperature=0.2, clip=12, labels=labels)
    np.testing.assert_allclose(logs["clip_precision"], 0.5, rtol=1e-6)
    hot = np.eye(3, dtype=np.int32)[labels]
    hot[:, 2] = [1, 0, 0, 0, 1, 0, 0, 0]  # one image of each class also shares a third label
    _, logs = losses.nt_xent(a, b, temperature=0.2, clip=6, labels=hot)
    np.testing.assert_allclose(logs["clip_recall"], (16 * 6) / (16 * 6 + 8), rtol=1e-6)


def test_accuracy_and_similarities():
    a = np.eye(4, dtype="f4")
    _, logs = losses.nt_xent(a, a, temperature=0.5, clip=1)
    assert float(logs["accuracy"]) == 1.0
    np.testing.assert_allclose([logs["positive_similarity"], logs["negative_similarity"]], [1, 0], atol=1e-6)
    np.testing.assert_allclose(logs["clip_similarity"], 0, atol=1e-6)


def test_regularizers():
    even, decided = np.full((2, 3, 4), 0.25, "f4"), np.eye(4, dtype="f4")[None, :3]
    np.testing.assert_allclose(losses.assignment_entropy(even), np.log(4), rtol=1e-6)
    assert float(losses.assignment_entropy(decided)) == 0.0
    assert np.isfinite(jax.grad(losses.assignment_entropy)(jnp.asarray(decided))).all()
    np.testing.assert_allclose(losses.codeword_diversity(np.eye(4, dtype="f4")[None]), 0.25, rtol=1e-6)
    np.testing.assert_allclose(losses.codeword_diversity(np.ones((2, 4, 3), "f4")), 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_and_low_temperature_stay_finite(dtype):
    a, b = (jnp.asarray(v, dtype) for v in views(8))
    value, grad = jax.value_and_grad(lambda a: losses.nt_xent(a, b, temperature=0.01, clip=2)[0])(a)
    assert np.isfinite(float(value)) and np.isfinite(np.asarray(grad, np.float32)).all()


def test_errors_carry_the_numbers(untyped):
    a, b = views()
    with pytest.raises(ValueError, match="clip 11 is not within the 10 negatives of a global batch of 6"):
        losses.nt_xent(a, b, temperature=0.5, clip=11)
    with pytest.raises(ValueError, match="temperature 0"):
        losses.nt_xent(a, b, temperature=0.0)
    with pytest.raises(ValueError, match="'crossed' is unknown"):
        losses.contrastive_loss(a, b, a, b, pairing="crossed", temperature=0.5)
