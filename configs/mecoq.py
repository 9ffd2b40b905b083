"""MeCoQ (Wang et al. 2022) on CIFAR-10, as its paper describes it.

It has quantized pairing, the debiased loss, and a queue.

    python -m tcq train --config=configs/mecoq.py:bits=32,weights=/models/resnet50 --workdir=runs/mecoq --evaluate=best

The arguments are bits=16, 32 or 64; backbone=, a name such as vit_b16; weights=, a path (docs/weights.md). MeCoQ
fine-tunes the two upper layers of a VGG-16 pretrained on ImageNet. tcq has no VGG: here the backbone is frozen with
published weights, or without them a ViT-S/16 from scratch, so do not expect its figures. Not run by us in full: it
needs a GPU.

The released code differs: the codebooks are never trained; the positive of one anchor is combined with the negatives of
another (shapes (2B, 1) and (2B,) broadcast); the floor of the debiased sum underflows to 0; the number of negatives
leaves out those of the memory, which are not normalized; the queries are ranked as they are (`eval.normalize=none`)
although only their unit subvectors are trained; early stopping and the reported checkpoint use the test queries.
"""

from ml_collections import ConfigDict

from tcq.config import base

TEMPERATURES = {"16": 0.25, "32": 0.4, "64": 0.4}  # of its CIFAR-10 (I) runs


def get_config(arg: str = "") -> ConfigDict:
    """Codebooks of 256 codewords of width 16.

    To clip instead: --config.loss.clip=0.05 --config.loss.debias=0.
    """
    a = base.arguments(arg, bits="32", backbone="", weights="")
    if a["bits"] not in TEMPERATURES:
        raise ValueError(f"bits={a['bits']} must be one of {', '.join(TEMPERATURES)}")
    c = base.get_config()
    base.set_backbone(c, a["backbone"] or ("" if a["weights"] else "vit_s16"), a["weights"], image_size=224)
    c.optim.backbone_rate = c.optim.layer_decay = 1.0
    c.optim.frozen_blocks = -1 if a["weights"] else 0

    c.data.source = "tfds:cifar10"
    c.data.protocol = "cifar10_I"
    c.data.validation = 0.02
    c.data.batch_size = 128
    c.data.augment.crop = 0.5
    c.data.augment.jitter = 0.7

    c.quantizer.num_codebooks = int(a["bits"]) // 8
    c.quantizer.num_codewords = 256
    c.quantizer.metric = "ip"
    c.quantizer.scale = 10.0
    c.loss.pairing = "quantized"
    c.loss.temperature = TEMPERATURES[a["bits"]]
    c.loss.debias = 0.1
    c.loss.queue = 384
    c.loss.queue_from = 3 / 50  # from the fourth of 50 epochs on
    c.loss.entropy_weight = 0.05
    c.loss.diversity_weight = 0.5

    c.optim.name = "sgd"
    c.optim.learning_rate = 0.01
    c.optim.warmup_steps = 1 / 50  # one epoch
    c.optim.weight_decay = 1e-3
    c.optim.clip_norm = 0.0
    c.train.total_epochs = 50.0
    c.eval.every_steps = 1000
    c.checkpoint.every_steps = 1000
    return c
