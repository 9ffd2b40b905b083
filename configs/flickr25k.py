"""MIRFLICKR-25K under MeCoQ's protocol: 2,000 query images, 5,000 of the others for training, mAP@5000.

    python -m tcq train --config=configs/flickr25k.py:bits=32,backbone=vit_b16,weights=/models/B_16.npz --workdir=runs/flickr

The arguments are bits=16, 32, 64 ...; backbone=, a name such as vit_b16 or resnet50; weights=, a path (docs/weights.md).
`tcq prepare --dataset=mirflickr25k --files=...` makes the dataset out of its published archives. Not run by us: the archives
and weights were not at hand; a GPU or TPU is needed at this size.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    """Fine-tuning at 224 pixels; without weights, the named backbone from scratch."""
    a = base.arguments(arg, bits="32", backbone="", weights="")
    c = base.get_config()
    base.set_bits(c, a["bits"])
    base.set_backbone(c, a["backbone"] or ("" if a["weights"] else "vit_s16"), a["weights"], image_size=224)
    c.model.dtype = "bfloat16"

    c.data.source = "tfds:mirflickr25k"
    c.data.protocol = "flickr25k_mecoq"
    c.data.batch_size = 256

    c.quantizer.metric = "ip"
    c.quantizer.scale = 10.0
    c.loss.temperature = 0.3
    c.train.total_epochs = 50.0
    c.eval.every_steps = 200
    c.checkpoint.every_steps = 200
    return c
