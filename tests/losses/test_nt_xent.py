import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from loss_cases import assert_equals_the_oracle, corners, memory, on_devices, views
from tcq import losses


def loss_and_gradients(a, b, queue=None, *, clip, **options):
    """Returns loss and gradients as the oracle does; a clip above 0 is traced, not compiled in."""
    vectors = np.zeros((0, a.shape[1]), "f4") if queue is None else queue
    run = compiled(clip=None if clip else 0, **options)
    return run(a, b, vectors, jnp.int32(clip))


@functools.cache
def compiled(*, clip, **options):
    def loss(a, b, vectors, traced):
        queue = losses.Queue(vectors, len(vectors)) if len(vectors) else None
        return losses.nt_xent(a, b, queue=queue, clip=traced if clip is None else clip, **options)[0]

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


@pytest.mark.parametrize("clip", [0, 1, 3, 9, 10])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5, 5.0])
def test_loss_and_gradients_equal_the_oracle(clip, temperature):
    a, b = views()
    got = loss_and_gradients(a, b, temperature=temperature, clip=clip)
    assert_equals_the_oracle(got, oracle.nt_xent_and_gradients(a, b, temperature, clip))


@pytest.mark.parametrize("block_size", [1, 4, 5, 12, 32, 1000])
@pytest.mark.parametrize("clip", [0, 1, 8, 20, 29, 30])
def test_the_size_of_a_block_does_not_matter(clip, block_size):
    a, b = views(16, 7)
    got = loss_and_gradients(a, b, temperature=0.2, clip=clip, block_size=block_size)
    assert_equals_the_oracle(got, oracle.nt_xent_and_gradients(a, b, 0.2, clip))


@pytest.mark.parametrize("clip", range(0, 23, 2))
@pytest.mark.parametrize("block_size", [None, 5])
def test_ties_are_clipped_in_column_order(clip, block_size):
    a, b = corners(12)
    got = loss_and_gradients(a, b, temperature=0.3, clip=clip, block_size=block_size)
    assert_equals_the_oracle(got, oracle.nt_xent_and_gradients(a, b, 0.3, clip))


@pytest.mark.parametrize("clip", [0, 3, 14, 19])
@pytest.mark.parametrize("debias", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("entries", [0, 5])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_debiased_and_with_a_queue(clip, debias, entries, temperature):
    a, b = views(8, 6)
    queue = views(5, 6, seed=3)[0][:entries]
    clip = min(clip, 14 + entries)
    got = loss_and_gradients(a, b, queue, temperature=temperature, clip=clip, debias=debias, block_size=6)
    assert_equals_the_oracle(got, oracle.nt_xent_and_gradients(a, b, temperature, clip, debias, queue))


def test_debiased_at_its_floor():
    """An estimate below that of N negatives with similarity -1 is replaced by it, and has no gradient."""
    a = np.concatenate([np.eye(3), -np.eye(3)]).astype("f4")
    b = a + 0.1 * views(6, 3)[0]
    got = loss_and_gradients(a, b, temperature=0.5, debias=0.9, clip=0)
    assert_equals_the_oracle(got, oracle.nt_xent_and_gradients(a, b, 0.5, 0, 0.9))
    np.testing.assert_allclose(oracle.nt_xent(a, a, 0.5, 0, 0.9), np.log(1 + 10 * np.exp(-4)), rtol=1e-6)


def test_only_valid_entries_of_the_queue_count():
    a, b = views(4, 5)
    vectors = np.concatenate([views(3, 5, 1)[0], np.zeros((2, 5), "f4")])
    for filled in (0, 3):
        loss, _ = losses.nt_xent(a, b, temperature=0.2, clip=2, queue=losses.Queue(vectors, jnp.int32(filled)))
        np.testing.assert_allclose(loss, oracle.nt_xent(a, b, 0.2, 2, queue=vectors[:filled]), rtol=1e-5)
    loss, _ = losses.nt_xent(a, b, temperature=0.2, clip=9, queue=losses.Queue(vectors, jnp.int32(0)))
    assert float(loss) == 0  # all 6 negatives are clipped
    for filled, valid in ((-2, 0), (7, 3)):
        queue = losses.Queue(vectors[:3], jnp.int32(filled))
        loss, _ = losses.nt_xent(a, b, temperature=0.2, debias=0.1, queue=queue)
        np.testing.assert_allclose(loss, oracle.nt_xent(a, b, 0.2, 0, 0.1, vectors[:valid]), rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_properties(data):
    """For any numbers there is no NaN, a larger clip has no larger loss, and the order of the batch does not matter."""
    b, size = data.draw(st.sampled_from([(2, 1), (5, 4), (9, 7)]))
    numbers = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e-15, 1e18]), st.floats(-3, 3, width=32))
    rows = st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=b, max_size=b)
    dtype = data.draw(st.sampled_from([jnp.float32, jnp.bfloat16]))
    a, c = (jnp.asarray(np.array(data.draw(rows), "f4"), dtype) for _ in range(2))
    temperature = data.draw(st.sampled_from([0.01, 0.3]))
    clips = sorted(data.draw(st.tuples(st.integers(0, 2 * b - 2), st.integers(0, 2 * b - 2))))
    order = np.array(data.draw(st.permutations(range(b))))
    run = compiled(clip=None, temperature=temperature, block_size=size)
    none = jnp.zeros((0, 3))
    (fewer, grads), (more, _) = (run(a, c, none, jnp.int32(k)) for k in clips)
    moved, _ = run(a[order], c[order], none, jnp.int32(clips[0]))
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (fewer, more, *grads))
    assert float(more) <= float(fewer) * (1 + 1e-5) + 1e-6
    np.testing.assert_allclose(moved, fewer, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("clip", [1, 2, 5, 9])
def test_exactly_clip_ties_are_dropped(clip):
    """All images are equal, so every similarity is 1 and a row keeps 10 - clip negatives like its positive."""
    a = np.ones((6, 4), "f4")
    loss, _ = losses.nt_xent(a, a, temperature=0.5, clip=clip)
    np.testing.assert_allclose(loss, np.log(1 + 10 - clip), rtol=1e-6)


@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize(
    ("devices", "pairing"), [(1, "cross"), (2, "cross"), (8, "cross"), (8, "quantized"), (8, "float")]
)
def test_loss_logs_and_gradients_do_not_depend_on_the_devices(devices, gather, pairing):
    arrays = *views(16, 8, 1), *views(16, 8, 2)
    labels = np.arange(16) % 3

    def loss(arrays, labels, **options):
        return losses.contrastive_loss(*arrays, pairing=pairing, temperature=0.2, clip=6, labels=labels, **options)

    (one, one_logs), one_grads = jax.value_and_grad(loss, has_aux=True)(arrays, labels)

    def body(*arrays_and_labels):
        *arrays, labels = arrays_and_labels
        options = {"axis_name": "i", "gather": gather, "block_size": 3}
        return jax.value_and_grad(lambda x: loss(x, labels, **options), has_aux=True)(arrays)

    (value, logs), grads = on_devices(body, (*arrays, labels), devices)
    np.testing.assert_allclose(value, np.full(devices, one), rtol=1e-5)
    for name in one_logs:
        np.testing.assert_allclose(logs[name][0], one_logs[name], rtol=1e-5, atol=1e-7, err_msg=name)
    # Each device has the gradient of its own inputs, summed over the rows of all devices: divide for the mean loss.
    for ours, truth in zip(grads, one_grads, strict=True):
        np.testing.assert_allclose(np.asarray(ours).reshape(16, 8) / devices, truth, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("gather", losses.GATHERS)
@pytest.mark.parametrize("clip", [0, 1, 9, 25, 34])
def test_ties_and_a_queue_on_four_devices(clip, gather):
    a, b = corners(16)
    queue = corners(4, seed=5)[0]

    def body(a, b):
        def loss(a, b, vectors):
            options = {"axis_name": "i", "gather": gather, "block_size": 5, "temperature": 0.3, "clip": clip}
            return losses.nt_xent(a, b, queue=losses.Queue(vectors, 4), debias=0.1, **options)[0]

        return jax.value_and_grad(loss, (0, 1, 2))(a, b, queue)

    loss, (by_a, by_b, by_queue) = on_devices(body, (a, b), 4)
    gradients = (np.asarray(by_a).reshape(16, 4) / 4, np.asarray(by_b).reshape(16, 4) / 4, np.mean(by_queue, axis=0))
    assert_equals_the_oracle((loss[0], gradients), oracle.nt_xent_and_gradients(a, b, 0.3, clip, 0.1, queue))


@pytest.mark.parametrize("gather", losses.GATHERS)
def test_memory_grows_no_faster_than_the_batch(gather):
    sizes = [2**14, 2**15, 2**16]
    sizes_in_bytes = [memory(n, gather=gather, clip=n // 50) for n in sizes]
    assert sizes_in_bytes[1] < 2.1 * sizes_in_bytes[0] and sizes_in_bytes[2] < 2.1 * sizes_in_bytes[1]
    assert sizes_in_bytes[2] < 2**30
    whole = 4 * 2 * 2**16 // 8 * 2 * 2**16  # bytes of this device's share of the similarities
    assert sizes_in_bytes[2] < whole / 20


ORDERS = r"\bsort\(|hlo\.sort|top_?k"


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_no_backend_sorts(platform):
    a = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    f = jax.jit(jax.value_and_grad(lambda a, b: losses.nt_xent(a, b, temperature=0.2, clip=20)[0]))
    lowered = f.trace(a, a).lower(lowering_platforms=(platform,))
    programs = [lowered.as_text()] + ([lowered.compile().as_text()] if platform == "cpu" else [])
    for program in programs:
        assert "while" in program
        assert not re.search(ORDERS, program, re.IGNORECASE)
    sorting = jax.jit(lambda a: jax.lax.top_k(a, 3)).trace(a).lower(lowering_platforms=(platform,)).as_text()
    assert re.search(ORDERS, sorting, re.IGNORECASE)  # the pattern matches a program that sorts


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


@pytest.mark.parametrize("scope", losses.SCOPES)
def test_a_traced_clip_stays_between_none_and_all(scope):
    a, b = views()
    run = jax.jit(lambda clip: losses.nt_xent(a, b, temperature=0.2, clip=clip, clip_scope=scope)[0])
    none, all_of_them = run(jnp.int32(0)), run(jnp.int32(10))
    assert none > all_of_them
    for number, truth in ((-3, none), (11, all_of_them), (10**6, all_of_them)):
        assert run(jnp.int32(number)) == truth
    if scope == "batch":
        assert run(jnp.float32(-0.5)) == none and run(jnp.float32(1e9)) == all_of_them


@pytest.mark.parametrize("dtype", ["f4", "i1"])
def test_a_traced_clip_of_any_type(dtype):
    a, b = views()
    with jax.numpy_dtype_promotion("strict"):
        run = jax.jit(lambda clip: losses.nt_xent(a, b, temperature=0.2, clip=clip, clip_scope="batch")[0])
        got = run(jnp.asarray(3, dtype))
    truth = losses.nt_xent(a, b, temperature=0.2, clip=3, clip_scope="batch")[0]
    np.testing.assert_allclose(got, truth, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["i1", "u1", "f4"])
def test_many_labels_in_a_small_dtype_are_shared(dtype):
    a, b = views(8)
    labels = np.zeros((8, 300), dtype)
    labels[:4, :256] = 1  # a sum of 256 is 0 in eight bits
    labels[4:, 299] = 1
    _, logs = losses.nt_xent(a, b, temperature=0.2, clip=6, labels=labels)
    np.testing.assert_allclose(logs["false_negative_rate"], 6 / 14, rtol=1e-6)


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


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize(("clip", "block_size", "entries"), [(0, None, 0), (3, None, 0), (3, 4, 5)])
def test_where_jax_defaults_to_float64(clip, block_size, entries, dtype):
    a, b, queue = *views(), views(seed=1)[0][:entries]
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, dtype) for x in (a, b, queue)]
        got = loss_and_gradients(*arrays, temperature=0.2, clip=clip, block_size=block_size)
        assert got[0].dtype == "f4" and got[1][0].dtype == dtype
    assert_equals_the_oracle(got, oracle.nt_xent_and_gradients(a, b, 0.2, clip, queue=queue))


def test_errors_carry_the_numbers(untyped):
    a, b = views()
    queue = losses.Queue(a, 6)
    for message, arguments in {
        "clip 11 must be from 0 to the 10 negatives of a batch of 6": {"clip": 11},
        "clip 17 must be from 0 to the 16 negatives": {"clip": 17, "queue": queue},
        "clip -1 must be": {"clip": np.int32(-1)},
        "clip 11 must": {"clip": np.int64(11)},
        "temperature 0.0 must be from 0.0001 to 10000": {"temperature": 0.0},
        "temperature inf": {"temperature": np.inf},
        "temperature nan": {"temperature": np.nan},
        "temperature 2e-05": {"temperature": 2e-5},
        "a batch of 1 images has no negatives": {"a": a[:1], "b": b[:1]},
        "debias 1.0 is a share": {"debias": 1.0},
        "block_size 0 must be": {"block_size": 0},
        "gather 'some' is unknown": {"gather": "some"},
        "gather 'ring' needs the axis_name": {"gather": "ring"},
        "labels cannot be combined with a queue": {"queue": queue, "labels": np.zeros(6, int)},
        r"one shape \(B, D\), got \(5, 5\), \(6, 5\)": {"b": b[:5]},
        r"one shape \(B, D\), got \(6, 0\)": {"a": a[:, :0], "b": b[:, :0]},
        r"labels \(5,\) must be \(6,\) or \(6, L\)": {"labels": np.zeros(5, int)},
        r"labels \(6, 2, 2\) must be": {"labels": np.zeros((6, 2, 2), int)},
        r"queue \(6, 3\) must be a losses.Queue of vectors \(Q, 5\)": {"queue": losses.Queue(a[:, :3], 6)},
        "queue tuple must be": {"queue": (a, 6)},
        "clip None must be one number": {"clip": None},
        "clip '3' must be one number": {"clip": "3"},
        r"clip array\(\[3\]\) must be one number": {"clip": np.array([3])},
        "block_size 2.5 must be an integer": {"block_size": 2.5},
    }.items():
        with pytest.raises(ValueError, match=message):
            losses.nt_xent(**{"a": a, "b": b, "temperature": 0.5, **arguments})
    with pytest.raises(ValueError, match="'crossed' is unknown"):
        losses.contrastive_loss(a, b, a, b, pairing="crossed", temperature=0.5)
