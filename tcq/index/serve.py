"""A search page for an index, on this machine only: choose an image, see the nearest ones. Standard library only."""

import base64
import io
import json
import logging
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template

from PIL import Image

from tcq import config as configs
from tcq.data.images import MAX_UPLOAD, ImageError, decode, resize_of
from tcq.index.search import Hit, build_engine, image_of, search
from tcq.index.store import open_index
from tcq.runtime import signals, storage

PAGE = Path(__file__).with_name("page") / "page.html"
THUMBNAIL = 160  # pixels
UPLOADS = 2  # images in memory at once, before they are decoded
NAMES = ("127.0.0.1", "localhost")  # of this machine, in the addresses of the page

logger = logging.getLogger(__name__)


class Server(ThreadingHTTPServer):
    """A server that stops when a signal asks the process to."""

    def service_actions(self) -> None:
        """Called twice a second by `serve_forever`."""
        signals.check()


def make_server(path: str | Path, *, port: int, k: int = 10) -> Server:
    """A server on 127.0.0.1 that is ready to `serve_forever`; port 0 is any free one. Raises as `open_index`."""
    index = open_index(path)
    data = index.config.data
    values = {"count": f"{len(index.paths):,}", "bits": configs.bits(index.config)}
    engine = build_engine(index)
    uploads = threading.BoundedSemaphore(UPLOADS)
    page = Template(PAGE.read_text()).substitute(values).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self._is_local():
                self._error(403, "this page is served to this machine only")
            elif self.path == "/":
                self._answer(200, "text/html; charset=utf-8", page)
            else:
                self._error(404, "not found")

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not self._is_local():
                self.close_connection = True
                self._error(403, "this page is served to this machine only")
                return
            if self.path != "/search" or not re.fullmatch(r"\d{1,12}", length) or int(length) > MAX_UPLOAD:
                self.close_connection = True
                self._error(400, "send one image to /search")
                return
            try:
                with uploads:
                    body = self.rfile.read(int(length))
                    query = decode(body, size=data.image_size, resize=resize_of(data), max_pixels=data.max_pixels)
            except ImageError as error:
                self._error(400, f"query: {error}")
                return
            hits = [
                {"path": h.path, "score": h.score, "image": _thumbnail(h)}
                for h in search(index, query[None], k=k, engine=engine)[0]
            ]
            self._answer(200, "application/json", json.dumps({"hits": hits}).encode())

        def _is_local(self) -> bool:
            return is_local(self.headers.get("Host", ""), self.headers.get("Origin"), self.connection.getsockname()[1])

        def _error(self, status: int, message: str) -> None:
            self._answer(status, "application/json", json.dumps({"error": message}).encode())

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            logger.debug(format % arguments)

    return Server(("127.0.0.1", port), Handler)


def is_local(host: str, origin: str | None, port: int) -> bool:
    """Whether a request is for the page's own address: the name of another site may lead here (DNS rebinding)."""
    hosts = [f"{name}:{port}" for name in NAMES] + (list(NAMES) if port == 80 else [])
    return host in hosts and (origin is None or origin in [f"http://{h}" for h in hosts])


def serve(path: str | Path, *, port: int, k: int = 10) -> None:
    """Serves the search page of an index until a signal stops the process."""
    with make_server(path, port=port, k=k) as server:
        logger.info(f"search page at http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C stops it)")
        server.serve_forever()


def _thumbnail(hit: Hit) -> str:
    """The image as a JPEG data URL, "" if it cannot be read. Only indexed paths are read."""
    try:
        pixels = decode(image_of(hit.path), size=THUMBNAIL)
    except (ImageError, storage.BucketError):
        return ""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
