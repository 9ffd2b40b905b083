"""CIFAR-10 under SPQ's protocol: the 10,000 test images are queries, the 50,000 training images the database.

    python -m tcq train --config=configs/cifar10.py:bits=32 --workdir=runs/cifar10

On two CPU cores this took 10.5 minutes and gave mAP@1000 0.281 at 32 bits on CIFAR-10 (JPEG) read from a folder (1,000
queries carved from the training images, 49,000 others as database; FAISS PQ on pixels 0.208).

The argument is bits=16, 32 or 64. TFDS has to have prepared the data once; the message says how.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "bits=32") -> ConfigDict:
    """A small ViT from scratch, for a CPU; a GPU or TPU affords more."""
    codebooks = {"bits=16": 4, "bits=32": 8, "bits=64": 16}
    if arg not in codebooks:
        raise ValueError(f"argument {arg!r} is unknown: use one of {', '.join(codebooks)}")
    c = base.get_config()

    c.data.source = "tfds:cifar10"
    c.data.protocol = "cifar10_spq"
    c.data.validation = 0.02
    c.data.image_size = 32

    c.model.update(width=128, depth=4, heads=4, patch=8, pooling="flat")
    c.quantizer.num_codebooks = codebooks[arg]
    c.quantizer.metric = "ip"
    c.quantizer.scale = 10.0

    c.loss.temperature = 0.3
    c.optim.learning_rate = 2e-3
    c.train.total_steps = 1050
    return c
