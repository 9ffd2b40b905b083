"""An image model of transformers (CLIP, SigLIP, DINOv2, ViT ...) as the embedder of tcq; needs torch and transformers.

    export HF_MODEL=facebook/dinov2-small
    tcq train --config=configs/folder.py:photos,embedder=examples/hugging_face.py:embed --workdir=runs/photos

HF_MODEL is a name on the hub or a folder. Set --config.data.image_size if the model does not take 224 x 224 pixels.
"""

import os
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def embed(images: np.ndarray) -> np.ndarray:
    """Embeddings (N, F), float32, of uint8 images (N, S, S, 3): of the image tower, if there is a text tower too."""
    model, mean, std = _model()
    pixels = (torch.from_numpy(images).to(DEVICE) / 255 - mean) / std
    with torch.inference_mode():
        run = model.get_image_features if hasattr(model, "get_image_features") else model
        output = run(pixel_values=pixels.permute(0, 3, 1, 2))
    return _vectors(output).float().cpu().numpy()


def _vectors(output: Any) -> torch.Tensor:
    """One vector for each image: the pooled one, or the class token where a model has no pooling."""
    if isinstance(output, torch.Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


@cache
def _model() -> tuple[Any, torch.Tensor, torch.Tensor]:
    name = os.environ["HF_MODEL"]
    processor = AutoImageProcessor.from_pretrained(name)
    mean, std = (torch.tensor(v, device=DEVICE) for v in (processor.image_mean, processor.image_std))
    return AutoModel.from_pretrained(name).to(DEVICE).eval(), mean, std
