"""One training step: two views of each image, embedding, loss, and update of the state.

Letters: b images on this device, B in the global batch, F width of the backbone's output, D of the features, M
codebooks, K codewords, V views.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32, Key
from ml_collections import ConfigDict

from tcq import augment, encode, losses, quantizer
from tcq import config as configs
from tcq.models import retriever
from tcq.runtime.devices import AXIS
from tcq.train import optimizer as optimizers

INIT_KEY = 2**31 - 1  # folded into the key of the initial weights; no step has this number

Batch = dict[str, Array]
Logs = dict[str, Array]


class TrainState(NamedTuple):
    """Everything that changes from step to step."""

    step: Int32[Array, ""]
    params: retriever.Params
    batch_stats: retriever.Params  # of a ResNet; else empty
    opt_state: Any
    queue: Any  # soft codes of earlier batches, (Q, M, K), the newest first; empty without `loss.queue`


class Trainer(NamedTuple):
    """What the step needs beside state and batch."""

    model: retriever.Retriever
    optimizer: optax.GradientTransformation
    config: ConfigDict
    steps: int  # of the whole run


class Rows(NamedTuple):
    """The images of a batch on this device."""

    image: Array  # uint8 (b, H, W, 3), or float32 (b, V, F): views that a frozen backbone has embedded
    image_index: Int32[Array, " b"]  # among all images
    place: Int32[Array, " b"]  # in the global batch


class Embedded(NamedTuple):
    """The backbone's output for two views of each image, and its vector-Jacobian product."""

    views: Float[Array, "2 b F"]
    pull_back: Callable[[Array], retriever.Params]  # a gradient of the views to one of the parameters
    batch_stats: Any


def step_body(
    model: retriever.Retriever, optimizer: optax.GradientTransformation, config: ConfigDict, steps: int
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Logs]]:
    """`train_step` of one device as body(state, data, batch), to be mapped over `AXIS`."""
    return partial(train_step, Trainer(model, optimizer, config, steps))


def train_step(trainer: Trainer, state: TrainState, data: Any, batch: Batch) -> tuple[TrainState, Logs]:
    """The next state and logs, which are the same on all devices.

    Args:
      trainer: model, optimizer and config.
      state: the same on all devices.
      data: all training images, the same on all devices; or () if the batch has its images.
      batch: "index" as `loader.batches` yields it, with "image", or "row" where `data` has the images. It may have
        "stop", a number of this device; its mean is logged, so that all processes learn of a stop request in the same
        step.

    The step has two collectives and the transpose of the first: columns are gathered, and everything that is averaged
    over the devices is reduced together (a ResNet's statistics, a queue and a ring have more). A loss or gradient
    that is not finite changes only the number of the step, and is counted in the logs "skipped" and
    "skipped_in_a_row".
    """
    rows, step_key = _rows(trainer, state, data, batch)
    embedded = embed(trainer, state, rows, step_key)
    compute = jax.grad(partial(loss, trainer, state), (0, 1), has_aux=True)
    (by_params, by_views), (logs, share, soft_codes) = compute(state.params, embedded.views)
    grads = jax.tree.map(jnp.add, by_params, embedded.pull_back(by_views))
    logs |= {"stop": batch.get("stop", jnp.zeros((), jnp.float32))}
    grads, logs, share = jax.lax.pmean((grads, logs, share), AXIS)
    usage = quantizer.codeword_usage(share)
    logs |= {"codeword_usage": usage.mean(), "codeword_usage_min": usage.min()}
    return update(trainer, state, grads, logs, embedded.batch_stats, soft_codes)


def _rows(trainer: Trainer, state: TrainState, data: Any, batch: Batch) -> tuple[Rows, Key[Array, ""]]:
    """This device's images with places in the global batch, and the random key of this step."""
    image = data[batch["row"]] if len(data) else batch["image"]
    b = len(batch["index"])
    place = jax.lax.axis_index(AXIS) * b + jnp.arange(b, dtype=jnp.int32)
    step_key = jax.random.fold_in(jax.random.key(trainer.config.train.seed), state.step)
    return Rows(image, batch["index"], place), step_key


def views(config: ConfigDict, rows: Rows, step_key: Key[Array, ""]) -> tuple[Array, Array]:
    """Two views of each image, (b, H, W, 3) each in [0, 1], or two of its embedded views.

    Embedded views are (b, F) each. A view is a function of (seed, step, place in the global batch), so it does not
    depend on the number of devices. With `data.views` an image has that many views, each a function of (seed, index,
    number), of which a step draws two.
    """
    strengths = dict(config.data.augment.items())
    num_views = config.data.views

    def pair(key: Array, image: Array, index: Array) -> tuple[Array, Array]:
        if image.ndim == 2:
            if len(image) == 1:
                return image[0], image[0]
            first, second = jax.random.choice(key, len(image), (2,), replace=False)
            return image[first], image[second]
        if num_views:
            numbers = jax.random.choice(key, num_views, (2,), replace=False)
            keys = [encode.view_key(config.train.seed, index, number) for number in numbers]
        else:
            keys = list(jax.random.split(key))
        first, second = (augment.random_view(k, image / 255, strengths) for k in keys)
        return first, second

    keys = _place_keys(rows, step_key)
    return jax.vmap(pair)(keys, rows.image.astype(jnp.float32), rows.image_index)


def _place_keys(rows: Rows, step_key: Key[Array, ""]) -> Key[Array, " b"]:
    return jax.vmap(lambda place: jax.random.fold_in(step_key, place))(rows.place)


def embed(trainer: Trainer, state: TrainState, rows: Rows, step_key: Key[Array, ""]) -> Embedded:
    """Both views of all images through the backbone.

    `train.microbatches` parts of the batch go through it one after the other.
    """
    config = trainer.config
    key = jax.random.fold_in(step_key, config.data.batch_size)  # no place in the batch has this number
    key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
    run = partial(_embed, trainer, state.batch_stats, step_key)
    if rows.image.ndim == 3 or config.train.microbatches == 1:
        output, pull_back, batch_stats = jax.vjp(lambda p: run(p, rows, key), state.params, has_aux=True)
        return Embedded(output, lambda by_views: pull_back(by_views)[0], batch_stats)
    return _embed_in_parts(run, state.params, rows, key, config.train.microbatches)


def _embed(
    trainer: Trainer, batch_stats: Any, step_key: Array, params: retriever.Params, rows: Rows, key: Array
) -> tuple[Float[Array, "2 b F"], Any]:
    """Both views of some images through the backbone, and its new batch statistics.

    The key is for dropout.
    """
    pairs = views(trainer.config, rows, step_key)
    if retriever.takes_embeddings(trainer.model):
        if rows.image.shape[1] == 1:
            known, strengths = params["backbone"], dict(trainer.config.data.augment)
            pairs = augment.noisy_views(pairs[0], known["mean"], known["std"], _place_keys(rows, step_key), strengths)
        backbone = {"params": _stop_frozen_gradients(params, trainer.config)}
        rows_of_pairs: Any = trainer.model.apply(backbone, jnp.concatenate(pairs), method="embed")
        return rows_of_pairs.reshape(2, -1, rows_of_pairs.shape[-1]), batch_stats
    if rows.image.ndim == 3:
        return jnp.stack(pairs), batch_stats
    variables = {"params": _stop_frozen_gradients(params, trainer.config), "batch_stats": batch_stats}
    run = partial(trainer.model.apply, variables, jnp.concatenate(pairs), train=True, method="embed")
    output: Any
    output, changed = run(rngs={"dropout": key}, mutable=["batch_stats"])
    return output.reshape(2, -1, output.shape[-1]), changed.get("batch_stats", batch_stats)


def _embed_in_parts(
    run: Callable[[retriever.Params, Rows, Array], tuple[Array, Any]],
    params: retriever.Params,
    rows: Rows,
    key: Array,
    count: int,
) -> Embedded:
    """Gradient caching: the activations of one part at a time are in memory.

    See GradCache (Gao et al. 2021). The activations are recomputed, with the same views, when the gradient comes back;
    the loss in between is over all images.
    """
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), rows)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
    outputs, batch_stats = jax.lax.map(lambda part: run(params, *part), (parts, keys))  # (count, 2, b / count, F)
    width = outputs.shape[-1]

    def pull_back(by_views: Array) -> retriever.Params:
        by_parts = by_views.reshape(2, count, -1, width).swapaxes(0, 1)

        def add(total: retriever.Params, part: tuple[Rows, Array, Array]) -> tuple[retriever.Params, None]:
            rows, key, by_part = part
            _, pull, _ = jax.vjp(lambda p: run(p, rows, key), params, has_aux=True)
            return jax.tree.map(jnp.add, total, pull(by_part)[0]), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (parts, keys, by_parts))
        return total

    output = outputs.swapaxes(0, 1).reshape(2, -1, width)
    return Embedded(output, pull_back, jax.tree.map(lambda x: x[-1], batch_stats))


def loss(
    trainer: Trainer, state: TrainState, params: retriever.Params, embedded: Float[Array, "2 b F"]
) -> tuple[Array, tuple[Logs, Array, Array]]:
    """This device's part of the loss over the global batch.

    With it come logs, shares of codewords, and soft codes (2, b, M, K).
    """
    config, model = trainer.config, trainer.model
    c, b = config.loss, embedded.shape[1]
    out: Any = model.apply(
        {"params": _stop_frozen_gradients(params, config)}, embedded.reshape(2 * b, -1), method="head"
    )
    queue: losses.Queue | None = None
    queued: Any = 0
    if c.queue:
        queued = queue_filled(config, trainer.steps, state.step)
        queue = losses.Queue(quantizer.reconstruct(state.queue, out.codebooks), queued)
    value, logs = losses.contrastive_loss(
        *jnp.split(out.features, 2),
        *jnp.split(out.reconstructions, 2),
        pairing=c.pairing,
        temperature=c.temperature,
        clip=configs.clip_rule(config, trainer.steps).count(state.step, queued=queued),
        clip_scope=c.clip_scope,
        debias=c.debias,
        queue=queue,
        block_size=c.block_size or None,
        gather=c.gather,
        axis_name=AXIS,
        average=False,
    )
    if c.entropy_weight:
        value += c.entropy_weight * losses.assignment_entropy(out.weights)
    if c.diversity_weight:
        value += c.diversity_weight * losses.codeword_diversity(out.codebooks)
    codes = quantizer.hard_assign(out.features, out.codebooks, metric=model.metric)
    share = quantizer.codeword_share(codes, num_codewords=model.num_codewords)
    return value, (logs | {"loss": value}, share, out.weights.reshape(2, b, *out.weights.shape[1:]))


def update(
    trainer: Trainer, state: TrainState, grads: retriever.Params, logs: Logs, batch_stats: Any, soft_codes: Array
) -> tuple[TrainState, Logs]:
    """The next state; only its step number changes if the loss or a gradient is not finite."""
    logs |= {"gradient_norm": optax.tree.norm(grads)}
    # NaN gradients, which a loss that is not finite gets here, make the optimizer skip the step.
    grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(logs["loss"]), g, jnp.nan), grads)
    updates, opt_state = trainer.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    logs |= {"skipped": opt_state.total_notfinite, "skipped_in_a_row": opt_state.notfinite_count}
    queue = _enqueue(state.queue, soft_codes) if trainer.config.loss.queue else state.queue
    batch_stats, queue = jax.tree.map(
        lambda new, old: jnp.where(opt_state.last_finite, new, old),
        (batch_stats, queue),
        (state.batch_stats, state.queue),
    )
    return TrainState(state.step + 1, params, batch_stats, opt_state, queue), logs


def _stop_frozen_gradients(params: retriever.Params, config: ConfigDict) -> retriever.Params:
    """The parameters, with no gradient for frozen ones."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: jax.lax.stop_gradient(p) if optimizers.is_frozen(path, config) else p, params
    )


def _enqueue(queue: Float[Array, "Q M K"], soft_codes: Float[Array, "2 b M K"]) -> Float[Array, "Q M K"]:
    """The queue with the soft codes of this batch from all devices, the newest first."""
    gathered = jax.lax.all_gather(jax.lax.stop_gradient(soft_codes), AXIS, axis=1, tiled=True)
    return jnp.concatenate([gathered[1], gathered[0], queue])[: len(queue)]


def queue_filled(config: ConfigDict, steps: int, step: Int32[Array, ""]) -> Int32[Array, ""]:
    """The number of queue entries that are negatives at a step.

    There are none before `loss.queue_from`, then all valid ones.
    """
    c, both_views = config.loss, 2 * config.data.batch_size
    full_after = -(-c.queue // both_views)
    valid = jnp.minimum(jnp.minimum(step, full_after) * both_views, c.queue)
    return jnp.where(step.astype(jnp.float32) < c.queue_from * steps, 0, valid)


def initial_state(
    config: ConfigDict, model: retriever.Retriever, optimizer: Any, images: np.ndarray, views: np.ndarray | None = None
) -> TrainState:
    """The state before the first step; for `images` and `views` see `retriever.init`."""
    key = jax.random.fold_in(jax.random.key(config.train.seed), INIT_KEY)
    weights = encode.backbone_from_weights(config, model) if config.model.weights else None
    q = config.quantizer
    variables = retriever.init(
        key, model, images, codewords=q.init, backbone=weights, views=views, whitening=q.whitening
    )
    params = variables["params"]
    queue: Any = jnp.zeros(_queue_shape(config), jnp.float32) if config.loss.queue else {}
    return TrainState(jnp.zeros((), jnp.int32), params, variables.get("batch_stats", {}), optimizer.init(params), queue)


def state_template(config: ConfigDict, model: retriever.Retriever, optimizer: Any) -> TrainState:
    """Shapes and dtypes of the state, without computing it."""
    variables = retriever.shapes(model, config.data.image_size)
    params = variables["params"]
    queue: Any = jax.ShapeDtypeStruct(_queue_shape(config), jnp.float32) if config.loss.queue else {}
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(step, params, variables.get("batch_stats", {}), jax.eval_shape(optimizer.init, params), queue)  # type: ignore[arg-type]


def _queue_shape(config: ConfigDict) -> tuple[int, int, int]:
    return config.loss.queue, config.quantizer.num_codebooks, config.quantizer.num_codewords
