"""One step of training: the state, what a step does with it on each device, and the state before the first."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32
from ml_collections import ConfigDict

from tcq import augment, encode, losses, quantizer
from tcq import config as configs
from tcq.models import retriever
from tcq.models import weights as pretrained
from tcq.runtime.devices import AXIS
from tcq.runtime.log import say
from tcq.train import optimizer as optimizers

Batch = dict[str, Array]
Logs = dict[str, Array]


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: Int32[Array, ""]
    params: retriever.Params
    batch_stats: retriever.Params  # of a ResNet; else empty
    opt_state: Any
    queue: Any  # soft codes of earlier batches, (Q, M, K), the newest first; empty without `loss.queue`


def step_body(
    model: retriever.Retriever, optimizer: optax.GradientTransformation, config: ConfigDict, steps: int
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Logs]]:
    """The training step of one device, to be mapped over `AXIS`; what it returns is the same on all of them.

    Data are all training images, and a batch has their places, "row", int32 (b,); or data is () and the batch has the images,
    "image", uint8 (b, H, W, 3), or for a frozen backbone whose views have been embedded float32 (b, views, F). It has "index",
    int32 (b,), as `loader.batches` gives it, and may have "stop", a number of this device, whose mean comes back with the
    logs: so all processes learn in the same step that one of them was asked to stop.

    Where the loss or a gradient is not finite nothing changes but the step; the logs count such steps ("skipped",
    "skipped_in_a_row"). Two collectives, and the transpose of the first: columns are gathered, and everything else that
    devices have to agree on is averaged in one reduction (a ResNet's statistics, a queue and a ring have more).

    With `train.microbatches` the backbone sees so many pieces of the batch one after the other; the loss is over all of it.

    Views are a function of (seed, step, place in the global batch), so they do not depend on the number of devices. With
    `data.views` an image has that many views, each a function of (seed, index, view), and a step draws two of them.
    """
    c = config.loss
    clip_at, filled = clip_schedule(config, steps), queue_filled(config, steps)
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

    def body(state: TrainState, data: Any, batch: Batch) -> tuple[TrainState, Logs]:
        if len(data):  # the images lie here
            batch = batch | {"image": data[batch["row"]]}
        step_key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        device = jax.lax.axis_index(AXIS)
        b = len(batch["index"])
        dropout_key = jax.random.fold_in(jax.random.fold_in(step_key, config.data.batch_size), device)
        embedded_before = batch["image"].ndim == 3
        rows = {"image": batch["image"], "index": batch["index"], "place": device * b + jnp.arange(b)}

        def embed(params: retriever.Params, rows: Batch, key: Array) -> tuple[Array, Any]:
            """Both views of some images as the backbone sees them, (2, b, F), and its new batch statistics."""
            keys = jax.vmap(lambda place: jax.random.fold_in(step_key, place))(rows["place"])
            view_pair = embedded_views if embedded_before else some_views if variety else new_views
            pairs = jax.vmap(view_pair)(keys, rows["image"].astype(jnp.float32), rows["index"])
            if embedded_before:
                return jnp.stack(pairs), state.batch_stats
            variables = {"params": _trained(params, config), "batch_stats": state.batch_stats}
            run = partial(model.apply, variables, jnp.concatenate(pairs), train=True, method="embed")
            out: Any
            out, moved = run(rngs={"dropout": key}, mutable=["batch_stats"])
            return out.reshape(2, -1, out.shape[-1]), moved.get("batch_stats", state.batch_stats)

        def loss_of(params: retriever.Params, embedded: Array) -> tuple[Array, tuple[Logs, Array, Array]]:
            """This device's part of the loss over the global batch, logs, shares of the codewords, soft codes (2, b, M, K)."""
            variables = {"params": _trained(params, config)}
            out: Any = model.apply(variables, embedded.reshape(2 * b, -1), method="head")
            queue = None
            if c.queue:
                queue = losses.Queue(quantizer.reconstruct(state.queue, out.codebooks), filled(state.step))
            loss, logs = losses.contrastive_loss(
                *jnp.split(out.features, 2),
                *jnp.split(out.reconstructions, 2),
                pairing=c.pairing,
                temperature=c.temperature,
                clip=clip_at(state.step),
                debias=c.debias,
                queue=queue,
                block_size=c.block_size or None,
                gather=c.gather,
                axis_name=AXIS,
                average=False,
            )
            if c.entropy_weight:
                loss += c.entropy_weight * losses.assignment_entropy(out.weights)
            if c.diversity_weight:
                loss += c.diversity_weight * losses.codeword_diversity(out.codebooks)
            codes = quantizer.hard_assign(out.features, out.codebooks, metric=model.metric)
            share = quantizer.codeword_share(codes, num_codewords=model.num_codewords)
            return loss, (logs | {"loss": loss}, share, out.weights.reshape(2, b, *out.weights.shape[1:]))

        pieces = 1 if embedded_before else config.train.microbatches
        embedded, pull_back, batch_stats = _in_pieces(embed, state.params, rows, dropout_key, pieces)
        (by_params, by_embedded), (logs, share, codes) = jax.grad(loss_of, (0, 1), has_aux=True)(state.params, embedded)
        grads = jax.tree.map(jnp.add, by_params, pull_back(by_embedded))
        logs |= {"stop": batch.get("stop", jnp.zeros(()))}
        grads, logs, share = jax.lax.pmean((grads, logs, share), AXIS)  # all that is reduced, at once
        usage = quantizer.codeword_usage(share)
        logs |= {"codeword_usage": usage.mean(), "codeword_usage_min": usage.min()}
        logs |= {"gradient_norm": optax.tree.norm(grads)}
        # A loss that is not finite leaves no gradient that is: the optimizer then changes nothing.
        grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(logs["loss"]), g, jnp.nan), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        logs |= {"skipped": opt_state.total_notfinite, "skipped_in_a_row": opt_state.notfinite_count}
        queue = _remember(state.queue, codes) if c.queue else state.queue
        batch_stats, queue = jax.tree.map(
            lambda new, old: jnp.where(opt_state.last_finite, new, old),
            (batch_stats, queue),
            (state.batch_stats, state.queue),
        )
        return TrainState(state.step + 1, params, batch_stats, opt_state, queue), logs

    return body


def _trained(params: retriever.Params, config: ConfigDict) -> retriever.Params:
    """Frozen parameters as constants."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: jax.lax.stop_gradient(p) if optimizers.frozen(path, config) else p, params
    )


def _in_pieces(
    embed: Callable[[retriever.Params, Batch, Array], tuple[Array, Any]],
    params: retriever.Params,
    rows: Batch,
    key: Array,
    pieces: int,
) -> tuple[Array, Callable[[Array], retriever.Params], Any]:
    """What `embed` makes of all rows, (2, b, F), how a gradient by that becomes one by the parameters, and the rest of it.

    In several pieces the activations of one piece at a time are in memory: they are not kept but computed once more when
    the gradient comes back (GradCache, Gao et al. 2021), with the same views. The loss in between sees all rows.
    """
    if pieces == 1:
        embedded, pull_back, rest = jax.vjp(lambda p: embed(p, rows, key), params, has_aux=True)
        return embedded, lambda by_embedded: pull_back(by_embedded)[0], rest

    each = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), rows)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(pieces))
    parts, rests = jax.lax.map(lambda piece: embed(params, *piece), (each, keys))  # (pieces, 2, b / pieces, F)
    width = parts.shape[-1]

    def pull_back_all(by_embedded: Array) -> retriever.Params:
        by_parts = by_embedded.reshape(2, pieces, -1, width).swapaxes(0, 1)

        def add(total: retriever.Params, piece: tuple[Batch, Array, Array]) -> tuple[retriever.Params, None]:
            rows, key, by_part = piece
            _, pull_back, _ = jax.vjp(lambda p: embed(p, rows, key), params, has_aux=True)
            return jax.tree.map(jnp.add, total, pull_back(by_part)[0]), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (each, keys, by_parts))
        return total

    embedded = parts.swapaxes(0, 1).reshape(2, -1, width)
    return embedded, pull_back_all, jax.tree.map(lambda x: x[-1], rests)


def _remember(queue: Float[Array, "Q M K"], codes: Float[Array, "2 b M K"]) -> Float[Array, "Q M K"]:
    """The queue with the soft codes of this batch, of all devices: the newest first."""
    everyone = jax.lax.all_gather(jax.lax.stop_gradient(codes), AXIS, axis=1, tiled=True)
    return jnp.concatenate([everyone[1], everyone[0], queue])[: len(queue)]


def clip_schedule(config: ConfigDict, steps: int) -> Callable[[Array], int | Array]:
    """How many negatives are clipped at a step (counted from 0): all of `loss.clip`, or fewer before `loss.clip_full`.

    A fraction is one of the negatives that are there: those of the global batch, and what the queue holds.
    """
    c, batch_size = config.loss, config.data.batch_size
    first, full = c.clip_from * steps, c.clip_full * steps
    count = configs.clip_count(c.clip, batch_size)
    filled = queue_filled(config, steps)
    grows = c.queue and isinstance(c.clip, float)
    if not c.clip or not (full or grows):
        return lambda step: count

    def at(step: Array) -> Array:
        share = jnp.clip((step - first + 1) / max(full - first, 1), 0, 1) if full else jnp.ones(())
        if c.clip_ramp == "cosine":
            share = (1 - jnp.cos(jnp.pi * share)) / 2
        all_of_it = jnp.floor(c.clip * (2 * batch_size - 2 + filled(step))) if grows else count
        return jnp.floor(all_of_it * share).astype(jnp.int32)

    return at


def queue_filled(config: ConfigDict, steps: int) -> Callable[[Array], Array]:
    """How many entries of the queue are negatives at a step: none before `loss.queue_from`, else those of earlier steps."""
    c, both_views = config.loss, 2 * config.data.batch_size
    full_after = -(-c.queue // both_views)
    return lambda step: jnp.where(
        step < c.queue_from * steps, 0, jnp.minimum(jnp.minimum(step, full_after) * both_views, c.queue)
    )


def initial_state(config: ConfigDict, model: retriever.Retriever, optimizer: Any, images: np.ndarray) -> TrainState:
    """The state before the first step; `images` are some training images (see `retriever.init`)."""
    key = jax.random.fold_in(jax.random.key(config.train.seed), 2**31 - 1)  # no step has this number
    weights = backbone_from_weights(config, model) if config.model.weights else None
    variables = retriever.init(key, model, images, codewords=config.quantizer.init, backbone=weights)
    params = variables["params"]
    queue: Any = jnp.zeros(_queue_shape(config), jnp.float32) if config.loss.queue else {}
    return TrainState(jnp.zeros((), jnp.int32), params, variables.get("batch_stats", {}), optimizer.init(params), queue)


def state_like(config: ConfigDict, model: retriever.Retriever, optimizer: Any) -> TrainState:
    """Shapes and dtypes of the state; nothing is computed."""
    variables = retriever.shapes(model, config.data.image_size)
    params = variables["params"]
    queue: Any = jax.ShapeDtypeStruct(_queue_shape(config), jnp.float32) if config.loss.queue else {}
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(step, params, variables.get("batch_stats", {}), jax.eval_shape(optimizer.init, params), queue)  # type: ignore[arg-type]


def _queue_shape(config: ConfigDict) -> tuple[int, int, int]:
    return config.loss.queue, config.quantizer.num_codebooks, config.quantizer.num_codewords


def backbone_from_weights(config: ConfigDict, model: retriever.Retriever) -> retriever.Variables:
    """The variables that `model.weights` gives the backbone. Raises WeightsError where they do not fit."""
    path, side = Path(config.model.weights), config.data.image_size
    weights = encode.as_weights(path) if pretrained.is_workdir(path) else pretrained.read(path)
    say(f"weights: {weights.family.name}, {weights.path}")
    return pretrained.variables(weights, retriever.shapes(model.backbone, side), image_size=side)
