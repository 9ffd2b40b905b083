"""NUS-WIDE, images of the 21 most frequent concepts: 100 queries of each, mAP@5000.

    python -m tcq train --config=configs/nus_wide.py:bits=32,backbone=vit_b16,weights=/models/B_16.npz --workdir=runs/nus

The arguments are bits=16, 32, 64 ...; backbone=, a name such as vit_b16 or resnet50; weights=, a path (docs/weights.md).
`tcq prepare --dataset=nus_wide --files=...` makes the dataset out of its published files and your images. Not run by us: the
images and weights were not at hand; a GPU or TPU is needed at this size.
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

    c.data.source = "tfds:nus_wide"
    c.data.protocol = "nus_wide_21"
    c.data.batch_size = 256

    c.quantizer.metric = "ip"
    c.quantizer.scale = 10.0
    c.loss.temperature = 0.3
    c.train.total_epochs = 50.0
    c.eval.every_steps = 500
    return c
