"""CIFAR-10 under SPQ's protocol.

The 10,000 test images are queries, the 50,000 training images the database.

    python -m tcq train --config=configs/cifar10.py:bits=32 --workdir=runs/cifar10
    python -m tcq train --config=configs/cifar10.py:bits=32,weights=/models/dinov2-small --workdir=runs/cifar10-s14

The arguments are bits=16, 32, 64 ...; backbone=, a name such as vit_b16 or resnet18; weights=, a path
(docs/weights.md). Without the last two the model is a small ViT on 32 pixels. On two CPU cores that took 10.5 minutes
and gave mAP@1000 0.281 at 32 bits on CIFAR-10 (JPEG) read from a folder (1,000 queries carved from the training images,
49,000 others as database; FAISS PQ on pixels 0.208; one seed). 3,200 steps of batch 256 with
model.stem=conv took about an hour and gave 0.327 (docs/studies.md).

The dataset has to be prepared once: `tcq doctor --config=configs/cifar10.py` says how.
"""

from ml_collections import ConfigDict

from tcq.config import base


def get_config(arg: str = "") -> ConfigDict:
    """A small ViT from scratch, or another backbone.

    A ResNet from scratch has the CIFAR stem and 32 pixels.
    """
    a = base.arguments(arg, bits="32", backbone="", weights="")
    c = base.get_config()
    base.set_bits(c, a["bits"])

    c.data.source = "tfds:cifar10"
    c.data.protocol = "cifar10_spq"
    c.data.validation = 0.02

    c.quantizer.metric = "ip"
    c.quantizer.scale = 10.0
    c.loss.temperature = 0.3
    if a["backbone"] or a["weights"]:
        small = a["backbone"].startswith("resnet") and not a["weights"]
        base.set_backbone(c, a["backbone"], a["weights"], image_size=32 if small else 224)
        c.model.stem = "cifar"
        c.train.total_epochs = 20.0
        c.eval.every_steps = 1000
        return c
    c.model.update(width=128, depth=4, heads=4, patch=8, pooling="flat")
    c.optim.learning_rate = 2e-3
    c.optim.warmup_steps = 100 / 1050
    c.train.total_steps = 1050
    return c
