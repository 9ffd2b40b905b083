"""Pages on this machine, and beyond it with a token: a uvicorn server for an ASGI app."""

import asyncio
import contextlib
import ipaddress
import logging
import re
import secrets
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from tcq.runtime import signals
from tcq.web.guard import NAMES, PORTS, Guard

CONNECTIONS = 512  # open at once; others are answered 503
HEADER_SECONDS = 10.0  # within which a request has to be complete but for its body
POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)


class PageError(ValueError):
    """A page cannot be served."""


def check_installed(command: str) -> None:
    """Raises PageError if Starlette or uvicorn are missing, which `command` needs."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise PageError(f"{command} needs {error.name}: pip install starlette uvicorn") from None


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens. Raises PageError if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
        except OSError as error:
            raise PageError(f"--host={host} --port={port}: {error.strerror or error}") from None
        yield bound


def guard_of(host: str, bound: socket.socket, proxy: str | None = None) -> tuple[Guard, str]:
    """Who may use a page, and its address; with a token if the host is beyond this machine.

    `proxy` is the address at which a proxy shows the page.
    Raises PageError if it is none.
    """
    number = bound.getsockname()[1]
    beyond = not is_loopback(host)
    shown = f"[{host}]" if ":" in host else host
    token = secrets.token_urlsafe(18) if beyond else None
    query = f"/?token={token}" if token else "/"
    origin, path = _origin_and_path(proxy) if proxy else (None, "/")
    guard = Guard(None if beyond else number, token, tuple({*NAMES, shown}), origin, path)
    return guard, f"{origin}{path.rstrip('/')}{query}" if origin else f"http://{shown}:{number}{query}"


def _origin_and_path(address: str) -> tuple[str, str]:
    """As browsers write them."""
    try:
        parts = urlsplit(address)
        name, port = parts.hostname or "", parts.port
        host = f"[{name}]" if ":" in name else name.encode("idna").decode()
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    plain = re.fullmatch(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]", host) and re.fullmatch(r"[!-~]*", parts.path)
    if parts.scheme not in PORTS or not plain or parts.query or parts.fragment or "@" in parts.netloc:
        raise PageError(f"--proxy={address} must be an address such as https://photos.example/search")
    number = f":{port}" if port is not None and f":{port}" != PORTS[parts.scheme] else ""
    return f"{parts.scheme}://{host}{number}", parts.path or "/"


def make_server(app: Any) -> Any:
    """A uvicorn server of an ASGI app; `run` runs it."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

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
        app,
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


async def run(server: Any, bound: socket.socket, ready: str = "") -> None:
    """Runs a server until a signal, or until its `should_exit` is set.

    The handlers of tcq stay. Logs `ready` once requests are answered.
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
        await server.serve(sockets=[bound])
    finally:
        watching.cancel()
