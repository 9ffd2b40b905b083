"""MIRFLICKR-25K under the protocol of MeCoQ, mAP@5000.

There are 2,000 queries; 5,000 of the other images are for training.

    python -m tcq train --config=configs/flickr25k.py:bits=32,backbone=vit_b16,weights=/models/B_16.npz
    --workdir=runs/flickr

The arguments are bits=16, 32, 64 ...; backbone=, a name such as vit_b16 or resnet50; weights=, a path
(docs/weights.md). `tcq prepare --dataset=mirflickr25k --files=...` prepares the dataset from its published archives.
Not run by us: we had neither the archives nor weights, and this size needs a GPU or TPU.
"""

from ml_collections import ConfigDict

from tcq.config import base


def get_config(arg: str = "") -> ConfigDict:
    """Fine-tuning at 224 pixels; without weights, the named backbone from scratch."""
    c = base.get_config()
    base.fine_tune(c, arg)
    c.data.source = "tfds:mirflickr25k"
    c.data.protocol = "flickr25k_mecoq"
    c.eval.every_steps = 200
    c.checkpoint.every_steps = 200
    return c
