"""Embeddings that you already have.

Only projection and codebooks are trained, in minutes on a CPU.

    python -m tcq train --config=configs/embeddings.py:/path/to/embeddings --workdir=runs/mine
    python -m tcq train --config=configs/embeddings.py:/path/to/embeddings,bits=64,kinds=100 --workdir=runs/mine

The folder is as docs/embeddings.md says. Say with kinds= about how many kinds of things there are, if you know.
"""

from ml_collections import ConfigDict

from tcq.config import base


def get_config(arg: str = "") -> ConfigDict:
    """Codebooks of 16 codewords of width 16 on a linear projection of the embeddings."""
    a = base.arguments(f"path={arg}", path="", bits="32", kinds="")
    c = base.get_config()
    base.set_bits(c, a["bits"])
    base.train_on_embeddings(c, a["kinds"])
    c.data.source = f"embeddings:{a['path']}" if a["path"] else ""
    return c
