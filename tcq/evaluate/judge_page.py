"""The questions of `tcq judge` on a page: an anchor, and images that may be of its kind.

The judge runs in a thread, and its questions wait for the page. An answer names the number of its question, so that an
old page or a second click answers no other question. The numbers begin at a random one, so that neither does a page of
an earlier process.
"""

import asyncio
import io
import json
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from tcq import web
from tcq.data.source import Source
from tcq.evaluate import judge, kinds
from tcq.runtime import signals
from tcq.web import guard as guards

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("judge.html", "text/html; charset=utf-8"),
    "/judge.css": ("judge.css", "text/css; charset=utf-8"),
    "/judge.js": ("judge.js", "text/javascript; charset=utf-8"),
}
STOPS = 20.0  # seconds after a signal in which the judge may end; exiting meanwhile would abort the process
WAIT = 10.0  # seconds that a request waits for the next question
MAX_BYTES = 1000  # of an answer
ANSWER_SECONDS = 10.0  # in which it arrives
SIDE = 320  # pixels of a small picture, which is enlarged without smoothing
STOP = "stop"  # instead of an answer: no further question

Answer = list[int] | str  # places of the images of the anchor's kind, from 1; or STOP


class Question(NamedTuple):
    """What the page shows: images, or the result at the end."""

    number: int
    so_far: int = 0  # answers
    images: tuple[int, ...] = ()  # positions in the source, the anchor first
    result: str = ""


class Exchange:
    """Passes questions of one thread to the page, and its answers back."""

    def __init__(self) -> None:
        self.question, self.closed = Question(1 + secrets.randbelow(10**8)), False
        self.answer: Answer | None = None
        self.changed = threading.Condition()

    def ask(self, anchor: int, others: list[int], so_far: int) -> list[bool] | None:
        """The answer to a new question; None if there is to be no further one."""
        with self.changed:
            self.question, self.answer = Question(self.question.number + 1, so_far, (anchor, *others)), None
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.answer is not None or self.closed)
            if self.closed or self.answer is None or self.answer == STOP:
                return None
            return [place in self.answer for place in range(1, len(others) + 1)]

    def finish(self, result: str) -> None:
        """Shows the result."""
        with self.changed:
            self.question = Question(self.question.number + 1, result=result)
            self.changed.notify_all()

    def reply(self, number: int, answer: Answer) -> None:
        """Answers the question of this number, if it is still open."""
        with self.changed:
            if number == self.question.number and self.question.images and self.answer is None:
                self.answer = answer
                self.changed.notify_all()

    def after(self, number: int) -> Question:
        """Another question than that of this number, or the same after WAIT seconds."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or (self._shows() and self.question.number != number), WAIT)
            return self.question

    def _shows(self) -> bool:
        return bool(self.question.images or self.question.result)

    def close(self) -> None:
        """Ends all waiting."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


def run(
    judge_by: Callable[[judge.Ask], kinds.Judgement], source: Source, *, host: str, port: int, proxy: str | None = None
) -> kinds.Judgement:
    """What `judge_by` returns, whose questions a person answers on the page.

    Raises PageError if the address cannot be used, what `judge_by` raises, and Stopped after a signal.
    """
    exchange, ends = Exchange(), list[Any]()
    with web.listening(host, port) as bound:
        guard, address = web.guard_of(host, bound, proxy)
        server = web.make_server(make(exchange, source, guard, lambda: setattr(server, "should_exit", True)))

        def work() -> None:
            try:
                ends.append(judge_by(exchange.ask))
                exchange.finish(judge.text(ends[0]))
            except BaseException as error:
                ends.append(error)
                server.should_exit = True

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        asyncio.run(web.run(server, bound, f"questions at {address} (Ctrl-C stops; answers are kept)"))
    exchange.close()
    thread.join(STOPS if signals.requested() else None)
    signals.check()
    if isinstance(ends[0], BaseException):
        raise ends[0]
    return ends[0]


def make(exchange: Exchange, source: Source, guard: guards.Guard, finished: Callable[[], None]) -> Any:
    """The ASGI app; it calls `finished` after it has sent the result."""
    pictures = source.images if source.pictures is None else source.pictures

    async def state(number: int) -> Response:
        question = await anyio.to_thread.run_sync(exchange.after, number, abandon_on_cancel=True)
        names = [_text(source.names[i]) for i in question.images]
        content = {"number": question.number, "so_far": question.so_far, "result": question.result, "names": names}
        background = BackgroundTask(finished) if question.result else None
        return JSONResponse(content, headers={"cache-control": "no-store"}, background=background)

    async def question(request: Request) -> Response:
        return await state(_number(request.query_params.get("after", "0")))

    async def answer(request: Request) -> Response:
        number, given = _number(request.path_params["number"]), await _answer(request)
        exchange.reply(number, given)
        return await state(number)

    async def picture(request: Request) -> Response:
        now, place = exchange.question, _number(request.path_params["place"])
        if _number(request.path_params["number"]) != now.number or place >= len(now.images):
            raise HTTPException(404, "this question is over")
        png = await anyio.to_thread.run_sync(_png, pictures, now.images[place])
        return Response(png, media_type="image/png", headers={"cache-control": "no-store"})

    routes = [Route(path, _file) for path in FILES]
    routes += [
        Route("/api/question", question),
        Route("/api/answers/{number}", answer, methods=["POST"]),
        Route("/api/pictures/{number}/{place}", picture),
    ]
    handlers: Any = {HTTPException: _error}
    return guards.wrap(Starlette(routes=routes, exception_handlers=handlers), guard)


async def _error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": str(error.detail)}, status_code=error.status_code, headers=error.headers)


async def _file(request: Request) -> Response:
    name, kind = FILES[request.url.path]
    return FileResponse(PAGE / name, headers={"content-type": kind, "cache-control": "no-cache"})


async def _answer(request: Request) -> Answer:
    body = b""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BYTES:
                    raise HTTPException(413, "an answer is short", {"connection": "close"})
    except TimeoutError:
        raise HTTPException(408, "the answer did not arrive in time", {"connection": "close"}) from None
    try:
        answer = json.loads(body)["answer"]
    except (ValueError, KeyError, TypeError, RecursionError):
        answer = None
    places = range(1, kinds.NEIGHBOURS + 1)
    if answer != STOP and not (isinstance(answer, list) and all(type(p) is int and p in places for p in answer)):
        raise HTTPException(400, f'an answer is {{"answer": "{STOP}"}} or a list of numbers from 1 to {places[-1]}')
    return answer


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise HTTPException(400, f"{text[:40]!r} must be the number of a question")
    return int(text)


def _png(pictures: Any, place: int) -> bytes:
    pixels = np.asarray(pictures[place])
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    scale = SIDE // max(image.size)
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _text(name: str) -> str:
    return name.encode("utf-8", "replace").decode()
