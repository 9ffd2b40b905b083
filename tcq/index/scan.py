"""Reading the folder of images that is to be indexed."""

from collections import Counter
from pathlib import Path

from tcq import encode
from tcq.data import cache, embeddings, sources
from tcq.data.source import Source, SourceError
from tcq.models import retriever
from tcq.runtime import storage

EMBEDDINGS = "embeddings:"


def read_folder(encoder: encode.Encoder, images: str | Path) -> Source:
    """Every image below a folder, or the rows of "embeddings:<folder>".

    Images are decoded as the encoder needs them.
    Raises as `sources.folder` and `embeddings.open_folder`, and SourceError if the encoder takes the other kind.
    """
    data, m = encoder.config.data, encoder.config.model
    takes_embeddings = retriever.takes_embeddings(encoder.model)
    if is_embeddings(images):
        source = embeddings.open_folder(folder_of(images))
        if not takes_embeddings or source.images.shape[1] != m.width:
            takes = f"embeddings of {m.width} numbers" if takes_embeddings else "images"
            raise SourceError(f"{images}: rows of {source.images.shape[1]} numbers; the model takes {takes}")
        repeated = [name for name, count in Counter(source.names).items() if count > 1]
        if repeated:
            raise SourceError(
                f"{images}: {len(repeated):,} names are given more than once, such as {repeated[0]!r}: an index needs "
                f"a name for each row"
            )
        return source
    if takes_embeddings and not m.embedder:
        raise SourceError(f"{images}: the model was trained on embeddings: give --images=embeddings:<folder>")
    return sources.folder(images, cache.rule_of(data), labels="none", exclude=data.exclude)


def is_embeddings(images: str | Path) -> bool:
    """Whether the argument names a folder of embeddings, not of images."""
    return str(images).startswith(EMBEDDINGS)


def folder_of(images: str | Path) -> str:
    """The folder of "embeddings:<folder>"."""
    return str(images).removeprefix(EMBEDDINGS)


def root_of(images: str | Path) -> str:
    """Absolute path or URL of a folder of images; "" for embeddings, whose names are complete."""
    if is_embeddings(images):
        return ""
    return str(images).rstrip("/") if storage.is_url(images) else str(Path(images).expanduser().resolve())
