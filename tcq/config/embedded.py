"""The keys that embeddings of `data.source=embeddings:<folder>` or `model.embedder` set."""

import os
from collections.abc import Container

from ml_collections import ConfigDict

from tcq.config import checks
from tcq.config.overrides import ConfigError
from tcq.data import embeddings
from tcq.data.source import SourceError
from tcq.models import embedder

KIND = "embeddings:"
VIEWS = 8  # of each image, if data.views is 0


def applies(config: ConfigDict) -> bool:
    """Whether the input of the model is embeddings."""
    return bool(config.model.embedder) or config.data.source.startswith(KIND)


def apply(config: ConfigDict, before: ConfigDict | None, *, overridden: Container[str]) -> None:
    """Sets the model to projection and codebooks on embeddings of their width.

    Makes paths absolute. Calls `model.embedder` once; what it gave in the run `before` stands if it is nearly the same.
    Raises ConfigError if it fails, the folder has no embeddings, or other keys contradict.
    """
    m, data = config.model, config.data
    for key in ("name", "weights"):
        if m[key] not in ("", embedder.NAME):
            raise ConfigError(
                f"model.{key} {m[key]!r} must be empty: the model is projection and codebooks on embeddings"
            )
    if m.embedder and data.source.startswith(KIND):
        raise ConfigError(
            f"model.embedder {m.embedder} embeds images, and data.source {data.source} has embeddings: leave one out"
        )
    try:
        if m.embedder:
            place, colon, name = m.embedder.rpartition(":")
            if place.endswith(".py"):
                m.embedder = f"{os.path.abspath(os.path.expanduser(place))}{colon}{name}"
            problem = checks.ALLOWED["data.image_size"].problem(data.image_size)
            if problem:
                raise ConfigError(f"data.image_size {problem}")
            m.embedder_output = embedder.signature(m.embedder, data.image_size)
            if before and embedder.is_same(m.embedder_output, before.model.embedder_output, embedder.TOLERANCE):
                m.embedder_output = before.model.embedder_output
            width = int(m.embedder_output[0])
            if not data.views and "data.views" not in overridden:
                data.views = VIEWS
        else:
            folder = os.path.abspath(os.path.expanduser(data.source.removeprefix(KIND)))
            data.source, width = KIND + folder, embeddings.width(folder)
    except (embedder.EmbedderError, SourceError) as error:
        raise ConfigError(str(error)) from None
    m.name, m.width = embedder.NAME, width
    config.optim.frozen_blocks = -1
