"""One step of training: the state, what a step does with it on each device, and the state before the first."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int32
from ml_collections import ConfigDict

from tcq import augment, encode, losses, quantizer
from tcq import config as configs
from tcq import optimizer as optimizers
from tcq.journal import say
from tcq.models import pretrained, retriever
from tcq.parallel import AXIS

Batch = dict[str, Array]
Logs = dict[str, Array]


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: Int32[Array, ""]
    params: retriever.Params
    batch_stats: retriever.Params  # of a ResNet; else empty
    opt_state: Any


def step_body(
    model: retriever.Retriever, optimizer: optax.GradientTransformation, config: ConfigDict, steps: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Logs]]:
    """The training step of one device, to be mapped over `AXIS`; what it returns is the same on all of them.

    A batch holds "image", uint8 (b, H, W, 3), and "index", int32 (b,), as `loader.batches` gives them; or, for a frozen
    backbone whose views have been embedded, "image" is float32 (b, views, F).

    Views are a function of (seed, step, place in the global batch), so they do not depend on the number of devices. With
    `data.views` an image has that many views, each a function of (seed, index, view), and a step draws two of them.
    """
    c = config.loss
    clip_at = clip_schedule(config, steps)
    strengths = dict(config.data.augment.items())
    variety = config.data.views

    def new_views(key: Array, image: Array, index: Array) -> tuple[Array, Array]:
        first, second = (augment.random_view(k, image / 255, strengths) for k in jax.random.split(key))
        return first, second

    def some_views(key: Array, image: Array, index: Array) -> tuple[Array, Array]:
        first, second = (
            augment.random_view(encode.view_key(config.train.seed, index, v), image / 255, strengths)
            for v in jax.random.choice(key, variety, (2,), replace=False)
        )
        return first, second

    def embedded_views(key: Array, embedded: Array, index: Array) -> tuple[Array, Array]:
        first, second = jax.random.choice(key, variety, (2,), replace=False)
        return embedded[first], embedded[second]

    def body(state: TrainState, batch: Batch) -> tuple[TrainState, Logs]:
        step_key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        device = jax.lax.axis_index(AXIS)
        b = len(batch["index"])
        keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(device * b + jnp.arange(b))
        embedded = batch["image"].ndim == 3
        view_pair = embedded_views if embedded else some_views if variety else new_views
        pairs = jax.vmap(view_pair)(keys, batch["image"].astype(jnp.float32), batch["index"])
        dropout_key = jax.random.fold_in(jax.random.fold_in(step_key, config.data.batch_size), device)

        def loss_fn(params: retriever.Params) -> tuple[Array, tuple[Logs, Any]]:
            params = jax.tree_util.tree_map_with_path(
                lambda path, p: jax.lax.stop_gradient(p) if optimizers.frozen(path, config) else p, params
            )
            run = partial(model.apply, {"params": params, "batch_stats": state.batch_stats}, jnp.concatenate(pairs))
            moved: Any = {}
            out: Any
            if embedded:
                out = run(method="head")
            else:
                out, moved = run(train=True, rngs={"dropout": dropout_key}, mutable=["batch_stats"])
            loss, logs = losses.contrastive_loss(
                *jnp.split(out.features, 2),
                *jnp.split(out.reconstructions, 2),
                pairing=c.pairing,
                temperature=c.temperature,
                clip=clip_at(state.step),
                axis_name=AXIS,
            )
            if c.entropy_weight:
                loss += c.entropy_weight * losses.assignment_entropy(out.weights)
            if c.diversity_weight:
                loss += c.diversity_weight * losses.codeword_diversity(out.codebooks)
            codes = quantizer.hard_assign(out.features, out.codebooks, metric=model.metric)
            usage = quantizer.codeword_usage(codes, num_codewords=model.num_codewords, axis_name=AXIS)
            logs |= {"loss": loss, "codeword_usage": usage.mean(), "codeword_usage_min": usage.min()}
            return loss, (logs, moved.get("batch_stats", state.batch_stats))

        grads, (logs, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
        grads = jax.lax.pmean(grads, AXIS)
        logs = jax.lax.pmean(logs, AXIS)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        logs |= {"gradient_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, batch_stats, opt_state), logs

    return body


def clip_schedule(config: ConfigDict, steps: int) -> Callable[[Array], int | Array]:
    """How many negatives are clipped at a step (counted from 0): all of `loss.clip`, or fewer before `loss.clip_full`."""
    c, count = config.loss, configs.clip_count(config.loss.clip, config.data.batch_size)
    first, full = c.clip_from * steps, c.clip_full * steps
    if not count or not full:
        return lambda step: count
    return lambda step: jnp.floor(count * jnp.clip((step - first + 1) / max(full - first, 1), 0, 1)).astype(jnp.int32)


def initial_state(config: ConfigDict, model: retriever.Retriever, optimizer: Any, images: np.ndarray) -> TrainState:
    """The state before the first step; `images` are some training images (see `retriever.init`)."""
    key = jax.random.fold_in(jax.random.key(config.train.seed), 2**31 - 1)  # no step has this number
    weights = backbone_from_weights(config, model) if config.model.weights else None
    variables = retriever.init(key, model, images, codewords=config.quantizer.init, backbone=weights)
    params = variables["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, variables.get("batch_stats", {}), optimizer.init(params))


def state_like(config: ConfigDict, model: retriever.Retriever, optimizer: Any) -> TrainState:
    """Shapes and dtypes of the state; nothing is computed."""
    variables = retriever.shapes(model, config.data.image_size)
    params = variables["params"]
    state = jax.eval_shape(optimizer.init, params)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, variables.get("batch_stats", {}), state)  # type: ignore[arg-type]


def backbone_from_weights(config: ConfigDict, model: retriever.Retriever) -> retriever.Variables:
    """The variables that `model.weights` gives the backbone. Raises WeightsError where they do not fit."""
    path, side = Path(config.model.weights), config.data.image_size
    weights = encode.as_weights(path) if pretrained.is_workdir(path) else pretrained.read(path)
    say(f"weights: {weights.family.name}, {weights.path}")
    return pretrained.variables(weights, retriever.shapes(model.backbone, side), image_size=side)
