"""Embeds a collection and its views once, into a folder that training reads.

A user's function or a backbone embeds them.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tcq import config as configs
from tcq import encode
from tcq.data import embeddings, sources, splits
from tcq.data.source import Source, SourceError
from tcq.embed import files
from tcq.models import embedder, retriever
from tcq.runtime import devices, processes, signals, storage

DONE = "done.json"  # of a folder of the cache: its `files.State`


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
    folder = Path(processes.on_first(lambda: str(_cache(config, source))))
    _fill(folder, config, source)
    processes.require_visible(folder / DONE)
    cached = embeddings.open_folder(folder)
    return source._replace(images=cached.images, views=cached.views, pictures=source.images)


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
    source = sources.open_source(config.data)
    keys = {k: v for k, v in configs.flatten(config).items() if k != "model.embedder_output"}
    of = hashlib.blake2b(json.dumps(keys, sort_keys=True).encode() + _contents(source)).hexdigest()
    with processes.entered_by_first(lambda: files.locked(out)):
        processes.on_first(lambda: _refuse(out, "was written meanwhile by another process"))
        state = files.State(of, config.model.embedder_output)
        files.write(files.partial(out), state, run, source, np.arange(len(source.images)), config.data)
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


def _cache(config: ConfigDict, source: Source) -> Path:
    """The folder of the embeddings of a source, named by all that they depend on.

    A folder that exists is taken if its embedder gave nearly the same.
    """
    data, output = config.data, [float(x) for x in config.model.embedder_output]
    parts = [
        files.SEED,
        data.views,
        sorted((name, strength) for name, strength in data.augment.items() if name not in ("noise", "drop")),
        [data.image_size, data.resize, data.interpolation, data.crop_share],
        [data.protocol, data.split_seed, data.query, data.validation],
        [data.max_pixels, data.labels],
    ]
    home = Path(data.cache_dir).expanduser() if data.cache_dir else storage.cache_home()
    images, function = _digest(json.dumps(parts).encode() + _contents(source)), _digest(json.dumps(output).encode())
    own = home / "embedded" / f"{images}-{function}"
    for file in sorted(own.parent.glob(f"{images}-*/*.json")):
        state = files.read_state(file) if file.name in (DONE, files.STATE) else None
        if state and embedder.is_same(output, state.output):
            return file.parent.with_name(file.parent.name.removesuffix(files.PARTIAL))
    return own


def _digest(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _contents(source: Source) -> bytes:
    """The digests of all images; one of all pixels if there are none."""
    if source.digests is not None:
        return b"".join(source.digests)
    digest = hashlib.blake2b()
    for first in range(0, len(source.images), files.BLOCK):
        signals.poll()
        digest.update(np.ascontiguousarray(source.images[first : first + files.BLOCK]).data)
    return digest.digest()


def _fill(folder: Path, config: ConfigDict, source: Source) -> None:
    """Writes a folder of the cache, unless it is there."""

    def is_done() -> bool:
        return (folder / DONE).is_file()

    if processes.on_first(is_done):
        return
    m = config.model
    embedder.require_same(m.embedder, config.data.image_size, tuple(m.embedder_output))
    split = splits.of_source(source, config.data)
    viewed = np.union1d(split.train, split.validation)
    with processes.entered_by_first(lambda: files.locked(folder)):
        if processes.on_first(is_done):  # by another run, meanwhile
            return
        partial = files.partial(folder)
        state = files.State(folder.name, m.embedder_output)
        files.write(partial, state, _run_of(config), source, viewed, config.data)

        def publish() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            files.write_state(partial / DONE, state)
            files.publish(folder)

        processes.on_first(publish)
