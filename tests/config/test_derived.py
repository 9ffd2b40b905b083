import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small
from tcq import config as configs
from tcq.train import optimizer, step


def counts(config, steps, queue=False):
    """The count at each step, traced as in a training step."""
    rule = configs.clip_rule(config, steps)
    filled = jax.jit(lambda i: step.queue_filled(config, steps, i))

    @jax.jit
    def at(i):
        return rule.count(i, queued=step.queue_filled(config, steps, i) if queue else 0)

    return [int(at(jnp.int32(i))) for i in range(steps)], [int(filled(jnp.int32(i))) for i in range(steps)]


def test_clip_is_a_count_or_a_floored_share():
    for clip, batch_size, want in ((64, 128, 64), (0.1, 128, 25), (0.5, 2, 1), (0.0, 128, 0), (0.29, 51, 29)):
        rule = configs.clip_rule(small.config(f"loss.clip={clip}", f"data.batch_size={batch_size}"), 10)
        assert rule.count() == rule.count(5) == want and rule.negatives == 2 * batch_size - 2


def test_clipping_is_off_then_grows_then_complete():
    c = small.config("loss.clip=8", "loss.clip_from=0.25", "loss.clip_full=0.75")
    assert counts(c, 16)[0] == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8]
    assert configs.clip_rule(c, 16).count() == 8
    constant = configs.clip_rule(small.config("loss.clip=8", "loss.clip_from=0", "loss.clip_full=0"), 16)
    assert constant.count(3) == 8 and isinstance(constant.count(jnp.int32(3)), int)


def test_in_the_scope_of_the_batch_the_mean_is_not_rounded():
    c = small.config(
        "loss.clip=0.1", "data.batch_size=8", "loss.clip_scope=batch", "loss.clip_from=0", "loss.clip_full=0"
    )
    rule = configs.clip_rule(c, 10)
    assert rule.count() == rule.count(5) == pytest.approx(1.4)
    assert rule.of_negatives(6, queue=0) == pytest.approx(0.6)
    c = small.config(
        "loss.clip=0.1", "data.batch_size=8", "loss.clip_scope=batch", "loss.clip_from=0", "loss.clip_full=0.5"
    )
    np.testing.assert_allclose(configs.clip_rule(c, 4).count(jnp.int32(0)), 0.7, rtol=1e-6)


def test_a_number_of_kinds_is_a_share():
    rule = configs.clip_rule(small.config("loss.clip=kinds=20", "data.batch_size=128"), 10)
    assert rule.count() == int(254 / 20)
    for kinds, batch_size, want in ((49, 50, 2), (98, 50, 1)):  # 1 / 49 * 98 is below 2 in floats
        queue = small.config(f"loss.clip=kinds={kinds}", f"data.batch_size={batch_size}", "loss.queue=98")
        assert configs.clip_rule(queue, 10).count() == want == configs.clip_rule(queue, 10).of_negatives(98, queue=98)
        assert int(jax.jit(configs.clip_rule(queue, 10).count)(9, queued=jnp.int32(98))) == 2 * want
    with pytest.raises(
        configs.ConfigError, match=r"kinds=1'? must be a count such as 25, a share such as 0.1, or kinds=N"
    ):
        small.config("loss.clip=kinds=1")


def test_a_cosine_ramp():
    c = small.config("loss.clip=9", "loss.clip_from=0.25", "loss.clip_full=0.75", "loss.clip_ramp=cosine")
    want = [0, 0, 0, 0] + [int(9 * (1 - np.cos(np.pi * i / 8)) / 2) for i in range(1, 8)] + [9] * 5
    assert counts(c, 16)[0] == want


def test_a_share_is_also_one_of_the_queue():
    queue = ("loss.queue=50", "loss.queue_from=0.125", "data.batch_size=8")
    c = small.config("loss.clip=0.5", "loss.clip_from=0", "loss.clip_full=0", *queue)
    clipped, filled = counts(c, 16, queue=True)
    assert filled[:6] == [0, 0, 32, 48, 50, 50]
    assert clipped[:6] == [7, 7, 23, 31, 32, 32]  # half of 14 + filled
    assert configs.clip_rule(c, 16).count(queued=50) == 32
    assert int(step.queue_filled(c, 16, jnp.int32(2**31 - 2))) == 50


def test_the_share_for_another_number_of_negatives():
    rule = configs.clip_rule(small.config("loss.clip=10", "data.batch_size=16"), 10)
    assert [rule.of_negatives(n, queue=0) for n in (30, 15, 2, 0)] == [10, 5, 0, 0]
    assert rule.of_negatives(30, queue=30) == 5  # of 60 in training


@pytest.mark.parametrize(
    ("warmup", "steps", "want"), [(3, 12, 3), (100, 50, 5), (0.25, 12, 3), (0.0, 12, 0), (0, 12, 0)]
)
def test_warmup_is_a_count_or_a_share_and_fits_short_runs(warmup, steps, want):
    c = small.config(f"optim.warmup_steps={warmup}", "optim.learning_rate=0.5")
    assert configs.warmup_steps(c, steps) == want
    rate = optimizer.learning_rate(c, steps)
    np.testing.assert_allclose(rate(want), 0.5, rtol=1e-6)
    np.testing.assert_allclose(rate(steps), 0, atol=1e-7)


def test_steps_from_epochs():
    c = configs.load("configs/digits.py", ["train.total_steps=0", "train.total_epochs=2.5"])
    assert configs.total_steps(c, 1197) == 24  # ceil(2.5 * 1197 / 128)
    assert configs.total_steps(configs.load("configs/digits.py", ["train.total_steps=50"]), 1197) == 50
