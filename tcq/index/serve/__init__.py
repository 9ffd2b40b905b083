"""A search page and JSON API for an index, on Starlette and uvicorn: see docs/serve.md."""

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tcq.index.contents import IndexFileError
from tcq.index.serve.guard import NAMES, Guard
from tcq.index.store import open_index
from tcq.runtime import signals

CONNECTIONS = 512  # open at once; others are answered 503
HEADER_SECONDS = 10.0  # within which a request has to be complete but for its body
POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)


def serve(path: str | Path, *, host: str = "127.0.0.1", port: int = 8000, k: int = 20) -> None:
    """Serves the search page of an index until a signal stops the process.

    On an address beyond this machine a token is needed, which the logged address of the page has.
    Raises IndexFileError as `open_index`, if Starlette or uvicorn are missing, or if the address cannot be used.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise IndexFileError(f"tcq serve needs {error.name}: pip install 'tcq[serve]'") from None
    index = open_index(path, verify=False)
    with _listening(host, port) as listening:
        number = listening.getsockname()[1]
        beyond = not is_loopback(host)
        shown = f"[{host}]" if ":" in host else host
        token = secrets.token_urlsafe(18) if beyond else None
        guard = Guard(None if beyond else number, token, tuple({*NAMES, shown}))
        query = f"/?token={token}" if token else "/"
        ready = f"search page at http://{shown}:{number}{query} (Ctrl-C stops it)"
        asyncio.run(_run(make_server(path, index, guard, k=k), listening, ready))
    signals.check()


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise IndexFileError(f"--host={host} --port={port}: {error.strerror or error}") from None
        yield listening


def make_server(path: str | Path, index: Any, guard: Guard, *, k: int) -> Any:
    """A uvicorn server of the page; `_run` runs it."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from tcq.index.serve import app

    class Protocol(H11Protocol):
        """Closes connections that do not send a whole request in time."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(HEADER_SECONDS, self._close_if_silent)

        def _close_if_silent(self) -> None:
            if self.transport.is_closing():
                return
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()
            else:  # busy: look again
                self.loop.call_later(HEADER_SECONDS, self._close_if_silent)

    config = uvicorn.Config(
        app.make(path, index, guard, k=k),
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(config)


async def _run(server: Any, listening: socket.socket, ready: str = "") -> None:
    """Runs a server until a signal; the handlers of tcq stay.

    Logs `ready` once requests are answered.
    """
    server.capture_signals = contextlib.nullcontext

    async def watch() -> None:
        logged = not ready
        while not signals.requested():
            if server.started and not logged:
                logger.info(ready)
                logged = True
            signals.advance()
            await asyncio.sleep(POLL_SECONDS)
        server.should_exit = True

    watching = asyncio.create_task(watch())
    try:
        await server.serve(sockets=[listening])
    finally:
        watching.cancel()
