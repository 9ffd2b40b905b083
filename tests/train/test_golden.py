"""Loss and gradients of the first three steps of configs/digits.py, as numbers that were recorded once."""

import itertools

import jax
import numpy as np

import small
from tcq import config as configs

RATE = 0.1
OVERRIDES = (
    "data.batch_size=32",
    "loss.temperature=0.5",
    "loss.clip=0.1",
    "optim.name=sgd",
    "optim.momentum=0",
    "optim.clip_norm=0",
    "optim.warmup_steps=0",
    "optim.weight_decay=0",
    f"optim.learning_rate={RATE}",
)
WHY = """The training step computes other numbers than it did: {name}.
These may change only if the initial weights, the views, the quantizer, the loss, the clipping or the keys of the random
numbers are meant to change: then say so in CHANGELOG.md, because runs of earlier versions cannot be resumed to the same
bits, and record the new numbers, which this test prints. Moving code, another version of JAX, another number of
devices and other options of XLA change them by less than the tolerance."""
LOSS = [4.179099, 4.058664, 4.123117]
GRADIENT_NORMS = {
    "backbone": [1.667800, 2.032629, 2.116388],
    "codebooks": [0.166449, 0.148846, 0.158505],
    "projection": [2.566344, 2.384532, 2.498281],
}


def gradient_norm(before, after):
    """Of plain SGD, whose steps are the gradient times the rate."""
    steps = jax.tree.map(lambda a, b: np.sum(np.square((a - b) / RATE)), before, after)
    return np.sqrt(sum(jax.tree.leaves(steps)))


def test_three_steps_are_those_recorded():
    c = configs.load("configs/digits.py", OVERRIDES)
    images, body, start = small.first_step(c, 96)
    batches = [small.batch(images[32 * i : 32 * (i + 1)], 2, 32 * i) for i in range(3)]
    results = small.run_steps(body, start, batches, 2)
    loss = [float(logs["loss"]) for _, logs in results]
    params = [start.params, *(state.params for state, _ in results)]
    pairs = list(itertools.pairwise(params))
    norms = {
        part: [float(gradient_norm(before[part], after[part])) for before, after in pairs] for part in start.params
    }
    print(loss, norms)
    np.testing.assert_allclose(loss, LOSS, rtol=2e-5, err_msg=WHY.format(name="the loss"))
    assert norms.keys() == GRADIENT_NORMS.keys()
    for part, norm in norms.items():
        np.testing.assert_allclose(
            norm, GRADIENT_NORMS[part], rtol=2e-5, err_msg=WHY.format(name=f"gradients of {part}")
        )
