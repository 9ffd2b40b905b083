"""Your own images: any folder of them, with sub-folders as labels or without labels.

    python -m tcq train --config=configs/folder.py:/path/to/images --workdir=runs/mine
    python -m tcq train --config=configs/folder.py:/path/to/images,bits=64,weights=/models/dinov2-small \\
        --workdir=runs/mine
    python -m tcq train --config=configs/folder.py:/path/to/images,embedder=examples/litert.py:embed,kinds=100 \\
        --workdir=runs/mine

The arguments after the folder are bits=16, 32, 64 ...; backbone=, a name such as vit_b16 or resnet18; weights=, a path
(docs/weights.md); embedder=, a function of yours (docs/embeddings.md); with one of these two kinds=, about how many
kinds of things there are. Other keys as usual:
--config.data.image_size=64 --config.train.total_steps=5000 ...
"""

from ml_collections import ConfigDict

from tcq.config import base


def get_config(arg: str = "") -> ConfigDict:
    """A small ViT from scratch on 32 x 32 pixels, or another backbone on 224 x 224 pixels."""
    a = base.arguments(f"path={arg}", path="", bits="32", backbone="", weights="", embedder="", kinds="")
    c = base.get_config()
    base.set_bits(c, a["bits"])
    c.data.source = f"folder:{a['path']}" if a["path"] else ""
    c.quantizer.metric = "ip"
    c.quantizer.scale = 10.0
    c.loss.temperature = 0.3
    c.train.total_steps = 1000
    c.eval.every_steps = 500
    if a["kinds"] and not (a["embedder"] or a["weights"]):
        raise ValueError(
            "kinds= goes with embedder= or weights=: training from scratch has not learned yet what is alike"
        )
    if a["embedder"]:
        base.train_on_embeddings(c, a["kinds"])
        c.model.embedder = a["embedder"]
        c.data.image_size = 224
        return c
    if a["backbone"] or a["weights"]:
        base.set_backbone(c, a["backbone"], a["weights"], image_size=224)
        if a["weights"]:
            base.clip_kinds(c, a["kinds"], temperature=0.3)  # our choice: not measured with published weights
        return c
    c.model.update(width=128, depth=4, heads=4, patch=8, pooling="flat")
    c.optim.learning_rate = 2e-3
    return c
