"""Your own images: any folder of pictures, labelled by sub-folders or not.

    python -m tcq train --config=configs/folder.py:/path/to/images --workdir=runs/mine

Any other key as usual: --config.data.image_size=64 --config.train.total_steps=5000 ...
"""

from ml_collections import ConfigDict

from configs import base


def get_config(path: str = "") -> ConfigDict:
    """A small ViT from scratch on images of 32 x 32 pixels; without labels there are no queries and no scores."""
    c = base.get_config()
    c.data.source = f"folder:{path}" if path else ""
    c.model.update(width=128, depth=4, heads=4, patch=8, pooling="flat")
    c.quantizer.metric = "ip"
    c.quantizer.scale = 10.0
    c.loss.temperature = 0.3
    c.optim.learning_rate = 2e-3
    c.train.total_steps = 1000
    c.eval.every_steps = 500
    return c
