"""Clipping the most similar pairs of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from loss_cases import assert_equals_the_oracle, corners, memory, on_devices, views
from tcq import losses


@pytest.mark.parametrize("block_size", [None, 1, 5])
@pytest.mark.parametrize("clip", [0, 1 / 32, 1, 2.5, 81 / 32, 8, 21, 29.9, 959 / 32, 30])
def test_loss_and_gradients_equal_the_oracle(clip, block_size):
    a, b = views(16, 7)
    got = of_the_batch(a, b, clip, temperature=0.2, block_size=block_size)
    assert_equals_the_oracle(got, oracle.nt_xent_and_gradients(a, b, 0.2, clip, scope="batch"))


def of_the_batch(a, b, clip, queue=None, **options):
    """Loss and gradients as the oracle returns them; the clip is traced."""
    vectors = np.zeros((0, a.shape[1]), "f4") if queue is None else queue
    return compiled(**options)(a, b, vectors, jnp.float32(clip))


@functools.cache
def compiled(**options):
    def loss(a, b, vectors, clip):
        queue = losses.Queue(vectors, len(vectors)) if len(vectors) else None
        return losses.nt_xent(a, b, queue=queue, clip=clip, clip_scope="batch", **options)[0]

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def test_an_anchor_loses_as_many_as_it_has():
    """Six images of one thing and two of other things: all clipped pairs are among the six."""
    a = np.concatenate([np.ones((6, 4)), np.eye(4)[:2] - np.eye(4)[2:]]).astype("f4")
    labels = np.array([0] * 6 + [1, 2])
    _, logs = losses.nt_xent(a, a, temperature=0.2, clip=6 * 10 / 8, clip_scope="batch", labels=labels)
    assert float(logs["clip_precision"]) == 1.0 and float(logs["clip_recall"]) == 1.0
    _, logs = losses.nt_xent(a, a, temperature=0.2, clip=7, labels=labels)
    assert float(logs["clip_precision"]) < 0.8


@pytest.mark.parametrize("clip", np.arange(0, 22.5, 1.75))
def test_ties_are_clipped_by_anchor_then_by_column(clip):
    a, b = corners(12)
    for block_size in (None, 5):
        got = of_the_batch(a, b, float(clip), temperature=0.3, block_size=block_size)
        assert_equals_the_oracle(got, oracle.nt_xent_and_gradients(a, b, 0.3, clip, scope="batch"))


@pytest.mark.parametrize("clip", [0.5, 3, 14, 19])
@pytest.mark.parametrize("debias", [0.0, 0.1])
def test_debiased_and_with_a_queue(clip, debias):
    a, b = views(8, 6)
    queue = views(5, 6, seed=3)[0]
    got = of_the_batch(a, b, clip, queue, temperature=0.3, debias=debias, block_size=6)
    assert_equals_the_oracle(got, oracle.nt_xent_and_gradients(a, b, 0.3, clip, debias, queue, scope="batch"))


@pytest.mark.parametrize("gather", losses.GATHERS)
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.whole), 8])
def test_ties_and_a_queue_on_devices(devices, gather):
    a, b = corners(16)
    queue = corners(4, seed=5)[0]

    def body(a, b, clip):
        def loss(a, b, vectors):
            options = {"axis_name": "i", "gather": gather, "block_size": 3, "temperature": 0.3, "clip_scope": "batch"}
            return losses.nt_xent(a, b, queue=losses.Queue(vectors, 4), clip=clip[0], debias=0.1, **options)[0]

        return jax.value_and_grad(loss, (0, 1, 2))(a, b, queue)

    mapped = jax.pmap(body, axis_name="i", devices=jax.devices()[:devices])
    for clip in (1, 9.3, 34):
        parts = (x.reshape(devices, -1, *x.shape[1:]) for x in (a, b, np.full(devices, clip, "f4")))
        loss, (by_a, by_b, by_queue) = mapped(*parts)
        by_a, by_b = (np.asarray(x).reshape(16, 4) / devices for x in (by_a, by_b))
        got = loss[0], (by_a, by_b, np.mean(by_queue, axis=0))
        assert_equals_the_oracle(got, oracle.nt_xent_and_gradients(a, b, 0.3, clip, 0.1, queue, scope="batch"))


@pytest.mark.parametrize(
    ("b", "d", "block_size", "share"),
    [(64, 16, 8, 1.0), (64, 16, 8, 0.6), (300, 33, None, 0.6), (300, 33, None, 0.4), (257, 33, 100, 0.5)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_images_are_counted_whatever_their_rounding(b, d, block_size, share, seed):
    a = np.random.RandomState(seed).randn(b, d).astype(np.float32)
    same = int(b * share)
    a[:same] = a[0]  # their cosines are 1, or a float below it in blocks of another shape
    clip = b / 2 * share**2
    run = jax.jit(
        lambda a: losses.nt_xent(
            a, a, temperature=0.2, clip=clip, clip_scope="batch", block_size=block_size, labels=np.zeros(b)
        )
    )
    clipped = float(run(a)[1]["clip_recall"]) * 2 * b * (2 * b - 2)
    assert abs(clipped - int(clip * 2 * b)) < 0.5


@pytest.mark.parametrize("clip", [1 / 16, 0.5])
def test_precision_of_less_than_one_pair_for_each_anchor(clip):
    a, b = views(16, 7)
    logs = losses.nt_xent(a, b, temperature=0.2, clip=clip, clip_scope="batch", labels=np.zeros(16, int))[1]
    np.testing.assert_allclose(logs["clip_precision"], 1, rtol=1e-6)


@pytest.mark.parametrize("gather", losses.GATHERS)
def test_logs_do_not_depend_on_the_devices(gather):
    arrays = *corners(16), np.arange(16) % 3

    def logs(a, b, labels, **options):
        clips = {"clip": 9.3, "clip_scope": "batch", "labels": labels}
        return losses.nt_xent(a, b, temperature=0.3, **clips, **options)[1]

    one, many = logs(*arrays), on_devices(lambda *x: logs(*x, axis_name="i", gather=gather), arrays, 8)
    assert one.keys() == many.keys()
    for name in one:
        np.testing.assert_allclose(many[name][0], one[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("kind", ["normal", "classes", "one class", "few values", "equal", "tiny"])
def test_exactly_so_many_pairs_for_any_distribution(kind):
    """Of the 512 x 510 pairs, as the recall of one class says; pairs that differ by rounding may change places."""
    random = np.random.RandomState(0)
    a, b = {
        "normal": lambda: random.randn(2, 256, 16),
        "classes": lambda: random.randn(10, 16)[random.randint(0, 10, 256)] + 0.1 * random.randn(2, 256, 16),
        "one class": lambda: np.where(np.arange(256)[:, None] < 80, 1.0, random.randn(2, 256, 16)),
        "few values": lambda: random.choice([-0.5, 0.5], (2, 256, 4)),
        "equal": lambda: np.ones((2, 256, 16)),
        "tiny": lambda: np.eye(256)[None].repeat(2, 0) + 1e-30 * random.randn(2, 256, 256),
    }[kind]().astype("f4")
    run = jax.jit(
        lambda clip: losses.nt_xent(a, b, temperature=0.2, clip=clip, clip_scope="batch", labels=np.zeros(256, int))[1]
    )
    exact = kind in ("few values", "equal", "tiny")
    for clip in (0.0157, 1.0, 7.5, 51.0, 300.0, 509.99, 510.0):
        pairs = np.floor(np.float32(clip) * 512)
        recall = float(run(jnp.float32(clip))["clip_recall"])
        assert abs(round(recall * 512 * 510) - pairs) <= (0 if exact else 2), clip


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_numbers(data):
    """Exactly the pairs that sorting selects, ties included; rows of zeros give no NaN."""
    b = data.draw(st.sampled_from([2, 3, 5]))
    rows = st.lists(st.sampled_from([0.0, 1.0, -1.0]), min_size=4, max_size=4)
    a, c = (np.array(data.draw(st.lists(rows, min_size=b, max_size=b)), "f4") for _ in range(2))
    a, c = (np.where(np.isin(np.abs(x).sum(1, keepdims=True), (2, 3)), x * np.eye(4)[0], x) for x in (a, c))
    clip = data.draw(st.integers(0, 2 * b * (2 * b - 2))) / (2 * b)
    got = traced(a, c, jnp.float32(clip))
    assert all(np.isfinite(g).all() for g in got[1])
    if not all(x.any(axis=1).all() for x in (a, c)):
        return
    truth = oracle.nt_xent_and_gradients(a, c, 0.2, clip, scope="batch")
    np.testing.assert_allclose(got[0], truth[0], rtol=1e-5, atol=1e-6)


@jax.jit
def traced(a, b, clip):
    def loss(a, b):
        return losses.nt_xent(a, b, temperature=0.2, clip=clip, clip_scope="batch", block_size=3)[0]

    return jax.value_and_grad(loss, (0, 1))(a, b)


def test_a_clip_that_changes_loses_no_pair_to_rounding():
    a, b = views(7, 5)
    run = jax.jit(lambda c: losses.nt_xent(a, b, temperature=0.2, clip=c, clip_scope="batch", labels=np.zeros(7, int)))
    for pairs in range(14 * 12 + 1):
        recall = run(jnp.float32(pairs / 14))[1]["clip_recall"]
        assert round(float(recall) * 14 * 12) == pairs


def test_a_clip_that_changes_is_the_same_loss():
    a, b = views(16, 7)
    for clip in (0, 2.5, 30):
        constant, _ = losses.nt_xent(a, b, temperature=0.2, clip=clip, clip_scope="batch")
        np.testing.assert_allclose(traced(a, b, jnp.float32(clip))[0], constant, rtol=1e-5, atol=1e-7)
    assert float(traced(a, b, jnp.float32(30))[0]) == 0.0


@pytest.mark.parametrize("gather", losses.GATHERS)
@pytest.mark.whole
def test_memory_grows_no_faster_than_the_batch(gather):
    small, large = (memory(n, gather=gather, clip=n // 50, clip_scope="batch") for n in (2**13, 2**14))
    assert large < 2.1 * small


@pytest.mark.parametrize("clip", [0, 0.5, 1, 3])
def test_one_image_and_a_queue(clip):
    a, b = views(1, 6)
    queue = views(3, 6, seed=3)[0]
    got = of_the_batch(a, b, clip, queue, temperature=0.3, block_size=1)
    assert_equals_the_oracle(got, oracle.nt_xent_and_gradients(a, b, 0.3, clip, 0.0, queue, scope="batch"))


def test_nan_is_not_searched_for_ever():
    a, b = views(16, 7)
    a[3] = np.nan
    assert np.isnan(of_the_batch(a, b, 4, temperature=0.2)[0])


def test_errors(untyped):
    a, b = views()
    for message, arguments in {
        "clip_scope 'all' is unknown: use one of anchor, batch": {"clip_scope": "all"},
        "clip 1.5 must be an integer; only with clip_scope 'batch'": {"clip": 1.5},
        "clip 11 must be from 0 to the 10 negatives": {"clip": 11, "clip_scope": "batch"},
    }.items():
        with pytest.raises(ValueError, match=message):
            losses.nt_xent(a, b, **({"temperature": 0.2} | arguments))
    wide = jax.ShapeDtypeStruct((2**16, 4), jnp.float32)
    with pytest.raises(ValueError, match=r"a batch of 65536 .* has more than 4294967295 pairs"):
        jax.eval_shape(lambda a: losses.nt_xent(a, a, temperature=0.2, clip=1, clip_scope="batch"), wide)
