"""A workdir becomes an encoder; images become features and codes, padded and masked, on all local devices."""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt, UInt8
from ml_collections import ConfigDict

from tcq import checkpoint, parallel, quantizer
from tcq import config as configs
from tcq.models import retriever


class Encoder(NamedTuple):
    """A trained model, ready to encode."""

    config: ConfigDict
    model: retriever.Retriever
    params: retriever.Params
    step: int

    @property
    def codebooks(self) -> Float[np.ndarray, "M K d"]:
        """As ranking and decoding use them: unit codewords for metric "ip"."""
        codebooks = np.asarray(self.params["codebooks"], np.float32)
        return np.asarray(quantizer.unit_codewords(codebooks)) if self.model.metric == "ip" else codebooks


class Encoded(NamedTuple):
    """Features and codes of N images."""

    features: Float[np.ndarray, "N D"]
    codes: UInt[np.ndarray, "N M"]


def load(workdir: str | Path, *, which: str = "best") -> Encoder:
    """The encoder of a training run: `which` is "best" (by validation score), "latest" or a step.

    Raises CheckpointError or ConfigError if the workdir holds no run, or its checkpoint does not fit its config.
    """
    config = read_config(workdir)
    model = retriever.from_config(config)
    manager = checkpoint.open_manager(workdir)
    try:
        step = checkpoint.find_step(manager, which)
        like = {"params": params_like(config, model)}
        saved = checkpoint.restore(manager, step, like)
    finally:
        manager.close()
    return Encoder(config, model, saved["params"], step)


def read_config(workdir: str | Path) -> ConfigDict:
    """The config that a training run left in its workdir."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise checkpoint.CheckpointError(
            f"{str(workdir)!r} holds no config.json: is it the --workdir of a training run?"
        )
    return configs.from_json(path.read_text())


def params_like(config: ConfigDict, model: retriever.Retriever) -> retriever.Params:
    """Shapes and dtypes of the model's parameters; nothing is computed."""
    side = config.data.image_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def encode(encoder: Encoder, images: UInt8[np.ndarray, "N H W 3"]) -> Encoded:
    """Features and codes of un-augmented images, in batches of `eval.batch_size`. Raises ValueError on another size."""
    side = encoder.config.data.image_size
    if images.shape[1:] != (side, side, 3):
        raise ValueError(f"images {images.shape} do not fit the encoder: want (N, {side}, {side}, 3)")
    if not len(images):
        q = encoder.config.quantizer
        dtype = quantizer.code_dtype(q.num_codewords)
        return Encoded(
            np.zeros((0, q.num_codebooks * q.codeword_dim), np.float32), np.zeros((0, q.num_codebooks), dtype)
        )
    params = parallel.replicate(encoder.params)
    return Encoded(*parallel.map_in_batches(_mapped(encoder.model), params, images, encoder.config.eval.batch_size))


@lru_cache(maxsize=4)
def _mapped(model: retriever.Retriever) -> Any:
    def body(params: retriever.Params, images: Array) -> tuple[Array, Array]:
        outputs = model.apply({"params": params}, images.astype(jnp.float32) / 255)
        assert isinstance(outputs, retriever.Outputs)
        codes = quantizer.hard_assign(outputs.features, outputs.codebooks, metric=model.metric)
        return outputs.features, codes

    return parallel.pmap_rows(body)
