"""The optimizer: Optax update rules, the learning-rate schedule, and rates of model parts."""

import re
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from tcq import config as configs
from tcq.models import resnet, vit
from tcq.models.retriever import Params

NEVER = 2**31 - 2  # consecutive steps that are not finite before Optax applies one; the loop stops the run long before


def make(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Gradient clipping by norm, then AdamW, LARS or SGD, then the rates of the parts.

    Frozen parameters have no state. A gradient that is not finite changes nothing, and is counted.
    """
    o = config.optim
    rate = learning_rate(config, steps)
    if o.name == "adamw":
        rule = optax.adamw(rate, weight_decay=o.weight_decay, mask=_decay_mask)
    elif o.name == "lars":
        rule = optax.lars(rate, o.weight_decay, _decay_mask, trust_ratio_mask=_decay_mask, momentum=o.momentum)
    else:
        rule = optax.chain(optax.add_decayed_weights(o.weight_decay, _decay_mask), optax.sgd(rate, o.momentum))
    if o.clip_norm:
        rule = optax.chain(optax.clip_by_global_norm(o.clip_norm), rule)
    if not all(r == 1 for r in (o.backbone_rate, o.head_rate, o.codebooks_rate, o.layer_decay)):
        rule = optax.chain(rule, optax.stateless(lambda updates, _: _scale(updates, config)))
    if o.frozen_blocks:
        rule = optax.partition(
            {False: rule, True: optax.set_to_zero()},
            lambda params: jax.tree_util.tree_map_with_path(lambda path, _: is_frozen(path, config), params),
        )
    return optax.apply_if_finite(rule, max_consecutive_errors=NEVER)


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear from 0 during the warm-up, then cosine to 0 at the last step."""
    warmup = configs.warmup_steps(config, steps)
    return optax.warmup_cosine_decay_schedule(0.0, config.optim.learning_rate, warmup, steps)


def is_frozen(path: tuple[Any, ...], config: ConfigDict) -> bool:
    """Whether `optim.frozen_blocks` excludes the parameter at a tree path from training."""
    n = config.optim.frozen_blocks
    if path[0].key != "backbone" or not n:
        return False
    return n < 0 or _layer(path[1].key, config) <= n


def rate_of(path: tuple[Any, ...], config: ConfigDict) -> float:
    """The factor of the learning rate for the parameter at a tree path.

    In the backbone `optim.layer_decay` to the power of the number of layers above, counted as in BEiT (Bao et al.
    2022): the embedding, each block, and what follows the blocks.
    """
    o = config.optim
    if path[0].key != "backbone":
        return {"codebooks": o.codebooks_rate, "projection": o.head_rate}.get(path[0].key, 1.0)
    return o.backbone_rate * o.layer_decay ** (_depth(config) + 1 - _layer(path[1].key, config))


def _scale(updates: Params, config: ConfigDict) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, u: u * rate_of(path, config), updates)


def _layer(name: str, config: ConfigDict) -> int:
    """The layer of a backbone part: 0 below the blocks, 1 for the first, depth + 1 above them."""
    if config.model.name in resnet.NAMED:
        match = re.fullmatch(r"stage_(\d+)_block_(\d+)", name)
        return sum(resnet.NAMED[config.model.name].stages[: int(match[1])]) + int(match[2]) + 1 if match else 0
    if name.startswith("block_"):
        return int(name.removeprefix("block_")) + 1
    return 0 if name in ("embed", "stem", "positions", "cls", "registers") else _depth(config) + 1


def _depth(config: ConfigDict) -> int:
    """The number of blocks of the backbone."""
    m = config.model
    if m.name in resnet.NAMED:
        return sum(resnet.NAMED[m.name].stages)
    return vit.NAMED[m.name][0].depth if m.name else m.depth


def _decay_mask(params: Params) -> Any:
    """Which parameters have weight decay: only kernels.

    Biases, norms, positions, tokens and codewords have none.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
