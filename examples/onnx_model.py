"""An ONNX image model as the embedder of tcq; needs `pip install onnxruntime` (or onnxruntime-gpu).

    export ONNX_MODEL=model.onnx
    tcq train --config=configs/folder.py:photos,embedder=examples/onnx_model.py:embed --workdir=runs/photos

The model takes float pixels (N, 3, S, S) or (N, S, S, 3), scaled to mean 0 and deviation 1 by ONNX_MEAN and ONNX_STD
(those of ImageNet unless set), or uint8 pixels as they are. ONNX_OUTPUT names the output; else the first is taken.
"""

import os
from functools import cache
from typing import Any

import numpy as np
import onnxruntime

MEAN, STD = "0.485,0.456,0.406", "0.229,0.224,0.225"  # of ImageNet, in [0, 1]


def embed(images: np.ndarray) -> np.ndarray:
    """Embeddings (N, F), float32, of uint8 images (N, S, S, 3); a sequence of tokens is averaged."""
    session = _session()
    given = session.get_inputs()[0]
    pixels: Any = images
    if given.type != "tensor(uint8)":
        mean, std = (np.array(os.environ.get(k, v).split(","), np.float32) for k, v in _SCALING.items())
        pixels = (images.astype(np.float32) / 255 - mean) / std
        pixels = pixels.astype(np.float16 if given.type == "tensor(float16)" else np.float32)
    if given.shape[1] == 3:
        pixels = pixels.transpose(0, 3, 1, 2)
    batches = np.split(pixels, len(pixels)) if given.shape[0] == 1 else [pixels]
    name = os.environ.get("ONNX_OUTPUT") or session.get_outputs()[0].name
    rows = np.concatenate([session.run([name], {given.name: batch})[0] for batch in batches])
    return (rows.mean(axis=1) if rows.ndim == 3 else rows.reshape(len(rows), -1)).astype(np.float32)


_SCALING = {"ONNX_MEAN": MEAN, "ONNX_STD": STD}


@cache
def _session() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(os.environ["ONNX_MODEL"], providers=onnxruntime.get_available_providers())
