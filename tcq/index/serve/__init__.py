"""A search page and JSON API for an index, on Starlette and uvicorn: see docs/serve.md."""

import asyncio
from pathlib import Path

from tcq import web
from tcq.index.store import open_index
from tcq.runtime import signals


def serve(
    path: str | Path, *, host: str = "127.0.0.1", port: int = 8000, proxy: str | None = None, k: int = 20
) -> None:
    """Serves the search page of an index until a signal stops the process.

    On an address beyond this machine a token is needed, which the logged address of the page has. `proxy` is the
    address at which a proxy shows the page.
    Raises IndexFileError as `open_index`, and PageError if Starlette or uvicorn are missing, or if the address cannot
    be used.
    """
    web.check_installed("tcq serve")
    from tcq.index.serve import app

    index = open_index(path, verify=False)
    with web.listening(host, port) as bound:
        guard, address = web.guard_of(host, bound, proxy)
        server = web.make_server(app.make(path, index, guard, k=k))
        asyncio.run(web.run(server, bound, f"search page at {address} (Ctrl-C stops it)"))
    signals.check()
