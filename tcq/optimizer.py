"""Optax update rules and the learning rate that a config asks for."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from tcq.models.retriever import Params


def make(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Gradient clipping by norm, then AdamW, LARS or SGD on a linear warm-up and a cosine to 0."""
    o = config.optim
    rate = learning_rate(config, steps)
    if o.name == "adamw":
        rule = optax.adamw(rate, weight_decay=o.weight_decay, mask=_decayed)
    elif o.name == "lars":
        rule = optax.lars(rate, o.weight_decay, _decayed, trust_ratio_mask=_decayed, momentum=o.momentum)
    else:
        rule = optax.chain(optax.add_decayed_weights(o.weight_decay, _decayed), optax.sgd(rate, o.momentum))
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), rule) if o.clip_norm else rule


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear from 0 over the warm-up, then cosine to 0 at the last step."""
    o = config.optim
    return optax.warmup_cosine_decay_schedule(0.0, o.learning_rate, o.warmup_steps, steps)


def _decayed(params: Params) -> Any:
    """Which parameters decay: kernels. Not biases, norms, positions, tokens and codewords."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
