import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import small
from tcq import config as configs
from tcq import losses
from tcq.runtime import devices

SGD = ("optim.name=sgd", "optim.warmup_steps=0")


def shard_map_step(body):
    """The step body under jit(shard_map) instead of pmap."""
    mesh = Mesh(np.array(jax.devices()), (devices.AXIS,))

    def one_device(state, data, batch):
        return body(state, data, jax.tree.map(lambda x: x[0], batch))  # shard_map keeps the mapped axis, with length 1

    # With check_vma=True the gradient of a per-device loss would already be summed over the devices.
    mapped = partial(jax.shard_map, mesh=mesh, check_vma=False)
    specs = PartitionSpec(), PartitionSpec(), PartitionSpec(devices.AXIS)
    return jax.jit(mapped(one_device, in_specs=specs, out_specs=(PartitionSpec(), PartitionSpec())), donate_argnums=0)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["loss.clip=0.2"], marks=pytest.mark.whole),
        ["loss.clip=0.2", "loss.clip_scope=batch", "loss.clip_from=0", "loss.clip_full=0.9"],
        pytest.param(
            [
                "loss.clip=3",
                "quantizer.metric=ip",
                "loss.pairing=quantized",
                "loss.entropy_weight=0.1",
                "loss.diversity_weight=0.1",
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_three_steps_are_the_same_on_1_2_and_8_devices(overrides):
    # SGD: Adam would turn rounding into a whole step wherever a gradient is 0 but for rounding.
    c = small.config(*overrides, *SGD, "data.augment.flip=0.5", "optim.learning_rate=0.3")
    images, body, start = small.first_step(c)
    results = {}
    for n in (1, 2, 8):
        batches = [small.batch(images[16 * i : 16 * (i + 1)], n) for i in range(3)]
        state, logs = small.run_steps(body, start, batches, n)[-1]
        results[n] = state.params, logs
    for n in (2, 8):
        for one, many in zip(jax.tree.leaves(results[1]), jax.tree.leaves(results[n]), strict=True):
            np.testing.assert_allclose(many, one, rtol=1e-4, atol=2e-6)
    changes = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), results[1][0], start.params)
    assert max(jax.tree.leaves(changes)) > 1e-2


class TestPmap:
    """Three steps on 8 devices, compiled once."""

    @pytest.fixture(scope="class")
    @classmethod
    def steps(cls):
        c = small.config("quantizer.metric=ip", "loss.temperature=0.2", "data.augment.flip=0.5")
        images, body, start = small.first_step(c)
        step, state, donated = devices.pmap_step(body), devices.replicate(start), []
        for _ in range(3):
            donated.append(state)
            state, logs = step(state, (), small.batch(images[:16], 8))
            jax.block_until_ready(logs)
        return images, body, start, donated, state, logs

    @pytest.mark.whole
    def test_shard_map_gives_the_same_bits(self, steps):
        images, body, start, _, *results = steps
        step, state = shard_map_step(body), devices.replicate(start)
        for _ in range(3):
            state, logs = step(state, (), small.batch(images[:16], 8))
            jax.block_until_ready(logs)
        for a, b in zip(
            jax.tree.leaves(devices.fetch((state, logs))), jax.tree.leaves(devices.fetch(results)), strict=True
        ):
            np.testing.assert_array_equal(a, b)

    def test_state_is_donated_and_has_no_device_axis(self, steps):
        _, _, start, donated, state, _ = steps
        assert jax.tree.map(jnp.shape, tuple(state)) == jax.tree.map(jnp.shape, tuple(start))
        assert all(x.is_deleted() for x in jax.tree.leaves(donated[0].params))

    def test_every_parameter_learns(self, steps):
        _, _, start, _, state, _ = steps
        changes = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), devices.fetch(state.params), start.params)
        still = [jax.tree_util.keystr(p) for p, m in jax.tree_util.tree_leaves_with_path(changes) if m == 0]
        assert still == []


def test_the_clip_changes_without_compiling_again():
    c = small.config("loss.clip=8", "loss.clip_full=1.0")
    images, body, start = small.first_step(c)
    traces = []
    step = devices.pmap_step(lambda *arguments: traces.append(1) or body(*arguments))
    state, similarities = devices.replicate(start), set()
    for _ in range(4):
        state, logs = step(state, (), small.batch(images[:16], 8))
        similarities.add(float(logs["clip_similarity"]))
    assert traces == [1] and len(similarities) == 4


def test_nothing_is_transferred_to_the_devices_implicitly():
    images, body, start = small.first_step(small.shared())
    step, state = devices.pmap_step(body), devices.replicate(start)
    batch = devices.shard(small.batch(images[:16], 8))
    state, _ = step(state, (), batch)
    with jax.transfer_guard_host_to_device("disallow"):
        state, logs = step(state, (), batch)
    assert np.isfinite(float(logs["loss"]))


def leaf_pairs(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


class TestMicrobatches:
    SHARED = (
        *SGD,
        "optim.momentum=0",
        "optim.clip_norm=0",
        "optim.learning_rate=1",
        "data.augment.flip=0.5",
        "loss.clip=0.2",
    )

    @pytest.mark.parametrize(
        "overrides",
        [
            [],
            pytest.param(
                ["model.depth=2", "optim.frozen_blocks=1", "loss.queue=7", "data.views=3"], marks=pytest.mark.slow
            ),
        ],
    )
    def test_the_gradients_are_those_of_the_whole_batch(self, overrides):
        results = {}
        for count, n in ((1, 1), (4, 1), (2, 2)):
            c = small.config(*self.SHARED, *overrides, f"train.microbatches={count}")
            images, body, start = small.first_step(c)
            batches = [small.batch(images[16 * i : 16 * (i + 1)], n, 16 * i) for i in range(2)]
            results[count, n] = small.run_steps(body, start, batches, n)
        want = results[1, 1]
        largest = max(float(np.abs(a - b).max()) for a, b in leaf_pairs(want[0][0].params, start.params))
        assert largest > 1e-2
        for run, got in results.items():
            for one, other in leaf_pairs(want[0], got[0]):  # the rate is 1: a step is the gradient
                np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * largest, err_msg=str(run))
            for one, other in leaf_pairs(want[1], got[1]):  # a second step amplifies rounding
                np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4 * largest, err_msg=str(run))

    @pytest.mark.slow
    def test_activations_take_less_memory(self):
        sizes = {}
        for n in (1, 8):
            c = small.config("model.width=64", "model.depth=3", "data.batch_size=256", f"train.microbatches={n}")
            images, body, start = small.first_step(c, 256)
            program = small.compiled(body, 1).lower(start, (), small.batch(images, 1)).compile()
            sizes[n] = program.memory_analysis().temp_size_in_bytes
        assert sizes[8] < 0.25 * sizes[1]

    def test_a_resnet_is_refused_unless_it_is_frozen(self):
        resnet = ("model.name=resnet18", "model.stem=cifar", "train.microbatches=2")
        with pytest.raises(configs.ConfigError, match="batch statistics of resnet18 would be those of a microbatch"):
            small.config(*resnet)
        small.config(*resnet, "optim.frozen_blocks=-1")
        c = small.config("train.microbatches=3")
        with pytest.raises(configs.ConfigError, match="microbatches 3 does not divide the 8 images of each device"):
            configs.check_run(c, num_devices=2, num_train=100, num_validation=0)


def test_the_queue_holds_the_newest_codes_of_all_devices():
    c = small.config("loss.queue=40", "loss.pairing=quantized", "data.batch_size=8", "optim.learning_rate=1e-6")
    images, body, start = small.first_step(c)
    states = {}
    for n in (1, 4):
        batches = [small.batch(images[8 * i : 8 * (i + 1)], n) for i in range(4)]
        states[n] = [state for state, _ in small.run_steps(body, start, batches, n)]
    for one, four in zip(states[1], states[4], strict=True):
        np.testing.assert_allclose(four.queue, one.queue, rtol=1e-4, atol=1e-5)
    before, after = states[1][1].queue, states[1][2].queue
    assert (before[32:] == 0).all() and (before[:32].sum(-1) > 0.99).all()
    np.testing.assert_array_equal(after[16:], before[:24])
    assert np.abs(after[:16] - before[:16]).max() > 1e-3
    with pytest.raises(configs.ConfigError, match="loss.queue 5 holds reconstructions"):
        small.config("loss.queue=5", "loss.pairing=float")


class TestNotFinite:
    def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(self):
        c = small.config("data.views=2", "optim.frozen_blocks=-1", "loss.queue=8", "optim.warmup_steps=0")
        _, body, start = small.first_step(c)
        good = np.random.RandomState(0).randn(16, 2, 64).astype("f4")
        bad = good.copy()
        bad[3, 1, 5] = np.inf
        batches = [small.batch(rows, 4) for rows in (good, bad, bad, good)]
        (first, _), (second, logs), (third, more), (fourth, after) = small.run_steps(body, start, batches, 4)
        for state in (second, third):
            changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), state, first)
            assert not any(jax.tree.leaves(changed._replace(step=False, opt_state=False)))
        assert (logs["skipped"], logs["skipped_in_a_row"]) == (1, 1) and not np.isfinite(logs["loss"])
        assert (more["skipped"], more["skipped_in_a_row"]) == (2, 2)
        assert (after["skipped"], after["skipped_in_a_row"]) == (2, 0) and int(fourth.step) == 4
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(fourth))
        changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), fourth.params, third.params)
        assert all(jax.tree.leaves(changed["projection"]))
        counts = [int(x) for x in jax.tree.leaves(fourth.opt_state.inner_state) if np.asarray(x).dtype.kind == "i"]
        assert set(counts) == {2}  # the optimizer has seen two steps

    def test_a_loss_that_is_not_finite_is_enough(self, monkeypatch):
        real = losses.contrastive_loss

        def infinite(*views, **options):
            loss, logs = real(*views, **options)
            return loss + jnp.inf, logs

        monkeypatch.setattr(losses, "contrastive_loss", infinite)
        images, body, start = small.first_step(small.config("optim.warmup_steps=0"))
        state, logs = small.run_steps(body, start, [small.batch(images[:16], 2)], 2)[0]
        assert logs["skipped"] == 1 and np.isfinite(logs["gradient_norm"])
        jax.tree.map(np.testing.assert_array_equal, state.params, jax.device_get(start.params))


def collectives(*overrides):
    """The kinds of communication between devices in the compiled step."""
    images, body, start = small.first_step(small.config("loss.clip=0.2", *overrides))
    step = devices.pmap_step(body)
    program = step.lower(start, (), small.batch(images[:16], 8)).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
    return sorted(re.findall(rf"= (?:\(.*?\)|\S+) ({kinds})(?:-start)?\(", program))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        pytest.param(["train.microbatches=2"], marks=pytest.mark.slow),
        pytest.param(["loss.pairing=quantized", "loss.debias=0.1"], marks=pytest.mark.slow),
    ],
)
def test_one_gather_its_transpose_and_one_reduction(overrides):
    assert collectives(*overrides) == ["all-gather", "all-reduce", "reduce-scatter"]


def test_a_queue_gathers_its_codes():
    assert collectives("loss.queue=8") == ["all-gather", "all-gather", "all-reduce", "reduce-scatter"]


@pytest.mark.slow
def test_a_ring_passes_columns_on():
    assert set(collectives("loss.gather=ring")) == {"all-reduce", "collective-permute"}


@pytest.mark.whole
def test_the_step_is_float32_where_jax_defaults_to_float64():
    c = small.shared(
        *SGD,
        "data.augment.crop=0.5",
        "data.augment.jitter=1",
        "data.augment.hue=0.1",
        "data.augment.blur=0.5",
        "loss.debias=0.1",
    )
    results = []
    for enabled in (False, True):
        with jax.enable_x64(enabled):
            images, body, start = small.first_step(c)
            state, logs = small.run_steps(body, start, [small.batch(images[:16], 2)], 2)[-1]
            assert {x.dtype for x in jax.tree.leaves(state)} == {np.dtype("f4"), np.dtype("i4"), np.dtype(bool)}
            assert {x.dtype for x in jax.tree.leaves(logs)} == {np.dtype("f4"), np.dtype("i4")}
            results.append((state, logs))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
