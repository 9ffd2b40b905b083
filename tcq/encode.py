"""A workdir becomes an encoder; images become features and codes, padded and masked, on all local devices."""

import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, UInt, UInt8
from ml_collections import ConfigDict

from tcq import augment, quantizer
from tcq import config as configs
from tcq.models import retriever, vit
from tcq.models import weights as pretrained
from tcq.runtime import devices as parallel
from tcq.runtime import storage as buckets
from tcq.runtime.log import say
from tcq.workdir import checkpoint


class Encoder(NamedTuple):
    """A trained model, ready to encode."""

    config: ConfigDict
    model: retriever.Retriever
    variables: retriever.Variables
    step: int

    @property
    def codebooks(self) -> Float[np.ndarray, "M K d"]:
        """As ranking and decoding use them: unit codewords for metric "ip"."""
        codebooks = np.asarray(self.variables["params"]["codebooks"], np.float32)
        return np.asarray(quantizer.unit_codewords(codebooks)) if self.model.metric == "ip" else codebooks


class Encoded(NamedTuple):
    """Features and codes of N images."""

    features: Float[np.ndarray, "N D"]
    codes: UInt[np.ndarray, "N M"]


def load(workdir: str | Path, *, which: str = "best") -> Encoder:
    """The encoder of a training run: `which` is "best" (by validation score), "latest" or a step.

    A checkpoint whose files are not what was written is passed over, loudly, for the next best; a step that was named is not.
    Raises CheckpointError or ConfigError if the workdir holds no run, or its checkpoint does not fit its config.
    """
    config = read_config(workdir)
    model = retriever.from_config(config)
    manager = checkpoint.open_manager(workdir)
    try:
        like = {"variables": retriever.shapes(model, config.data.image_size)}
        step, saved = checkpoint.restore_first_good(manager, checkpoint.in_order(manager, which), like)
    finally:
        manager.close()
    return Encoder(config, model, saved["variables"], step)


def read_config(workdir: str | Path) -> ConfigDict:
    """The config that a training run left in its workdir."""
    text = buckets.read(buckets.join(workdir, "config.json"))
    if text is None:
        raise checkpoint.CheckpointError(
            f"{str(workdir)!r} holds no config.json: is it the --workdir of a training run?"
        )
    return configs.from_json(text.decode())


def as_weights(workdir: str | Path) -> pretrained.Weights:
    """The backbone of a training run, as a start for another one. Raises as `load`."""
    encoder = load(workdir)
    c, family = encoder.config, pretrained.OWN
    backbone = {k: v["backbone"] for k, v in encoder.variables.items() if "backbone" in v}
    flat = traverse_util.flatten_dict(backbone, sep="/")
    patch = vit.NAMED[c.model.name][1] if c.model.name in vit.NAMED else c.model.patch
    return pretrained.Weights(Path(workdir), family, {"patch": patch}, flat, [])


def encode(encoder: Encoder, images: UInt8[np.ndarray, "N H W 3"]) -> Encoded:
    """Features and codes of un-augmented images, in batches of `eval.batch_size`. Raises ValueError on another size.

    Several processes share the work, and all get all of it.
    """
    q = encoder.config.quantizer
    empty = np.zeros((0, q.num_codebooks * q.codeword_dim), np.float32)
    return Encoded(*(_in_batches(encoder, images, both=True) or (empty, _no_codes(encoder))))


def codes(encoder: Encoder, images: UInt8[np.ndarray, "N H W 3"]) -> UInt[np.ndarray, "N M"]:
    """The codes alone: of many images, and over several processes, features are much more."""
    return (_in_batches(encoder, images, both=False) or (_no_codes(encoder),))[0]


def _in_batches(encoder: Encoder, images: np.ndarray, *, both: bool) -> tuple[np.ndarray, ...] | None:
    """Features and codes, or codes; None of nothing."""
    side = encoder.config.data.image_size
    if images.shape[1:] != (side, side, 3):
        raise ValueError(f"images {images.shape} do not fit the encoder: want (N, {side}, {side}, 3)")
    if not len(images):
        return None
    variables = parallel.replicate(encoder.variables)
    return parallel.map_in_batches(_mapped(encoder.model, both), variables, images, encoder.config.eval.batch_size)


def _no_codes(encoder: Encoder) -> np.ndarray:
    q = encoder.config.quantizer
    return np.zeros((0, q.num_codebooks), quantizer.code_dtype(q.num_codewords))


@lru_cache(maxsize=4)
def _mapped(model: retriever.Retriever, both: bool) -> Any:
    def body(variables: retriever.Variables, images: Array) -> tuple[Array, ...]:
        outputs = model.apply(variables, images.astype(jnp.float32) / 255)
        assert isinstance(outputs, retriever.Outputs)
        codes = quantizer.hard_assign(outputs.features, outputs.codebooks, metric=model.metric)
        return (outputs.features, codes) if both else (codes,)

    return parallel.pmap_rows(body)


def view_key(seed: int, index: Int[ArrayLike, ""], view: Int[ArrayLike, ""]) -> Key[Array, ""]:
    """What the `view`-th of the `data.views` views of an image is drawn from."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), view)


def embed_views(
    encoder: Encoder, images: UInt8[np.ndarray, "N H W 3"], indices: Int[np.ndarray, " T"]
) -> Float[np.ndarray, "T views F"]:
    """What the backbone makes of the `data.views` views of some of the images; progress is said every few seconds."""
    data, seed = encoder.config.data, encoder.config.train.seed
    run = _mapped_views(encoder.model, tuple(sorted(data.augment.items())), seed)
    variables = parallel.replicate(encoder.variables)
    block = 16 * encoder.config.eval.batch_size * jax.local_device_count()
    parts, start, last = [], time.monotonic(), time.monotonic()
    for first in range(0, len(indices), block):
        some = indices[first : first + block]
        pictures = images[some]
        views = [
            parallel.map_in_batches(
                run,
                variables,
                {"image": pictures, "index": some.astype(np.int32), "view": np.full(len(some), v, np.int32)},
                encoder.config.eval.batch_size,
            )
            for v in range(data.views)
        ]
        parts.append(np.stack(views, axis=1))
        if time.monotonic() - last > 5:
            last, done = time.monotonic(), first + len(some)
            rate = done * data.views / (last - start)
            say(f"embedding views: {done:,} of {len(indices):,} images, {rate:,.0f} views/s")
    return np.concatenate(parts)


@lru_cache(maxsize=4)
def _mapped_views(model: retriever.Retriever, strengths: tuple[tuple[str, float], ...], seed: int) -> Any:
    def body(variables: retriever.Variables, rows: dict[str, Array]) -> Array:
        def view(image: Array, index: Array, number: Array) -> Array:
            return augment.random_view(view_key(seed, index, number), image / 255, dict(strengths))

        views = jax.vmap(view)(rows["image"].astype(jnp.float32), rows["index"], rows["view"])
        return model.apply(variables, views, method="embed")  # type: ignore[return-value]

    return parallel.pmap_rows(body)
