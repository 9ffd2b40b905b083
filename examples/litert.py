"""A LiteRT (TensorFlow Lite) image model as the embedder of tcq; needs `pip install ai-edge-litert`.

    export LITERT_MODEL=mobilenet_v2_1.0_224_quant.tflite LITERT_TENSOR=MobilenetV2/Logits/AvgPool
    tcq train --config=configs/folder.py:photos,embedder=examples/litert.py:embed --workdir=runs/photos

LITERT_TENSOR names a tensor inside of the model, such as the pooled feature; without it, the output is taken.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

_thread = threading.local()  # an interpreter runs in one thread at a time


def embed(images: np.ndarray) -> np.ndarray:
    """Embeddings (N, F), float32, of uint8 images (N, S, S, 3)."""
    return np.stack(list(_pool().map(_embed_one, images)))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def _embed_one(image: np.ndarray) -> np.ndarray:
    interpreter, tensor = _interpreter()
    given = interpreter.get_input_details()[0]
    pixels = image if given["dtype"] == np.uint8 else image.astype(np.float32) / 127.5 - 1
    interpreter.set_tensor(given["index"], pixels[None].astype(given["dtype"]))
    interpreter.invoke()
    row = interpreter.get_tensor(tensor["index"]).ravel()
    scale, zero = tensor["quantization"]
    return ((row.astype(np.float32) - zero) * scale if scale else row).astype(np.float32)


def _interpreter() -> tuple[Any, dict[str, Any]]:
    if not hasattr(_thread, "interpreter"):
        interpreter = Interpreter(os.environ["LITERT_MODEL"], experimental_preserve_all_tensors=True, num_threads=1)
        interpreter.allocate_tensors()
        name = os.environ.get("LITERT_TENSOR")
        tensors = [t for t in interpreter.get_tensor_details() if t["name"] == name]
        if name and not tensors:
            raise KeyError(f"LITERT_TENSOR {name!r} is not a tensor of {os.environ['LITERT_MODEL']}")
        _thread.interpreter = interpreter, (tensors or interpreter.get_output_details())[0]
    return _thread.interpreter
