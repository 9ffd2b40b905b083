"""Embeds a collection and its views once, into a folder that training reads.

A user's function or a backbone embeds them.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict

from tcq import config as configs
from tcq import encode
from tcq.data import cache, embeddings, known, shards, sources, splits
from tcq.data.source import Source, SourceError
from tcq.embed import files
from tcq.models import embedder, retriever
from tcq.runtime import devices, processes, signals, storage

DONE = "done.json"  # of a folder of the cache: its `files.State`
FEATURES = ("noise", "drop")  # of data.augment: they change embeddings, not images

logger = logging.getLogger(__name__)


def open_source(config: ConfigDict, order: Callable[[Source], Source] = lambda source: source) -> Source:
    """The source of a config; with `model.embedder`, its embeddings.

    The embeddings are computed once and cached. The processes of a run share the work and read all of them, so these
    must share `data.cache_dir`. `order` puts the images into the order that a run knows. In `config` all processes
    take what the embedder gave in process 0.
    Raises SourceError, EmbedderError and ProcessError.
    """
    source = order(sources.open_source(config.data))
    if not config.model.embedder:
        return source
    _agree(config)
    named = _with_digests(source)
    has_views = _has_views(config, source)
    folder = Path(processes.on_first(lambda: str(_cache(config, named, has_views))))
    _fill(folder, config, named, has_views)
    processes.require_visible(folder / DONE)
    processes.on_first(lambda: _mark_as_used(folder))
    items = embeddings.read_shards(folder, embeddings.ITEMS)
    views = embeddings.read_shards(folder, embeddings.VIEWS) if config.data.views else None
    return source._replace(images=items, views=views, pictures=source.images)


def _has_views(config: ConfigDict, source: Source) -> Bool[np.ndarray, " N"]:
    """Which images get views: those for training and validation."""
    split = splits.of_source(source, config.data)
    has_views = np.zeros(len(source.images), bool)
    has_views[np.union1d(split.train, split.validation)] = config.data.views > 0
    return has_views


def _mark_as_used(folder: Path) -> None:
    """For `cleaning.delete_unused`. A cache of another user stays as it is."""
    with contextlib.suppress(OSError):
        os.utime(folder / DONE)


def write(config: ConfigDict, out: str | Path) -> int:
    """Writes the embeddings of the source of a config, and of views, to a new folder.

    There are `data.views` views of each image. The embeddings are those of `model.embedder`, or of the backbone that
    `model.weights` names, before any projection. The processes of a run share the work, and the folder.
    If the call is stopped, the same call goes on in `<out>-partial`. Returns the number of images. Raises SourceError,
    also if `out` exists, EmbedderError and WeightsError.
    """
    if storage.is_url(out):
        raise SourceError(f"{out} is in a bucket: give a local folder, and copy it afterwards")
    out = Path(out)
    processes.on_first(lambda: _refuse(out, "exists"))
    run = _run_of(config)
    source = _with_digests(sources.open_source(config.data))
    keys = {k: v for k, v in configs.flatten(config).items() if k != "model.embedder_output"}
    of = hashlib.blake2b(json.dumps(keys, sort_keys=True).encode() + _contents(source)).hexdigest()
    all_images = np.full(len(source.images), config.data.views > 0)
    with processes.entered_by_first(lambda: files.locked(out)):
        processes.on_first(lambda: _refuse(out, "was written meanwhile by another process"))
        state = files.State(of, config.model.embedder_output)
        files.write(files.partial(out), state, run, source, all_images, config.data, _find(config, source, all_images))
        processes.on_first(lambda: files.publish(out))
    return len(source.images)


def _refuse(out: Path, reason: str) -> None:
    if out.exists():
        raise SourceError(f"{out} {reason}: give another folder")


def _run_of(config: ConfigDict) -> files.Run:
    """What embeds images. Raises EmbedderError if the config has no function and no weights."""
    m = config.model
    if m.embedder:
        return partial(_run_embedder, m.embedder, int(m.embedder_output[0]))
    if not m.weights:
        raise embedder.EmbedderError(
            "nothing to embed with: give --config.model.embedder=file.py:function, or --config.model.weights=<path>"
        )
    model = retriever.from_config(config)
    variables = devices.replicate(encode.backbone_from_weights(config, model))
    run = _compiled_backbone(model)
    return lambda images: np.asarray(devices.map_here(run, variables, images, config.eval.batch_size))


def _run_embedder(spec: str, width: int, images: np.ndarray) -> np.ndarray:
    rows = embedder.run(spec, images)
    if rows.shape[1] != width:
        raise embedder.EmbedderError(
            f"model.embedder {spec} returned {rows.shape[1]} numbers for each of {len(images)} images, and {width} "
            f"before: the width must not depend on the images"
        )
    return rows


@lru_cache(maxsize=2)
def _compiled_backbone(model: retriever.Retriever) -> Any:
    def body(variables: Any, images: Any) -> Any:
        pixels = retriever.normalized(retriever.scaled(images), model.mean, model.std)
        return model.backbone.apply(variables, pixels).astype(jnp.float32)  # type: ignore[union-attr]

    return devices.pmap_rows(body)


def _agree(config: ConfigDict) -> None:
    """Takes what `model.embedder` gave in process 0, which may differ in rounding.

    Raises ProcessError if it differs by more.
    """
    m = config.model
    first = tuple(processes.on_first(lambda: list(m.embedder_output)))
    if embedder.is_same(m.embedder_output, first):
        m.embedder_output = first
    processes.require_same("embeddings by model.embedder", list(m.embedder_output))


def inputs(encoder: encode.Encoder, images: Any, digests: Sequence[bytes]) -> Any:
    """What the encoder takes for images: these, or their embeddings by `model.embedder`.

    Images are embedded where they are read, unless a training on images of the same contents has left the embeddings
    in the cache. Raises EmbedderError if the function is not the one of the training.
    """
    if not encoder.config.model.embedder or images.ndim != 4:
        return images
    places = _earlier(encoder.config)
    return encode.Embedded(encoder, images, known.find(places, digests, np.zeros(len(images), bool), drawn_as=""))


def _with_digests(source: Source) -> Source:
    """The source with digests of its pixels, if it has none of files."""
    if source.digests is not None:
        return source
    digests: list[bytes] = []
    for first in range(0, len(source.images), files.BLOCK):
        signals.poll()
        block = np.ascontiguousarray(source.images[first : first + files.BLOCK])
        digests += [hashlib.blake2b(image.data, digest_size=cache.DIGEST_BYTES).digest() for image in block]
    return source._replace(digests=digests)


def _contents(source: Source) -> bytes:
    assert source.digests is not None
    return b"".join(source.digests)


def _cache(config: ConfigDict, source: Source, has_views: Bool[np.ndarray, " N"]) -> Path:
    """The folder of the embeddings of a source, named by all that they depend on.

    The parts of the name are of the images as the function sees them, of the views, of the collection, and of the
    function. A folder that exists is taken if its embedder gave nearly the same.
    """
    output = [float(x) for x in config.model.embedder_output]
    collection = _digest(np.packbits(has_views).tobytes() + _contents(source))
    start = f"{_pixels(config)}-{_drawn_as(config)}-{collection}"
    own = _home(config) / f"{start}-{_digest(json.dumps(output).encode())}"
    for file in sorted(own.parent.glob(f"{start}-*/*.json")):
        state = files.read_state(file) if file.name in (DONE, files.STATE) else None
        if state and embedder.is_same(output, state.output):
            return file.parent.with_name(file.parent.name.removesuffix(files.PARTIAL))
    return own


def _home(config: ConfigDict) -> Path:
    folder = config.data.cache_dir
    return (Path(folder).expanduser() if folder else storage.cache_home()) / "embedded"


def _pixels(config: ConfigDict) -> str:
    """The part of a folder's name that tells how images are decoded."""
    data = config.data
    return _digest(
        json.dumps(
            [shards.VERSION, data.image_size, data.resize, data.interpolation, data.crop_share, data.max_pixels]
        ).encode()
    )


def _drawn_as(config: ConfigDict) -> str:
    """The part of a folder's name that tells how views are drawn."""
    strengths = sorted((name, strength) for name, strength in config.data.augment.items() if name not in FEATURES)
    return _digest(json.dumps([files.SEED, config.data.views, strengths]).encode())


def _find(config: ConfigDict, source: Source, has_views: np.ndarray) -> known.Known | None:
    """The embeddings of these images and views in the cache; None for a backbone of ours."""
    if not config.model.embedder:
        return None
    assert source.digests is not None
    found = known.find(_earlier(config), source.digests, has_views, drawn_as=_drawn_as(config))
    count = int((found.numbers >= 0).sum())
    if count:
        logger.info(f"{count:,} of {len(has_views):,} images are embedded already")
    return found


def _output(config: ConfigDict, found: known.Known | None) -> tuple[float, ...]:
    """The signature of the function that has embedded a collection.

    With copies it is that of their folder: rounding that grows from folder to folder would not be seen otherwise.
    """
    state = files.read_state(found.places[0] / DONE) if found and found.places else None
    return tuple(state.output if state else config.model.embedder_output)


def _earlier(config: ConfigDict) -> list[Path]:
    """The folders of the cache with embeddings by the same function, the newest first.

    Their images were decoded in the same way, and they have one signature.
    """
    now = config.model.embedder_output
    found = sorted(_home(config).glob(f"{_pixels(config)}-*/{DONE}"), key=_time, reverse=True)
    whole = [file for file in found if not file.parent.name.endswith(files.PARTIAL)]
    states = [(file.parent, files.read_state(file)) for file in whole]
    same = [(place, list(state.output)) for place, state in states if state and embedder.is_same(now, state.output)]
    return [place for place, output in same if output == same[0][1]]


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it was deleted meanwhile
        return 0.0


def _digest(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _fill(folder: Path, config: ConfigDict, source: Source, has_views: Bool[np.ndarray, " N"]) -> None:
    """Writes a folder of the cache, unless it is there."""

    def is_done() -> bool:
        return (folder / DONE).is_file()

    if processes.on_first(is_done):
        return
    m = config.model
    embedder.require_same(m.embedder, config.data.image_size, tuple(m.embedder_output))
    with processes.entered_by_first(lambda: files.locked(folder)):
        if processes.on_first(is_done):  # by another run, meanwhile
            return
        partial = files.partial(folder)
        found = _find(config, source, has_views)
        state = files.State(folder.name, processes.on_first(lambda: list(_output(config, found))))
        files.write(partial, state, _run_of(config), source, has_views, config.data, found)

        def publish() -> None:
            assert source.digests is not None
            shutil.rmtree(folder, ignore_errors=True)
            known.write(partial, source.digests, has_views)
            files.write_state(partial / DONE, state)
            files.publish(folder)

        processes.on_first(publish)
