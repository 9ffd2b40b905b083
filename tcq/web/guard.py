"""Which requests are answered, by address, origin and token; the headers of every answer."""

import hmac
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

NAMES = ("127.0.0.1", "localhost", "[::1]")  # of this machine, in the addresses of the page
COOKIE = "tcq_token"
PORTS = {"http": ":80", "https": ":443"}  # that browsers leave out
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Guard(NamedTuple):
    """What a request has to agree with."""

    port: int | None  # on this machine only: the port of the page; None: on any address, with a token
    token: str | None
    names: tuple[str, ...] = NAMES
    proxy: str | None = None  # the origin of a proxy that passes requests on, such as "https://a.example"
    path: str = "/"  # of the page at the proxy


def refusal(guard: Guard, host: str, origin: str | None, site: str, token: str) -> tuple[int, str] | None:
    """Status and reason if a request is refused.

    The name of another site may lead here (DNS rebinding).
    `site` is what browsers send as Sec-Fetch-Site: pictures of other sites may be at addresses of this page.
    """
    if site in ("cross-site", "same-site"):
        return 403, "this page is not served to other sites"
    proxy = [] if guard.proxy is None else [guard.proxy]
    if guard.port is not None:
        hosts = [f"{name}:{guard.port}" for name in guard.names] + (list(guard.names) if guard.port == 80 else [])
        origins = [None, *(f"http://{h}" for h in hosts), *proxy]
        if not (host in hosts or is_of_proxy(guard, host)) or origin not in origins:
            only = "this machine" if guard.proxy is None else f"this machine and {guard.proxy}"
            return 403, f"this page is served to {only} only"
    elif origin is not None and origin not in proxy and origin.partition("://")[2] != host:
        return 403, "this page is not served to other sites"
    if guard.token is not None and not hmac.compare_digest(token.encode(), guard.token.encode()):
        return 401, "the token is missing or wrong: use the address that the command has printed"
    return None


def is_of_proxy(guard: Guard, host: str) -> bool:
    """Whether a proxy has passed on its own Host, with or without the port of its scheme."""
    if guard.proxy is None:
        return False
    scheme, _, own = guard.proxy.partition("://")
    return host.lower().removesuffix(PORTS[scheme]) == own


def wrap(app: Any, guard: Guard) -> Any:
    """An ASGI app that refuses requests as `refusal` says, and adds HEADERS to every answer."""
    from starlette.responses import JSONResponse, RedirectResponse

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", []), *extra]}
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        query, site = dict(pairs), headers.get("sec-fetch-site", "") if scope["path"] != "/" else ""
        host = headers.get("host", "")
        refused = refusal(guard, host, headers.get("origin"), site, token_of(headers, query))
        answer: Any = app
        if refused:
            answer = JSONResponse({"error": refused[1]}, status_code=refused[0], headers={"connection": "close"})
        elif "token" in query and scope["path"] == "/" and guard.token:  # keep it out of the address
            rest = urlencode([pair for pair in pairs if pair[0] != "token"])
            answer = RedirectResponse(f"./?{rest}" if rest else "./", status_code=303)  # a proxy may add a path
            by_proxy = is_of_proxy(guard, host)
            place = {"path": guard.path, "secure": str(guard.proxy).startswith("https:")} if by_proxy else {}
            answer.set_cookie(COOKIE, guard.token, httponly=True, samesite="strict", **place)
        await answer(scope, receive, send_with_headers)

    return guarded


def token_of(headers: dict[str, str], query: dict[str, str]) -> str:
    """The token of a request.

    It is in a header "Authorization: Bearer", the cookie of the page, or the address.
    """
    bearer = headers.get("authorization", "")
    if bearer.startswith("Bearer "):
        return bearer.removeprefix("Bearer ")
    cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
    return query.get("token") or cookies.get(COOKIE, "")
