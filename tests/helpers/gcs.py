"""An emulator of Google Cloud Storage: gcp-storage-emulator, with what TensorStore and gcsfs need beyond it.

python tests/helpers/gcs.py prints its port, and serves gs://bucket from memory until standard input ends.
"""

import os
import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

LOCK = threading.Lock()
MOVE = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/(?P<dest_object_id>.*[^/]+)$"


def with_generations(handler):
    """Preconditions on the generation of an object, and its number in the header of a download."""

    def handle(request, response, storage, *rest):
        name = request.params.get("object_id") or request.query.get("name", [""])[0]
        with LOCK:
            try:
                generation = storage.get_file_obj(request.params.get("bucket_name", ""), name)["generation"]
            except NotFound:
                generation = "0"
            if request.query.get("ifGenerationMatch", [generation]) != [generation]:
                assert request.data is not None or request.method == "GET"  # reads it
                response.status = HTTPStatus.PRECONDITION_FAILED
            elif request.query.get("ifGenerationNotMatch") == [generation]:
                response.status = HTTPStatus.NOT_MODIFIED
            else:
                handler(request, response, storage, *rest)
                if generation != "0" and request.method == "GET":
                    response["x-goog-generation"] = generation

    return handle


def move(request, response, storage, *rest):
    """Without it gcsfs retries for half a minute before it copies and deletes."""
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.copy(request, response, storage, *rest)
    if response.status == HTTPStatus.OK:
        storage.delete_file(request.params["bucket_name"], request.params["object_id"])


def main():
    emulator.server.HTTPServer = emulator.server.ThreadingHTTPServer  # clients open many connections at once
    emulator.server.HTTPServer.request_queue_size = 1000
    emulator.HANDLERS = ((MOVE, {"POST": move}), *emulator.HANDLERS)
    for _, handlers in emulator.HANDLERS:
        handlers.update({method: with_generations(handler) for method, handler in handlers.items()})
    server = emulator.create_server("localhost", 0, in_memory=True, default_bucket="bucket")
    server.start()
    print(server._api._httpd.server_address[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
