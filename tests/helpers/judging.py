"""The page of `tcq judge` in a thread."""

import contextlib
import socket
import threading
import time
import urllib.error

from serving import ask
from tcq.evaluate import judge_page
from tcq.runtime import signals


@contextlib.contextmanager
def judging(judge_by, source, *, ends_itself=True):
    """The address of the page, and a list that gets the judgement or the error at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ends = []

    def work():
        try:
            ends.append(judge_page.run(judge_by, source, host="127.0.0.1", port=port))
        except BaseException as error:
            ends.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 20
        while not ends and time.monotonic() < end:
            with contextlib.suppress(urllib.error.URLError):
                ask(address, "/judge.css")
                break
            time.sleep(0.05)
        yield address, ends
        if ends_itself:
            thread.join(30)
    finally:
        if thread.is_alive():
            signals.request("SIGINT")
        thread.join(30)
        signals.reset()
        assert not thread.is_alive()
