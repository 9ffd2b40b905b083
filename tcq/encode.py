"""A trained model as an encoder: images to features and codes.

It runs on all devices of all processes.
"""

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, UInt
from ml_collections import ConfigDict

from tcq import augment, quantizer
from tcq import workdir as workdirs
from tcq.data import known
from tcq.data.rows import take
from tcq.models import embedder, retriever, vit
from tcq.models import weights as published
from tcq.runtime import devices, log, signals
from tcq.workdir import checkpoint

EMBEDDED = 64  # images that `model.embedder` gets at a time
VIEW_BATCHES = 16  # batches of images whose views are embedded before the next ones are read

logger = logging.getLogger(__name__)


class Encoder(NamedTuple):
    """A trained model."""

    config: ConfigDict
    model: retriever.Retriever
    variables: retriever.Variables
    step: int

    @property
    def codebooks(self) -> Float[np.ndarray, "M K d"]:
        """The codebooks for ranking and decoding, with unit codewords for metric "ip"."""
        codebooks = np.asarray(self.variables["params"]["codebooks"], np.float32)
        return np.asarray(quantizer.unit_codewords(codebooks)) if self.model.metric == "ip" else codebooks


class Encoded(NamedTuple):
    """Features and codes of N images."""

    features: Float[np.ndarray, "N D"]
    codes: UInt[np.ndarray, "N M"]


def load(workdir: str | Path, *, which: str = "best") -> Encoder:
    """The encoder of a training run at a checkpoint.

    `which` is "best" (by validation score), "latest" or a step. With "best" and "latest" the next checkpoint is used,
    with a warning, if one is corrupted.
    Raises WorkdirError, CheckpointError or ConfigError if the workdir holds no run, or its checkpoint does not fit.
    """
    config = workdirs.read_config(workdir)
    model = retriever.from_config(config)
    manager = checkpoint.open_manager(workdir)
    try:
        template = {"variables": retriever.shapes(model, config.data.image_size)}
        steps = checkpoint.candidates(manager, which)
        step, saved = checkpoint.restore_first_intact(manager, steps, template)
    finally:
        manager.close()
    return Encoder(config, model, devices.place(saved["variables"]), step)


def as_weights(workdir: str | Path) -> published.Weights:
    """The backbone of a training run, to initialize another run. Raises as `load`."""
    encoder = load(workdir)
    c = encoder.config
    backbone = {k: v["backbone"] for k, v in encoder.variables.items() if "backbone" in v}
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, backbone), sep="/")
    patch = vit.NAMED[c.model.name][1] if c.model.name in vit.NAMED else c.model.patch
    return published.Weights(Path(workdir), published.OWN, {"patch": patch}, flat, [])


def backbone_from_weights(config: ConfigDict, model: retriever.Retriever) -> retriever.Variables:
    """The backbone's variables from `model.weights`. Raises WeightsError if they do not fit."""
    path, side = Path(config.model.weights), config.data.image_size
    weights = as_weights(path) if published.is_workdir(path) else published.read(path)
    logger.info(f"weights: {weights.family.name}, {weights.path}")
    return published.variables(weights, retriever.shapes(model.backbone, side), image_size=side)


def encode(encoder: Encoder, images: Any) -> Encoded:
    """Features and codes of images, without augmentation.

    A device takes `eval.batch_size` images at a time. Images are uint8 (N, H, W, 3). A model that was trained on
    embeddings takes these, (N, F), or images if it has `model.embedder`.

    The processes of a run share the work, and each gets all results. Raises ValueError for another image size.
    """
    q = encoder.config.quantizer
    results = _in_batches(encoder, images, with_features=True)
    empty = np.zeros((0, q.num_codebooks * q.codeword_dim), np.float32), _no_codes(encoder)
    return Encoded(*(results or empty))


def codes(encoder: Encoder, images: Any) -> UInt[np.ndarray, "N M"]:
    """Returns only the codes of images, as `encode` does; features take much more memory."""
    return (_in_batches(encoder, images, with_features=False) or (_no_codes(encoder),))[0]


def _in_batches(encoder: Encoder, images: Any, *, with_features: bool) -> tuple[np.ndarray, ...] | None:
    """Codes, with features if `with_features`; None without images."""
    m, side = encoder.config.model, encoder.config.data.image_size
    takes_embeddings = retriever.takes_embeddings(encoder.model)
    of_images = images.shape[1:] == (side, side, 3) and not (takes_embeddings and not m.embedder)
    if not of_images and not (takes_embeddings and images.shape[1:] == (m.width,)):
        allowed = f"embeddings (N, {m.width})" if takes_embeddings else f"(N, {side}, {side}, 3)"
        raise ValueError(f"images {images.shape} do not fit the encoder: must be {allowed}")
    if not len(images):
        return None
    if takes_embeddings and of_images:
        images = Embedded(encoder, images)
    run = _compiled_encoder(encoder.model, with_features)
    return devices.map_in_batches(run, devices.place(encoder.variables), images, encoder.config.eval.batch_size)


class Embedded:
    """Embeddings (N, F) of images by `model.embedder`, which are computed where they are read."""

    def __init__(self, encoder: Encoder, images: Any, earlier: known.Known | None = None) -> None:
        """Takes the images, and where the embeddings of some of them are."""
        self._encoder, self._images, self._earlier = encoder, images, earlier
        self.shape, self.ndim, self.dtype = (len(images), encoder.config.model.width), 2, np.dtype(np.float32)
        self._progress = log.Progress(logger, "embedding images", -(-len(images) // jax.process_count()))
        self._done = 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Float[np.ndarray, "n F"]:
        """The embeddings of a slice of the images.

        Raises EmbedderError if the function is not that of the training.
        """
        images = np.arange(len(self))[rows]
        out = np.empty((len(images), self.shape[1]), np.float32)
        missing = np.ones(len(images), bool) if self._earlier is None else self._earlier.numbers[images] < 0
        if self._earlier is not None and not missing.all():
            out[~missing] = known.items(self._earlier, images[~missing])
        places = np.flatnonzero(missing)
        for first in range(0, len(places), EMBEDDED):
            some = places[first : first + EMBEDDED]
            out[some] = self._embed(images[some])
        self._done += len(images)
        self._progress.update(self._done)
        return out

    def _embed(self, images: np.ndarray) -> np.ndarray:
        m = self._encoder.config.model
        _require_embedder(m.embedder, self._encoder.config.data.image_size, tuple(m.embedder_output))
        signals.poll()
        return embedder.run(m.embedder, np.asarray(take(self._images, images)))


_require_embedder = lru_cache(maxsize=4)(embedder.require_same)


def _no_codes(encoder: Encoder) -> np.ndarray:
    q = encoder.config.quantizer
    return np.zeros((0, q.num_codebooks), quantizer.code_dtype(q.num_codewords))


@lru_cache(maxsize=4)
def _compiled_encoder(model: retriever.Retriever, with_features: bool) -> Any:
    def body(variables: retriever.Variables, images: Array) -> tuple[Array, ...]:
        outputs = model.apply(variables, retriever.scaled(images))
        assert isinstance(outputs, retriever.Outputs)
        codes = quantizer.hard_assign(outputs.features, outputs.codebooks, metric=model.metric)
        return (outputs.features, codes) if with_features else (codes,)

    return devices.pmap_rows(body)


def view_key(seed: int, index: Int[ArrayLike, ""], view: Int[ArrayLike, ""]) -> Key[Array, ""]:
    """The random key of one of the `data.views` views of an image."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), view)


def embed_views(encoder: Encoder, images: Any, indices: Int[np.ndarray, " T"]) -> Float[np.ndarray, "T views F"]:
    """The backbone's output for all `data.views` views of the images at `indices`, float32."""
    data, seed, batch_size = encoder.config.data, encoder.config.train.seed, encoder.config.eval.batch_size
    run = _compiled_views(encoder.model, tuple(sorted(data.augment.items())), seed)
    variables = devices.place(encoder.variables)
    block = VIEW_BATCHES * batch_size * jax.local_device_count()
    progress = log.Progress(logger, f"embedding {data.views} views each", len(indices))
    parts = []
    for first in range(0, len(indices), block):
        chunk = indices[first : first + block]
        rows = {"image": images[chunk], "index": chunk.astype(np.int32)}
        views = [
            devices.map_in_batches(run, variables, rows | {"view": np.full(len(chunk), v, np.int32)}, batch_size)
            for v in range(data.views)
        ]
        parts.append(np.stack(views, axis=1))
        progress.update(first + len(chunk))
    return np.concatenate(parts)


@lru_cache(maxsize=4)
def _compiled_views(model: retriever.Retriever, strengths: tuple[tuple[str, float], ...], seed: int) -> Any:
    def body(variables: retriever.Variables, rows: dict[str, Array]) -> Array:
        def view(image: Array, index: Array, number: Array) -> Array:
            return augment.random_view(view_key(seed, index, number), image / 255, dict(strengths))

        views = jax.vmap(view)(rows["image"].astype(jnp.float32), rows["index"], rows["view"])
        return model.apply(variables, views, method="embed")  # type: ignore[return-value]

    return devices.pmap_rows(body)
