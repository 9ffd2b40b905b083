"""The search page's server in a thread, and requests to it."""

import asyncio
import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request

from tcq import index as indexes
from tcq import web
from tcq.index.serve import app
from tcq.runtime import signals
from tcq.web.guard import Guard


@contextlib.contextmanager
def running(path, *, token=None, k=3, proxy=None):
    """The address of a server of an index."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    guard = Guard(None if token else port, token, proxy=proxy)
    server = web.make_server(app.make(path, indexes.open_index(path), guard, k=k))
    thread = threading.Thread(target=lambda: asyncio.run(web.run(server, listening)))
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
        signals.reset()


def ask(address, path, body=None, headers=None):
    """Status, headers and contents of an answer; JSON is parsed."""
    request = urllib.request.Request(address + path, body, headers or {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        contents = answer.read()
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.status, answer.headers, json.loads(contents) if is_json else contents
