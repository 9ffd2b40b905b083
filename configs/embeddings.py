"""Embeddings that you already have: only projection and codebooks are trained, in minutes on a CPU.

    python -m tcq train --config=configs/embeddings.py:/path/to/embeddings --workdir=runs/mine
    python -m tcq train --config=configs/embeddings.py:/path/to/embeddings,bits=64 --workdir=runs/mine

The folder is as docs/embeddings.md says. Say how alike things are meant to be: --config.loss.clip=kinds=100 for about
100 kinds of things, or a share such as 0.03.
"""

from ml_collections import ConfigDict

from tcq.config import base


def get_config(arg: str = "") -> ConfigDict:
    """Codebooks of 16 codewords of width 16 on a linear projection of the embeddings."""
    a = base.arguments(f"path={arg}", path="", bits="32")
    c = base.get_config()
    base.set_bits(c, a["bits"])
    base.train_on_embeddings(c)
    c.data.source = f"embeddings:{a['path']}" if a["path"] else ""
    return c
