"""Any image model of timm as the embedder of tcq; needs torch and timm.

    export TIMM_MODEL=vit_small_patch14_dinov2.lvd142m
    tcq train --config=configs/folder.py:photos,embedder=examples/timm_model.py:embed --workdir=runs/photos \\
        --config.data.image_size=518

TIMM_MODEL is a name that timm.list_models() shows. TIMM_WEIGHTS may name a file of weights; else timm downloads them.
"""

import os
from functools import cache

import jax
import numpy as np
import timm
import torch

# With a process for each GPU (launch/local.py), each takes its own.
DEVICE = f"cuda:{jax.process_index() % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def embed(images: np.ndarray) -> np.ndarray:
    """Pooled features (N, F), float32, of uint8 images (N, S, S, 3)."""
    model, mean, std = _model()
    pixels = (torch.from_numpy(images).to(DEVICE) / 255 - mean) / std
    with torch.inference_mode():
        return model(pixels.permute(0, 3, 1, 2)).float().cpu().numpy()


@cache
def _model() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    file = os.environ.get("TIMM_WEIGHTS")
    overlay = {"file": file} if file else None
    model = timm.create_model(os.environ["TIMM_MODEL"], pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    expected = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(expected[key], device=DEVICE) for key in ("mean", "std"))
    return model.to(DEVICE).eval(), mean, std
