"""The encoder of an index as a program for other runtimes.

The program is StableHLO by jax.export, or ONNX by jax2onnx. It takes images uint8 (b, S, S, 3), resized as
`config.data` says, or embeddings float32 (b, F), and returns features float32 (b, D) and codes (b, M). Each file is
read again, run on random images, and compared.
"""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tcq import encode, quantizer
from tcq.models import resnet, retriever

PLATFORMS = ("cpu", "cuda", "tpu")
IMAGES = 64  # that are compared
TOLERANCE = 1e-4  # of features, relative to their largest
TIES = 0.02  # share of codewords that may differ: rounding decides between codewords that are equally close

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class ProgramError(ValueError):
    """The encoder cannot be exported; the message says why."""


def function(encoder: encode.Encoder) -> Callable[[Any], tuple[Any, Any]]:
    """The encoder as a function of images alone; its variables are constants."""
    variables = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), dict(encoder.variables))  # on one device

    def run(images: Any) -> tuple[Any, Any]:
        outputs = encoder.model.apply(variables, retriever.scaled(images))
        assert isinstance(outputs, retriever.Outputs)
        return outputs.features, quantizer.hard_assign(outputs.features, outputs.codebooks, metric=encoder.model.metric)

    return run


def about(encoder: encode.Encoder) -> dict[str, Any]:
    """What the program takes, as JSON."""
    data = encoder.config.data
    if retriever.takes_embeddings(encoder.model):
        return {"input": "float32", "width": encoder.config.model.width, "embedder": encoder.config.model.embedder}
    return {
        "input": "uint8",
        "image_size": data.image_size,
        "resize": data.resize,
        "interpolation": data.interpolation,
        "crop_share": data.crop_share,
    }


def _input(encoder: encode.Encoder) -> tuple[tuple[int, ...], Any]:
    """Shape of one image or embedding, and its dtype."""
    if retriever.takes_embeddings(encoder.model):
        return (encoder.config.model.width,), np.float32
    side = encoder.config.data.image_size
    return (side, side, 3), np.uint8


def write_stablehlo(encoder: encode.Encoder, path: Path) -> None:
    """Writes what `jax.export.deserialize` reads, for any number of images.

    It is one file for CPU, CUDA and TPU. Raises ProgramError if the program differs from the encoder.
    """
    from jax import export

    shape, dtype = _input(encoder)
    symbolic = export.symbolic_shape(", ".join(["b", *map(str, shape)]))
    with jax.numpy_dtype_promotion("standard"):
        exported = export.export(jax.jit(function(encoder)), platforms=PLATFORMS)(
            jax.ShapeDtypeStruct(symbolic, jnp.dtype(dtype))
        )
    path.write_bytes(exported.serialize())
    program = export.deserialize(bytearray(path.read_bytes()))
    check(encoder, lambda images: tuple(map(np.asarray, program.call(images))))  # type: ignore[arg-type, return-value]


def write_onnx(encoder: encode.Encoder, path: Path) -> None:
    """Writes an ONNX file for any number of images, with the program's inputs and outputs.

    Raises ProgramError if jax2onnx or onnxruntime are missing, for a ResNet, which jax2onnx cannot write, and if the
    program differs from the encoder.
    """
    if isinstance(getattr(encoder.model, "backbone", None), resnet.ResNet):
        raise ProgramError(f"model {encoder.config.model.name}: jax2onnx cannot write ResNets: use --format=stablehlo")
    try:
        import onnx
        import onnxruntime
        from jax2onnx import to_onnx
    except ImportError as error:
        raise ProgramError(f"ONNX needs {error.name}: pip install jax2onnx onnxruntime") from None
    shape, dtype = _input(encoder)
    lenient = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with lenient[0], lenient[1], contextlib.redirect_stdout(io.StringIO()):
        model = to_onnx(function(encoder), [jax.ShapeDtypeStruct(("B", *shape), dtype)], model_name="encoder")
    if model.ByteSize() >= 2**31:
        raise ProgramError("an ONNX file of 2 GiB or more cannot be written: use --format=stablehlo")
    onnx.save(model, str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    check(encoder, lambda images: tuple(session.run(None, {name: images})))


def check(encoder: encode.Encoder, run: Run) -> None:
    """Compares a program with the encoder on random images. Raises ProgramError."""
    shape, dtype = _input(encoder)
    random = np.random.RandomState(0)
    values = random.randn(IMAGES, *shape) if dtype == np.float32 else random.randint(0, 256, (IMAGES, *shape))
    images = values.astype(dtype)
    features, codes = encode.encode(encoder, images)
    other, other_codes = run(images)
    difference = float(np.abs(other - features).max() / max(np.abs(features).max(), 1e-12))
    different = float((other_codes != codes).mean())
    if not difference <= TOLERANCE or different > TIES:
        raise ProgramError(
            f"the program differs from the encoder: features by up to {difference:.1e} of their largest, and "
            f"{different:.1%} of the codewords; please report it"
        )
