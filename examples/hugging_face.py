"""An image model of transformers (CLIP, SigLIP, DINOv2, ViT ...) as the embedder of tcq; needs torch and transformers.

    export HF_MODEL=facebook/dinov2-small
    tcq train --config=configs/folder.py:photos,embedder=examples/hugging_face.py:embed --workdir=runs/photos

HF_MODEL is a name on the hub or a folder. Set --config.data.image_size if the model does not take 224 x 224 pixels.
"""

import os
from functools import cache
from typing import Any

import jax
import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModel

# With a process for each GPU (launch/local.py), each takes its own.
DEVICE = f"cuda:{jax.process_index() % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def embed(images: np.ndarray) -> np.ndarray:
    """Embeddings (N, F), float32, of uint8 images (N, S, S, 3): of the image tower, if there is a text tower too."""
    model, mean, std = _model()
    pixels = ((torch.from_numpy(images).to(DEVICE) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        if hasattr(model, "get_image_features"):
            features = model.get_image_features(pixel_values=pixels)
            rows = features if isinstance(features, torch.Tensor) else features.pooler_output
        else:
            rows = _pooled(model, model(pixel_values=pixels))
    return rows.float().cpu().numpy()


def _pooled(model: Any, output: Any) -> torch.Tensor:
    """The pooled vector, or the class token: a pooling layer with weights is random where a checkpoint lacks them."""
    pooler = getattr(model, "pooler", None)
    learned = pooler is not None and any(True for _ in pooler.parameters())
    if learned or getattr(output, "pooler_output", None) is None:
        return output.last_hidden_state[:, 0]
    return output.pooler_output.flatten(1)


@cache
def _model() -> tuple[Any, torch.Tensor, torch.Tensor]:
    name = os.environ["HF_MODEL"]
    processor = AutoImageProcessor.from_pretrained(name)
    mean, std = (torch.tensor(v, device=DEVICE) for v in (processor.image_mean, processor.image_std))
    return AutoModel.from_pretrained(name).to(DEVICE).eval(), mean, std
