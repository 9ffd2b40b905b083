"""NUS-WIDE, images with the 21 most frequent concepts: 100 queries of each, mAP@5000.

    python -m tcq train --config=configs/nus_wide.py:bits=32,backbone=vit_b16,weights=/models/B_16.npz
    --workdir=runs/nus

The arguments are bits=16, 32, 64 ...; backbone=, a name such as vit_b16 or resnet50; weights=, a path
(docs/weights.md). `tcq prepare --dataset=nus_wide --files=...` prepares the dataset from its published files and your
images. Not run by us: we had neither the images nor weights, and this size needs a GPU or TPU.
"""

from ml_collections import ConfigDict

from tcq.config import base


def get_config(arg: str = "") -> ConfigDict:
    """Fine-tuning at 224 pixels; without weights, the named backbone from scratch."""
    c = base.get_config()
    base.fine_tune(c, arg)
    c.data.source = "tfds:nus_wide"
    c.data.protocol = "nus_wide_21"
    c.eval.every_steps = 500
    return c
