"""A stand-in for Google Cloud Storage: gcp-storage-emulator, with what TensorStore and gcsfs need beyond it.

python tests/gcs.py prints its port, and serves gs://bucket from memory until standard input ends.
"""

import os
import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound

LOCK = threading.Lock()


def with_generations(handler):
    """Preconditions on the generation of an object, and its number in the header of a download."""

    def handle(request, response, storage, *rest):
        name = request.params.get("object_id") or request.query.get("name", [""])[0]
        with LOCK:
            try:
                now = storage.get_file_obj(request.params.get("bucket_name", ""), name)["generation"]
            except NotFound:
                now = "0"
            if request.query.get("ifGenerationMatch", [now]) != [now]:
                assert request.data is not None or request.method == "GET"  # reads it
                response.status = HTTPStatus.PRECONDITION_FAILED
            elif request.query.get("ifGenerationNotMatch") == [now]:
                response.status = HTTPStatus.NOT_MODIFIED
            else:
                handler(request, response, storage, *rest)
                if now != "0" and request.method == "GET":
                    response["x-goog-generation"] = now

    return handle


def main():
    emulator.server.HTTPServer = emulator.server.ThreadingHTTPServer  # clients open many connections at once
    emulator.server.HTTPServer.request_queue_size = 1000
    for _, handlers in emulator.HANDLERS:
        handlers.update({method: with_generations(handler) for method, handler in handlers.items()})
    server = emulator.create_server("localhost", 0, in_memory=True, default_bucket="bucket")
    server.start()
    print(server._api._httpd.server_address[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
