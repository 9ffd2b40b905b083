"""The plain names of tensors.

Training frameworks put prefixes before the names, and split the blocks of large models.
"""

import re

import numpy as np

from tcq.models.weights.layouts import WeightsError

# A tensor of each kind of model, by which a prefix such as "module." or "teacher.backbone." is found.
FIRST = ("patch_embed.proj.weight", "layer4.0.conv1.weight")
CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.")  # of the original DINOv2: number of the chunk, and of the block


def plain(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of one backbone without their common prefix, their blocks numbered through.

    Of a teacher and a student the teacher is used. Names of other layouts stay as they are. Raises WeightsError if
    there are several backbones otherwise.
    """
    prefixes = sorted({k.removesuffix(first) for k in tensors for first in FIRST if k.endswith(first)})
    prefixes = [p for p in prefixes if not p or p.endswith(".")]
    if prefixes and "" not in prefixes:
        prefix = _choose(prefixes)
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    blocks = [k for k in tensors if k.startswith("blocks.")]
    if blocks and all(CHUNKED.match(k) for k in blocks):
        tensors = {CHUNKED.sub(r"blocks.\1.", k): v for k, v in tensors.items()}
    if "register_tokens" in tensors and "blocks.0.attn.qkv.weight" in tensors:
        tensors["reg_token"] = tensors.pop("register_tokens")
    return tensors


def _choose(prefixes: list[str]) -> str:
    teachers = [p for p in prefixes if "teacher" in p.split(".")]
    chosen = teachers or prefixes
    if len(chosen) > 1:
        raise WeightsError(
            f"holds several backbones, below {', '.join(map(repr, chosen))}: save the tensors of one of them alone"
        )
    return chosen[0]
