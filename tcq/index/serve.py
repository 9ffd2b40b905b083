"""A search page for an index, on this machine only: choose an image, see its nearest neighbours. Standard library only."""

import base64
import html
import io
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from tcq import index as indexes
from tcq.data.images import MAX_BYTES, ImageError, decode, resize_of
from tcq.runtime import storage as buckets
from tcq.runtime.log import say

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>tcq search</title>
<style>body{{font:16px system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}}
ol{{display:flex;flex-wrap:wrap;gap:1rem;list-style:none;padding:0}}figure{{margin:0;width:10rem}}
img{{width:10rem;height:10rem;object-fit:cover;image-rendering:auto}}figcaption{{font-size:.8rem;overflow-wrap:anywhere}}</style>
<h1>tcq search</h1><p>{count:,} images, {bits} bits each.</p>
<p><label>Query image <input type="file" id="file" accept="image/*"></label></p><p id="status" role="status"></p><ol id="hits"></ol>
<script>
const status = document.getElementById("status"), hits = document.getElementById("hits");
document.getElementById("file").onchange = async (event) => {{
  hits.replaceChildren(); status.textContent = "searching";
  const answer = await fetch("search", {{method: "POST", body: event.target.files[0]}});
  const result = await answer.json();
  status.textContent = result.error || `${{result.hits.length}} nearest images`;
  for (const hit of result.hits || []) {{
    const item = document.createElement("li"), figure = document.createElement("figure");
    const image = document.createElement("img"), caption = document.createElement("figcaption");
    image.src = hit.image; image.alt = hit.path; caption.textContent = `${{hit.score.toFixed(3)}} ${{hit.path}}`;
    figure.append(image, caption); item.append(figure); hits.append(item);
  }}
}};
</script></html>"""


def make_server(path: str | Path, *, port: int, k: int = 10) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 that is ready to `serve_forever`. Port 0 takes a free one. Raises as `index.open_index`."""
    index = indexes.open_index(path)
    data = index.encoder.config.data
    bits = index.encoder.config.quantizer.num_codebooks * (
        index.encoder.config.quantizer.num_codewords.bit_length() - 1
    )
    page = PAGE.format(count=len(index.paths), bits=html.escape(str(bits))).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                self._answer(200, "text/html; charset=utf-8", page)
            else:
                self._answer(404, "application/json", json.dumps({"error": "not found"}).encode())

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if self.path != "/search" or not re.fullmatch(r"\d{1,12}", length) or int(length) > MAX_BYTES:
                self.close_connection = True
                self._answer(400, "application/json", json.dumps({"error": "send one image to /search"}).encode())
                return
            try:
                query = decode(self.rfile.read(int(length)), size=data.image_size, resize=resize_of(data))
                found = indexes.search(index, query[None], k=k)[0]
                hits = [{"path": h.path, "score": h.score, "image": _thumbnail(h)} for h in found]
                self._answer(200, "application/json", json.dumps({"hits": hits}).encode())
            except ImageError as error:
                self._answer(400, "application/json", json.dumps({"error": f"the query {error}"}).encode())

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def serve(path: str | Path, *, port: int, k: int = 10) -> None:
    """Serves the search page of an index until interrupted."""
    with make_server(path, port=port, k=k) as server:
        say(f"search page at http://127.0.0.1:{server.server_address[1]}/  (Ctrl-C stops it)")
        server.serve_forever()


def _thumbnail(hit: indexes.Hit) -> str:
    """A data URL; only images that the index names are ever read. An image that is gone shows as nothing."""
    try:
        pixels = decode(indexes.picture_of(hit), size=160)
    except (ImageError, buckets.BucketError):
        return ""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
