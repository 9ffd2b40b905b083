"""The routes of the search page and its JSON API; page/openapi.json describes them."""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import io
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from tcq import config as configs
from tcq.data.images import ImageError, decode, resize_of
from tcq.index import columns
from tcq.index.contents import Index
from tcq.index.search import image_of
from tcq.index.serve.searches import BusyError, Query, QueryError, Searcher, place_of
from tcq.models import retriever
from tcq.runtime import storage
from tcq.web import guard as guards

PAGE = Path(__file__).parents[1] / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/api/openapi.json": ("openapi.json", "application/json"),
}
MAX_BYTES = 64 * 2**20  # of an image that is sent
UPLOAD_SECONDS = 30.0
UPLOADS = 128  # images that are received or wait for decoding
UPLOAD_BYTES = 256 * 2**20  # of all these together
DECODING = 2  # images that are decoded at once
PARAMETERS = ("item", "features", "k", "offset", "path", "min_score", "hide_copies")  # of /api/search
MOST = 1000  # hits of an answer, and of the offset
LARGEST = 1e15  # of the numbers of a feature; the squares of larger ones overflow
SIDES = (160, 320, 640, 1280)  # pixels of thumbnails
CACHED = 64 * 2**20  # bytes of thumbnails in memory
THUMBNAILS_WAITING = 256
DIGITS = 18  # of a number in a request: it fits 64 bits
TOO_LARGE = "the image must have at most {:,} bytes"
RETRY_AFTER = {"retry-after": "1"}

logger = logging.getLogger(__name__)


def make(path: str | Path, index: Index, guard: guards.Guard, *, k: int) -> Any:
    """The ASGI app for an index."""
    searcher = Searcher(path, index)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.searcher, app.state.k = searcher, k
        app.state.decoding, app.state.uploads, app.state.upload_bytes = anyio.CapacityLimiter(DECODING), 0, 0
        app.state.thumbnails, app.state.thumbnails_waiting = OrderedDict(), 0
        tasks = [asyncio.create_task(work) for work in (searcher.work(), searcher.watch())]
        yield
        for task in tasks:
            task.cancel()

    routes = [Route(path, _file) for path in FILES]
    routes += [
        Route("/healthz", _health),
        Route("/api/info", _info),
        Route("/api/search", _search, methods=["GET", "POST"]),
        Route("/api/items/{id}", _item),
        Route("/api/thumbnails/{id}", _thumbnail),
    ]
    handlers: Any = {
        HTTPException: _error,
        ImageError: _bad_image,
        BusyError: _busy,
        QueryError: _bad_query,
        Exception: _failed,
    }
    return guards.wrap(Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers), guard)


async def _error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": str(error.detail)}, status_code=error.status_code, headers=error.headers)


async def _bad_image(request: Request, error: ImageError) -> Response:
    return JSONResponse({"error": f"query: {error}"}, status_code=400)


async def _bad_query(request: Request, error: QueryError) -> Response:
    return JSONResponse({"error": str(error)}, status_code=error.status)


async def _busy(request: Request, error: BusyError) -> Response:
    return JSONResponse({"error": "too many searches wait: try again"}, status_code=503, headers=RETRY_AFTER)


async def _failed(request: Request, error: Exception) -> Response:
    logger.error(f"{request.method} {request.url.path} failed", exc_info=error)
    return JSONResponse({"error": "the search failed; the log of tcq serve says why"}, status_code=500)


async def _file(request: Request) -> Response:
    name, kind = FILES[request.url.path]
    return FileResponse(PAGE / name, headers={"content-type": kind, "cache-control": "no-cache"})


async def _health(request: Request) -> Response:
    problem = request.app.state.searcher.problem
    if problem:
        return JSONResponse({"status": "failed", "error": problem}, status_code=503)
    return JSONResponse({"status": "ok"})


async def _info(request: Request) -> Response:
    index: Index = request.app.state.searcher.index
    return JSONResponse(
        {
            "images": len(index.rows),
            "bits": configs.bits(index.config),
            "step": index.step,
            "score": index.config.eval.score,
            "columns": columns.names(index),
            "k": request.app.state.k,
            "takes_images": _takes_images(index),
        }
    )


def _takes_images(index: Index) -> bool:
    return bool(index.config.model.embedder) or not retriever.takes_embeddings(index.encoder.model)


async def _search(request: Request) -> Response:
    """Searches by the image in the body, or by `item` or `features`."""
    searcher: Searcher = request.app.state.searcher
    unknown = sorted(set(request.query_params) - set(PARAMETERS))
    if unknown:
        raise HTTPException(400, f"{unknown[0][:40]!r} must be one of {', '.join(PARAMETERS)}")
    query = _options(request)
    given = [name for name in ("item", "features") if request.query_params.get(name)]
    if request.method == "POST":
        if given:
            raise HTTPException(400, f"{given[0]} goes with GET")
        if not _takes_images(searcher.index):
            raise HTTPException(400, "the model takes embeddings, not images: search by item or features")
        query = query._replace(picture=await _picture(request, searcher.index))
    elif given == ["item"]:
        query = query._replace(item=_number(request, "item", 0, 2**62))
    elif given == ["features"]:
        query = query._replace(features=_features(request.query_params["features"], searcher.index))
    else:
        raise HTTPException(400, "GET needs item or features, and POST an image")
    answer = await searcher.search(query)
    listed = [
        {"id": h.id, "path": _text(h.path), "score": columns.plain(h.score), "columns": columns.plain(dict(h.columns))}
        for h in answer.hits
    ]
    features = base64.urlsafe_b64encode(answer.features.astype("<f4").tobytes()).decode().rstrip("=")
    return JSONResponse({"hits": listed, "more": answer.more, "hidden": answer.hidden, "features": features})


def _options(request: Request) -> Query:
    score = request.query_params.get("min_score") or "-inf"
    try:
        least = float(score)
    except ValueError:
        raise HTTPException(400, f"min_score {score!r} must be a number") from None
    return Query(
        k=_number(request, "k", 1, MOST, request.app.state.k),
        offset=_number(request, "offset", 0, MOST, 0),
        path=request.query_params.get("path", "")[:1000],
        min_score=least,
        hide_copies=request.query_params.get("hide_copies", "") in ("1", "true"),
    )


def _number(request: Request, name: str, least: int, most: int, default: int | None = None) -> int:
    text = request.query_params.get(name, "")
    if not text and default is not None:
        return default
    value = int(text) if text.isdecimal() and len(text) <= DIGITS else -1
    if not least <= value <= most:
        raise HTTPException(400, f"{name} {text[:40]!r} must be a whole number from {least} to {most}")
    return value


def _place(index: Index, text: str) -> int:
    place = place_of(index, int(text)) if text.isdecimal() and len(text) <= DIGITS else None
    if place is None:
        raise HTTPException(404, f"no image of the index has the id {text[:40]}")
    return place


def _features(text: str, index: Index) -> np.ndarray:
    q = index.config.quantizer
    width = q.num_codebooks * q.codeword_dim
    try:
        values = np.frombuffer(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), "<f4")
    except (binascii.Error, ValueError):
        values = np.zeros(0, np.float32)
    if values.shape != (width,) or not (np.abs(values) < LARGEST).all():
        raise HTTPException(400, f"features must be {width} finite numbers, float32 in little-endian base64")
    return values.astype(np.float32)


async def _picture(request: Request, index: Index) -> np.ndarray:
    """The image in the body, decoded as the encoder needs it."""
    data, state, size = index.config.data, request.app.state, _declared_bytes(request)
    if state.uploads >= UPLOADS or state.upload_bytes + size > UPLOAD_BYTES:
        raise BusyError
    state.uploads, state.upload_bytes = state.uploads + 1, state.upload_bytes + size
    try:
        body = await _body(request)

        def decoded() -> np.ndarray:
            return decode(body, size=data.image_size, resize=resize_of(data), max_pixels=data.max_pixels)

        return await anyio.to_thread.run_sync(decoded, limiter=state.decoding)
    finally:
        state.uploads, state.upload_bytes = state.uploads - 1, state.upload_bytes - size


def _declared_bytes(request: Request) -> int:
    """The size of the body; the largest one if it is not declared."""
    text = request.headers.get("content-length", str(MAX_BYTES))
    size = int(text) if text.isdecimal() and len(text) <= DIGITS else MAX_BYTES + 1
    if size > MAX_BYTES:
        raise HTTPException(413, TOO_LARGE.format(MAX_BYTES), {"connection": "close"})
    return size


async def _body(request: Request) -> bytes:
    """The body of a request, within the limits of size and time."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > MAX_BYTES:
                    raise HTTPException(413, TOO_LARGE.format(MAX_BYTES), {"connection": "close"})
                parts.append(part)
    except TimeoutError:
        raise HTTPException(408, "the image did not arrive in time", {"connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "the image did not arrive whole") from None
    return b"".join(parts)


async def _item(request: Request) -> Response:
    index: Index = request.app.state.searcher.index
    place = _place(index, request.path_params["id"])
    own = columns.of(index, [place]).to_pylist()[0] if index.columns is not None else {}
    row = index.table.slice(int(index.rows[place]), 1).to_pylist()[0]
    return JSONResponse(
        {
            "id": row["id"],
            "path": _text(index.paths[place]),
            "size": row["size"],
            "modified": row["modified"].isoformat() if row["modified"] else None,
            "hash": row["hash"].hex(),
            "code": index.codes[place].tolist(),
            "columns": columns.plain(own),
        }
    )


async def _thumbnail(request: Request) -> Response:
    """A JPEG of an indexed image, encoded anew.

    Only images of the index are read, and only pixels are sent.
    """
    state, index = request.app.state, request.app.state.searcher.index
    place, side = _place(index, request.path_params["id"]), _number(request, "side", 1, SIDES[-1], SIDES[0])
    side = next(s for s in SIDES if s >= side)
    key = index.hashes[place].tobytes() + index.paths[place].encode("utf-8", "surrogateescape"), side
    tag = f'"{hashlib.blake2b(repr(key).encode(), digest_size=12).hexdigest()}"'
    headers = {"etag": tag, "cache-control": "private, max-age=600"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    jpeg = state.thumbnails.get(key)
    if jpeg is None:
        if state.thumbnails_waiting >= THUMBNAILS_WAITING:
            raise BusyError
        state.thumbnails_waiting += 1
        try:
            jpeg = await anyio.to_thread.run_sync(
                _jpeg, index.paths[place], side, index.config.data.max_pixels, limiter=state.decoding
            )
        except (ImageError, storage.BucketError):
            raise HTTPException(404, "this image cannot be read any more") from None
        finally:
            state.thumbnails_waiting -= 1
        state.thumbnails[key] = jpeg
        while sum(map(len, state.thumbnails.values())) > CACHED:
            state.thumbnails.popitem(last=False)
    else:
        state.thumbnails.move_to_end(key)
    return Response(jpeg, media_type="image/jpeg", headers=headers)


def _jpeg(path: str, side: int, max_pixels: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(decode(image_of(path), size=side, max_pixels=max_pixels)).save(out, "JPEG", quality=85)
    return out.getvalue()


def _text(path: str) -> str:
    """A path as text that JSON can hold: bytes that are not UTF-8 become "?"."""
    return path.encode("utf-8", "replace").decode()
