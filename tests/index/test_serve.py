import json
import threading
import urllib.error
import urllib.request

import pytest

import small
from tcq.index import serve


@pytest.fixture(scope="module")
def address(index):
    server = serve.make_server(index, port=0, k=3)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_page_and_search(address, images):
    with urllib.request.urlopen(address) as answer:
        page = answer.read().decode()
    assert "120 images, 6 bits each" in page and '<input type="file"' in page and "${hit.path}" in page
    body = (images / "class 3" / "003.png").read_bytes()
    with urllib.request.urlopen(urllib.request.Request(f"{address}/search", body)) as answer:
        hits = json.load(answer)["hits"]
    assert len(hits) == 3 and all(h["image"].startswith("data:image/jpeg;base64,") for h in hits)


@pytest.mark.parametrize(
    "headers",
    [{"Host": "attacker.example"}, {"Origin": "https://attacker.example"}, {"Host": "127.0.0.1"}, {"Origin": "null"}],
)
def test_other_sites_are_refused(address, headers, images):
    body = (images / "class 3" / "003.png").read_bytes()
    for path, data in (("/", None), ("/search", body)):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(address + path, data, headers))
        assert error.value.code == 403
        error.value.close()
    local = address.replace("127.0.0.1", "localhost")
    own = urllib.request.Request(address + "/search", body, {"Origin": local, "Host": local.removeprefix("http://")})
    with urllib.request.urlopen(own) as answer:
        assert len(json.load(answer)["hits"]) == 3


def test_a_port_in_use(address, index):
    done = small.main("serve", f"--index={index}", f"--port={address.rsplit(':')[-1]}")
    small.assert_refused(done, "Address already in use")
    small.assert_refused(small.main("serve", f"--index={index}", "--port=99999"), "from 0 to 65535")


def test_other_bodies_and_paths(address):
    for path, body in (("/search", b"hello"), ("/search", b""), ("/other", b"x"), ("/etc/passwd", None)):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(address + path, body))
        assert error.value.code in (400, 404)
        assert json.load(error.value)["error"]
        error.value.close()
