"""Schedules, weight decay, rates of the parts, and parts that are not trained."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small
from tcq.config import checks
from tcq.runtime import devices
from tcq.train import optimizer


def named(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", checks.OPTIMIZERS)
def test_kernels_alone_decay(name):
    c = small.config(f"optim.name={name}", "optim.weight_decay=0.5", "optim.warmup_steps=0")
    _, _, start = small.first_step(small.config())
    rule = optimizer.make(c, 10)
    zero = jax.tree.map(jnp.zeros_like, start.params)
    updates, _ = jax.jit(rule.update)(zero, rule.init(start.params), start.params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert bool(jnp.any(update != 0)) == (path[-1].key == "kernel"), jax.tree_util.keystr(path)


def test_learning_rate_warms_up_and_falls_to_zero():
    rate = optimizer.learning_rate(small.config("optim.learning_rate=0.1"), 12)
    np.testing.assert_allclose([rate(0), rate(1), rate(2), rate(7), rate(12)], [0, 0.05, 0.1, 0.05, 0], atol=1e-7)


def test_gradients_are_clipped_by_norm():
    flags = (
        "optim.name=sgd",
        "optim.clip_norm=0.5",
        "optim.weight_decay=0",
        "optim.warmup_steps=0",
        "optim.momentum=0",
    )
    c = small.config(*flags)
    rule = optimizer.make(c, 10)
    params = {"kernel": jnp.zeros(4)}
    updates, _ = rule.update({"kernel": jnp.full(4, 100.0)}, rule.init(params), params)
    np.testing.assert_allclose(jnp.linalg.norm(updates["kernel"]), 0.5 * c.optim.learning_rate, rtol=1e-5)


class TestRates:
    WANT: ClassVar = {  # of a ViT of two blocks, with layer_decay 0.5 and the rates 0.1, 2 and 3
        "block_1": 0.1 * 0.5,
        "block_0": 0.1 * 0.25,
        "embed": 0.1 * 0.125,
        "positions": 0.1 * 0.125,
        "cls": 0.1 * 0.125,
        "['backbone']['norm']": 0.1,
        "projection": 2,
        "codebooks": 3,
    }

    @pytest.mark.parametrize("name", checks.OPTIMIZERS)
    def test_each_part_moves_at_its_own(self, name):
        rates = ["optim.layer_decay=0.5", "optim.backbone_rate=0.1", "optim.head_rate=2", "optim.codebooks_rate=3"]
        model = ["model.depth=2", "model.pooling=cls"]
        shared = [*model, f"optim.name={name}", "optim.warmup_steps=0", "optim.clip_norm=0"]
        _, _, start = small.first_step(small.config(*model))
        gradient = jax.tree.map(lambda p: jnp.ones_like(p) * 0.1, start.params)
        updates = []
        for overrides in ([], rates):
            rule = optimizer.make(small.config(*shared, *overrides), 10)
            updates.append(named(jax.jit(rule.update)(gradient, rule.init(start.params), start.params)[0]))
        for leaf, plain in updates[0].items():
            (want,) = [rate for part, rate in self.WANT.items() if part in leaf]
            np.testing.assert_allclose(updates[1][leaf], plain * want, rtol=1e-5, err_msg=leaf)
            assert float(jnp.abs(plain).max()) > 0

    def test_blocks_of_a_resnet_count_over_its_stages(self):
        c = small.config("model.name=resnet34", "model.stem=cifar", "optim.layer_decay=0.9")
        key = jax.tree_util.DictKey
        for name, above in {"stem": 17, "stage_0_block_0": 16, "stage_1_block_0": 13, "stage_3_block_2": 1}.items():
            rate = optimizer.rate_of((key("backbone"), key(name), key("kernel")), c)
            assert rate == pytest.approx(0.9**above), name


def one_step(config):
    """The parameters that a step changes, the state before and after, and the FLOPs of the step."""
    images, body, start = small.first_step(config)
    batch = small.batch(images[:16], 1)
    step = small.compiled(body, 1).lower(start, (), batch).compile()
    state, _ = jax.block_until_ready(step(start, (), batch))
    after = devices.fetch(state)
    old, new = named(start.params), named(after.params)
    cost = step.cost_analysis()
    flops = (cost[0] if isinstance(cost, list) else cost)["flops"]
    return {name for name in old if not np.array_equal(old[name], new[name])}, start, after, flops


class TestFrozen:
    @pytest.mark.whole
    def test_only_other_parts_move_and_have_state_and_a_backward_pass(self):
        shared = ("model.depth=3", "model.pooling=cls", "optim.learning_rate=0.1", "optim.warmup_steps=0")
        names, sizes, flops = {}, {}, {}
        for frozen in (0, 2, -1):
            names[frozen], start, _, flops[frozen] = one_step(small.config(*shared, f"optim.frozen_blocks={frozen}"))
            sizes[frozen] = sum(np.size(x) for x in jax.tree.leaves(start.opt_state))
        assert names[0] == set(named(start.params))
        last = {n for n in names[0] if "block_2" in n or "'norm'" in n}
        head = {n for n in names[0] if "backbone" not in n}
        assert names[-1] == head and names[2] == head | last
        assert sizes[-1] < sizes[2] < 0.5 * sizes[0]
        assert flops[-1] < flops[2] < 0.85 * flops[0]

    @pytest.mark.slow
    def test_a_frozen_resnet_keeps_its_statistics(self):
        c = small.config("model.name=resnet18", "model.stem=cifar", "optim.frozen_blocks=-1", "optim.warmup_steps=0")
        names, start, after, _ = one_step(c)
        jax.tree.map(np.testing.assert_array_equal, start.batch_stats, after.batch_stats)
        assert names and not any("backbone" in n for n in names)

    def test_too_many_blocks_are_refused(self):
        with pytest.raises(checks.ConfigError, match="frozen_blocks 3 is above the 1 blocks"):
            small.config("optim.frozen_blocks=3")
