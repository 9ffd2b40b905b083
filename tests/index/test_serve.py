"""The search page's server: real requests on the loopback interface."""

import http.client
import io
import json
import os
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request

import jsonschema
import numpy as np
import pytest
from PIL import Image

import small
from serving import ask, running
from tcq import index as indexes
from tcq import web
from tcq.data.images import ImageError
from tcq.index.serve import app, searches
from tcq.web.guard import Guard

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def address(index):
    with running(index) as found:
        yield found


def found(address, path, body=None):
    status, _, answer = ask(address, path, body)
    assert status == 200, answer
    return answer


@pytest.fixture
def body(images):
    return (images / "class 3" / "003.png").read_bytes()


def test_the_files_of_the_page(address):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        status, headers, contents = ask(address, path)
        assert status == 200 and headers["content-type"].startswith(kind) and contents
        assert (
            headers["x-content-type-options"] == "nosniff"
            and "default-src 'none'" in headers["content-security-policy"]
        )
        assert b"http://" not in contents and b"https://" not in contents  # nothing from outside
    assert found(address, "/healthz") == {"status": "ok"}


def test_searches_are_those_of_the_index(address, index, images, body):
    opened = indexes.open_index(index)
    query = indexes.read_queries(opened, [images / "class 3" / "003.png"])
    truth = indexes.search(opened, query, k=120)[0]
    answer = found(address, "/api/search", body)
    assert [h["id"] for h in answer["hits"]] == [h.id for h in truth[:3]] and answer["more"]
    assert [h["path"] for h in answer["hits"]] == [h.path for h in truth[:3]]
    np.testing.assert_allclose([h["score"] for h in answer["hits"]], [h.score for h in truth[:3]], atol=1e-4)
    again = found(address, f"/api/search?features={answer['features']}&k=120")
    np.testing.assert_allclose([h["score"] for h in again["hits"]], [h.score for h in truth], atol=1e-4)
    assert not again["more"]
    pages = [found(address, f"/api/search?features={answer['features']}&k=50&offset={o}") for o in (0, 50, 100)]
    assert [h for page in pages for h in page["hits"]] == again["hits"]
    assert [page["more"] for page in pages] == [True, True, False]
    some = found(address, f"/api/search?features={answer['features']}&k=120&path=CLASS%205")["hits"]
    assert some == [h for h in again["hits"] if "class 5" in h["path"]] != []
    least = again["hits"][7]["score"]
    some = found(address, f"/api/search?features={answer['features']}&k=120&min_score={least}")["hits"]
    assert some == [h for h in again["hits"] if h["score"] >= least]


def test_an_item_is_a_query(address, index):
    opened = indexes.open_index(index)
    features = indexes.features_of_items(opened, [17])
    scores, places = indexes.search_features(opened, features, k=5)
    answer = found(address, f"/api/search?item={opened.ids[17]}&k=5")
    assert [h["id"] for h in answer["hits"]] == opened.ids[places[0]].tolist()
    np.testing.assert_allclose([h["score"] for h in answer["hits"]], scores[0], atol=1e-4)
    item = found(address, f"/api/items/{opened.ids[17]}")
    assert item["path"] == opened.paths[17] and item["code"] == opened.codes[17].tolist()
    assert item["hash"] == opened.hashes[17].tobytes().hex() and item["size"] == os.path.getsize(item["path"])


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/api/search", 400, "GET needs item or features"),
        ("/api/search?item=x", 400, "item 'x' must be a whole number"),
        ("/api/search?item=99999", 404, "no image of the index has the id 99999"),
        ("/api/search?features=AAAA", 400, "features must be 8 finite numbers"),
        ("/api/search?features=AADAfwAAwH8AAMB_AADAfwAAwH8AAMB_AADAfwAAwH8", 400, "finite"),
        ("/api/search?features=é", 400, "features must be"),
        ("/api/search?item=1&k=0", 400, "k '0' must be a whole number from 1"),
        ("/api/search?item=1&k=1001", 400, "to 1000"),
        ("/api/search?item=1&offset=-1", 400, "offset"),
        ("/api/search?item=1&min_score=high", 400, "must be a number"),
        ("/api/search?item=1&filter=year>2000", 400, "'filter' must be one of item, features, k"),
        ("/api/items/99999", 404, "no image"),
        ("/api/items/" + "9" * 5000, 404, "no image"),
        ("/api/items/x", 404, "no image"),
        ("/api/thumbnails/" + "9" * 30, 404, "no image"),
        ("/api/items/../../etc/passwd", 404, "Not Found"),
        ("/api/thumbnails/99999", 404, "no image"),
        ("/api/thumbnails/1?side=5000", 400, "side"),
        ("/etc/passwd", 404, "Not Found"),
        ("//etc/passwd", 404, "Not Found"),
    ],
)
def test_refusals_are_words(address, path, status, words):
    got, _, answer = ask(address, urllib.parse.quote(path, safe="/?=&._-%"))
    assert got == status and words in answer["error"]


def test_bodies_that_are_no_images(address, monkeypatch, body):
    for contents, words in ((b"hello", "query:"), (b"", "the file is empty"), (body[:60], "query:")):
        status, _, answer = ask(address, "/api/search", contents)
        assert status == 400 and words in answer["error"]
    assert ask(address, "/api/search?item=1", body)[0] == 400
    assert ask(address, "/api/info", body)[0] == 405
    monkeypatch.setattr(app, "MAX_BYTES", len(body) - 1)
    assert ask(address, "/api/search", body)[0] == 413
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    connection.request("POST", "/api/search", iter([body[:50], body[50:], body]), encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    connection.putrequest("POST", "/api/search")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()  # nothing of the body is sent: its declared size alone is refused
    assert connection.getresponse().status == 413
    connection.close()
    monkeypatch.setattr(app, "MAX_BYTES", len(body))
    assert ask(address, "/api/search", body)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [{"Host": "attacker.example"}, {"Origin": "https://attacker.example"}, {"Host": "127.0.0.1"}, {"Origin": "null"}],
)
def test_other_sites_are_refused(address, headers, body):
    for path, data in (("/", None), ("/api/search", body), ("/api/thumbnails/1", None)):
        status, got, answer = ask(address, path, data, headers)
        assert status == 403 and "this machine only" in answer["error"] and got["x-content-type-options"]
    local = address.replace("127.0.0.1", "localhost")
    own = {"Origin": local, "Host": local.removeprefix("http://")}
    assert ask(address, "/api/search", body, own)[0] == 200


def test_beyond_this_machine_a_token_is_needed(index, body):
    assert not web.is_loopback("0.0.0.0") and not web.is_loopback("example.org") and not web.is_loopback("::")
    assert web.is_loopback("127.0.0.1") and web.is_loopback("localhost") and web.is_loopback("::1")
    with running(index, token="secret") as address:
        for path in ("/", "/api/info", "/page.js", "/?token=wrong", "/healthz"):
            assert ask(address, path)[0] == 401
        assert ask(address, "/api/info", None, {"Authorization": "Bearer secret"})[0] == 200
        assert ask(address, "/api/info", None, {"Authorization": "Bearer secret", "Origin": "http://evil"})[0] == 403
        assert ask(address, "/api/info", None, {"Host": "any.name", "Cookie": "tcq_token=secret"})[0] == 200
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        connection.request("GET", "/?token=secret&item=3")
        answer = connection.getresponse()
        assert answer.status == 303 and answer.headers["location"] == "./?item=3"
        assert "httponly" in answer.headers["set-cookie"].lower() and "SameSite=strict" in answer.headers["set-cookie"]
        connection.close()


@pytest.mark.parametrize("token", [None, "secret"])
def test_a_proxy_may_pass_requests_on(index, body, token):
    """One passes `Host` on, another sets its own."""
    headers = {"Authorization": "Bearer secret"} if token else {}
    with running(index, token=token, proxy="https://photos.example") as address:
        for host in ("photos.example", "Photos.example:443", address.removeprefix("http://")):
            for origin in ({}, {"Origin": "https://photos.example"}, {"Origin": f"http://{host}"}):
                status = ask(address, "/api/search", body, headers | {"Host": host} | origin)[0]
                plain = origin.get("Origin", "").lower().startswith("http://photos.example")
                assert status == (403 if plain and not token else 200)
            for other in ("https://attacker.example", "https://photos.example.attacker.example", "null"):
                assert ask(address, "/api/search", body, headers | {"Host": host, "Origin": other})[0] == 403
        if token:
            assert ask(address, "/api/info", None, {"Host": "photos.example"})[0] == 401
            connection = http.client.HTTPConnection(address.removeprefix("http://"))
            connection.request("GET", "/?token=secret", headers={"Host": "photos.example"})
            answer = connection.getresponse()
            assert answer.headers["location"] == "./" and "Secure" in answer.headers["set-cookie"]
            connection.close()
        else:
            status, _, answer = ask(address, "/api/info", None, {"Host": "attacker.example"})
            assert status == 403 and "to this machine and https://photos.example only" in answer["error"]


def test_the_address_of_a_proxy():
    with web.listening("127.0.0.1", 0) as bound:
        for given, origin, shown in (
            ("https://Photos.example:443/search/", "https://photos.example", "https://photos.example/search/"),
            ("http://photos.example:8080", "http://photos.example:8080", "http://photos.example:8080/"),
            ("https://fotos.müller.example:0443", "https://fotos.xn--mller-kva.example", ""),
            ("http://[::1]:80/a", "http://[::1]", "http://[::1]/a/"),
        ):
            guard, address = web.guard_of("127.0.0.1", bound, given)
            assert guard.proxy == origin and address == (shown or f"{origin}/") and guard.token is None
        for wrong in (
            "photos.example",
            "ftp://a",
            "https://",
            "https://:443",
            "https://[::1",
            "https://a:b",
            "https://a b.example",
            "https://a/?b",
            "https://a/#b",
            "https://u@a",
        ):
            with pytest.raises(web.PageError, match="must be an address such as"):
                web.guard_of("127.0.0.1", bound, wrong)


def test_thumbnails_are_encoded_anew(run, images, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    secret = Image.Exif()
    secret[0x010E] = "secret place"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (300, 500, 3), np.uint8)).save(
        folder / "a.jpg", exif=secret
    )
    shutil.copy(images / "class 3" / "003.png", folder / "b.png")
    indexes.build(run, folder, tmp_path / "index")
    with running(tmp_path / "index") as address:
        _, headers, contents = ask(address, "/api/thumbnails/0?side=200")
        picture = Image.open(io.BytesIO(contents))
        assert picture.format == "JPEG" and picture.size == (320, 320) and b"secret" not in contents
        assert headers["content-type"] == "image/jpeg"
        assert ask(address, "/api/thumbnails/0?side=320", None, {"If-None-Match": headers["etag"]})[0] == 304
        (folder / "b.png").unlink()
        status, _, answer = ask(address, "/api/thumbnails/1")
        assert status == 404 and "cannot be read any more" in answer["error"]
        assert str(tmp_path) not in json.dumps(answer)


def test_thumbnails_in_memory_are_bounded(address, index, monkeypatch):
    """None is kept above the limit. The index says how large an image may be."""
    jpeg, encoded = app._jpeg, []
    monkeypatch.setattr(app, "_jpeg", lambda path, side, most: encoded.append(most) or jpeg(path, side, most))
    for i in (1, 2, 2):
        assert ask(address, f"/api/thumbnails/{i}?side=1280")[0] == 200
    opened = indexes.open_index(index)
    assert encoded == 2 * [opened.config.data.max_pixels]
    with pytest.raises(ImageError, match="above data.max_pixels 98"):
        jpeg(opened.paths[1], 320, 98)
    monkeypatch.setattr(app, "CACHED", 100)
    for i in (1, 2, 1):
        assert ask(address, f"/api/thumbnails/{i}?side=320")[0] == 200
    assert len(encoded) == 2 + 3


def test_near_copies_are_hidden(run, images, tmp_path):
    folder = shutil.copytree(images / "class 3", tmp_path / "photos")
    for i in range(4):
        shutil.copy(folder / "003.png", folder / f"copy {i}.png")
    with Image.open(folder / "003.png") as image:
        image.resize((40, 32)).save(folder / "larger.png")
    indexes.build(run, folder, tmp_path / "index")
    body = (folder / "003.png").read_bytes()
    copies = {f"copy {i}.png" for i in range(4)} | {"larger.png", "003.png"}
    with running(tmp_path / "index") as address:
        whole = found(address, "/api/search?k=100", body)["hits"]
        some = found(address, "/api/search?k=100&hide_copies=1", body)
        names = [os.path.basename(h["path"]) for h in some["hits"]]
        assert len(copies & set(names)) == 1 and some["hidden"] == len(whole) - len(names) >= 5
        first = found(address, "/api/search?k=4&hide_copies=1", body)
        assert first["hits"] == some["hits"][:4] and first["more"]
        second = found(address, f"/api/search?k=4&offset=4&hide_copies=1&features={first['features']}")
        assert second["hits"] == some["hits"][4:8]


def test_queries_that_come_together_have_the_answers_of_each(address, images, monkeypatch):
    bodies = [p.read_bytes() for p in sorted((images / "class 4").glob("0*.png"))] * 2
    alone = [found(address, "/api/search?k=9", body)["hits"] for body in bodies]
    sizes, encode = [], searches.encode_padded
    monkeypatch.setattr(searches, "encode_padded", lambda index, x: sizes.append(len(x)) or encode(index, x))
    together = [None] * len(bodies)

    def one(i):
        together[i] = found(address, "/api/search?k=9", bodies[i])["hits"]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert [h["id"] for h in a] == [h["id"] for h in b]
        np.testing.assert_allclose([h["score"] for h in a], [h["score"] for h in b], atol=1e-4)
    assert sum(sizes) == len(bodies) and max(sizes) > 1


def test_too_many_searches_are_refused(index, body, monkeypatch):
    monkeypatch.setattr(searches, "WAITING", 2)
    monkeypatch.setattr(searches, "TOGETHER", 1)
    answer, started, release = searches.Searcher._answer, threading.Event(), threading.Event()

    def held(self, queries):
        started.set()
        return release.wait(30) and answer(self, queries)

    monkeypatch.setattr(searches.Searcher, "_answer", held)
    with running(index) as address:
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(ask(address, "/api/search?item=3"))) for _ in range(6)
        ]
        threads[0].start()
        assert started.wait(20)  # one is answered, so two may wait
        for thread in threads[1:]:
            thread.start()
        end = time.monotonic() + 20
        while len(results) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert [status for status, _, _ in results] == [503] * 3
        assert results[0][1]["retry-after"] == "1" and "try again" in results[0][2]["error"]
        release.set()
        for thread in threads:
            thread.join()
        assert sorted(status for status, _, _ in results) == [200] * 3 + [503] * 3


@pytest.mark.parametrize(("name", "limit"), [("UPLOADS", 1), ("UPLOAD_BYTES", 500)])
def test_images_that_arrive_at_once_are_bounded(address, body, monkeypatch, name, limit):
    monkeypatch.setattr(app, name, limit)
    assert len(body) < 500 < 2 * len(body)
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /api/search HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(head + body[:10])
        wait(lambda: ask(address, "/api/search", body)[0] == 503)
        client.sendall(body[10:])
        assert b" 200 " in client.recv(20)
    wait(lambda: ask(address, "/api/search", body)[0] == 200)


def test_slow_and_silent_clients_are_cut_off(index, body, monkeypatch):
    monkeypatch.setattr(app, "UPLOAD_SECONDS", 0.5)
    monkeypatch.setattr(web, "HEADER_SECONDS", 0.5)
    with running(index) as address:
        host, port = address.removeprefix("http://").split(":")
        head = f"POST /api/search HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        for sent, words in ((head + body[:10], b"408"), (b"", b""), (b"POST /api/sea", b"")):
            with socket.create_connection((host, int(port)), timeout=20) as client:
                client.sendall(sent)
                answer = client.recv(10_000)
                assert words in answer and bool(answer) == bool(words)
        assert ask(address, "/api/search", body)[0] == 200


def test_an_index_that_changes_is_opened_again(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(searches, "RELOAD_SECONDS", 0.05)
    folder = shutil.copytree(images / "class 3", tmp_path / "photos")
    indexes.build(run, folder, tmp_path / "index")
    with running(tmp_path / "index") as address:
        count = found(address, "/api/info")["images"]
        indexes.add(tmp_path / "index", images / "class 4")
        wait(lambda: found(address, "/api/info")["images"] > count)
        items = next(p for p in (tmp_path / "index").glob("items-*"))
        items.write_bytes(items.read_bytes()[:-1] + b"x")
        (tmp_path / "index" / "meta.json").write_bytes((tmp_path / "index" / "meta.json").read_bytes() + b"\n")
        wait(lambda: ask(address, "/healthz")[0] == 503)
        assert "corrupted" in ask(address, "/healthz")[2]["error"]


def wait(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_port_in_use(address, index):
    done = small.main("serve", f"--index={index}", f"--port={address.rsplit(':')[-1]}")
    small.assert_refused(done, "Address already in use")
    small.assert_refused(small.main("serve", f"--index={index}", "--port=99999"), "from 0 to 65535")


def test_the_description_of_the_api(address, index, body):
    description = found(address, "/api/openapi.json")
    routes = set(description["paths"])
    own = app.make(index, indexes.open_index(index), Guard(1, None), k=3)
    inner = next(c.cell_contents for c in own.__closure__ if isinstance(c.cell_contents, app.Starlette))
    known = {route.path.replace(":int", "") for route in inner.routes}
    assert routes == known - {"/", "/page.css", "/page.js"}
    features = found(address, "/api/search", body)["features"]
    for path, route, method, data in (
        ("/healthz", "/healthz", "get", None),
        ("/api/info", "/api/info", "get", None),
        ("/api/search", "/api/search", "post", body),
        ("/api/search?item=1&hide_copies=1", "/api/search", "get", None),
        (f"/api/search?features={features}", "/api/search", "get", None),
        ("/api/search?item=99999", "/api/search", "get", None),
        ("/api/items/3", "/api/items/{id}", "get", None),
        ("/api/items/99999", "/api/items/{id}", "get", None),
    ):
        status, _, answer = ask(address, path, data)
        content = description["paths"][route][method]["responses"][str(status)]["content"]
        schema = content["application/json"]["schema"] | {"components": description["components"]}
        jsonschema.validate(answer, schema)


def test_an_own_column_that_is_not_finite_is_null(run, images, tmp_path):
    folder = shutil.copytree(images / "class 3", tmp_path / "photos")
    (tmp_path / "own.csv").write_text("path,weight,day\n003.png,inf,2020-01-02\n013.png,nan,\n")
    indexes.build(run, folder, tmp_path / "index", own_columns=tmp_path / "own.csv")
    with running(tmp_path / "index") as address:
        hits = found(address, "/api/search?item=0&k=100")["hits"]
        own = {os.path.basename(h["path"]): h["columns"] for h in hits}
        assert own["003.png"] == {"weight": None, "day": "2020-01-02"}
        assert own["013.png"] == {"weight": None, "day": None}
        assert found(address, "/api/items/0")["columns"] == own["003.png"]


def test_a_bad_query_fails_alone(index, monkeypatch):
    monkeypatch.setattr(app, "LARGEST", np.inf)  # which refuses it earlier
    searcher = searches.Searcher(index, indexes.open_index(index))
    huge = np.full(8, 3e38, np.float32)
    queries = [
        searches.Query(item=3),
        searches.Query(features=huge),
        searches.Query(item=10**9),
        searches.Query(item=4),
    ]
    queries.append(searches.Query(features=np.zeros(5, np.float32)))
    with np.errstate(all="ignore"):
        answers = searcher._answer(queries)
    assert [isinstance(a, Exception) for a in answers] == [False, True, True, False, True]
    assert answers[2].status == 404 and answers[4].status == 400
    monkeypatch.undo()
    with running(index) as address:
        import base64

        text = base64.urlsafe_b64encode(huge.tobytes()).decode().rstrip("=")
        assert ask(address, f"/api/search?features={text}")[0] == 400


def test_an_id_is_resolved_in_the_index_that_answers(run, images, tmp_path):
    folder = shutil.copytree(images / "class 3", tmp_path / "photos")
    indexes.build(run, folder, tmp_path / "index")
    before = indexes.open_index(tmp_path / "index")
    searcher = searches.Searcher(tmp_path / "index", before)
    query, wanted = searches.Query(item=5), indexes.features_of_items(before, [5])[0]
    indexes.remove(tmp_path / "index", [before.paths[0], before.paths[2]])
    searcher.opened = searcher._open_again()
    (answer,) = searcher._answer([query])
    np.testing.assert_array_equal(answer.features, wanted)


def test_an_index_that_changed_before_the_server_started_is_opened_again(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(searches, "RELOAD_SECONDS", 0.05)
    indexes.build(run, images / "class 3", tmp_path / "index")
    old, real = indexes.open_index(tmp_path / "index"), indexes.open_index
    indexes.add(tmp_path / "index", images / "class 4")
    monkeypatch.setattr(indexes, "open_index", lambda path: old)  # as it was opened just before the change
    with running(tmp_path / "index") as address:
        wait(lambda: found(address, "/api/info")["images"] == len(real(tmp_path / "index").paths) > len(old.paths))


def test_pictures_that_cannot_be_encoded_fail_alone(index, monkeypatch):
    searcher = searches.Searcher(index, indexes.open_index(index))
    wrong = [searches.Query(picture=np.zeros((5, 5, 3), np.uint8)) for _ in range(2)]
    answers = searcher._answer([wrong[0], searches.Query(item=3), wrong[1]])
    assert [isinstance(a, Exception) for a in answers] == [True, False, True]
    monkeypatch.setattr(app, "_takes_images", lambda index: False)
    with running(index) as address:
        status, _, answer = ask(address, "/api/search", b"x")
        assert status == 400 and "takes embeddings, not images" in answer["error"]


def test_health_recovers(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(searches, "RELOAD_SECONDS", 0.05)
    indexes.build(run, images / "class 3", tmp_path / "index")
    with running(tmp_path / "index") as address:
        wait(lambda: ask(address, "/healthz")[0] == 200)
        (tmp_path / "index").rename(tmp_path / "away")
        wait(lambda: ask(address, "/healthz")[0] == 503)
        (tmp_path / "away").rename(tmp_path / "index")
        wait(lambda: ask(address, "/healthz")[0] == 200)


def test_limits_cannot_be_passed_by_long_numbers(address):
    for text in ("00000000000000000001000000", "1" * 5000):
        assert ask(address, f"/api/search?item=1&k={text}")[0] == 400


def test_pictures_of_other_sites_do_not_search(address):
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        assert ask(address, "/api/search?item=1", None, {"Sec-Fetch-Site": site})[0] == status
    assert ask(address, "/?item=1", None, {"Sec-Fetch-Site": "cross-site"})[0] == 200  # a link from elsewhere


def test_a_cookie_beside_others_and_a_link_with_several_items(index):
    with running(index, token="secret") as address:
        cookies = 'a={"x": 1}; tcq_token=secret; b=2'
        assert ask(address, "/api/info", None, {"Cookie": cookies})[0] == 200
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        connection.request("GET", "/?item=1&token=secret&item=2")
        assert connection.getresponse().headers["location"] == "./?item=1&item=2"
        connection.close()
