"""PostgreSQL without extensions: a code is a bytea, and a query M arrays.

A score is the sum of the entries of the code. The table has a column for each own column, so that other tables can be
joined and conditions are plain SQL.
"""

import json
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tcq.index.contents import Index
from tcq.index.engines import common
from tcq.index.engines.common import EngineError, Item, Pushed
from tcq.index.search import Hit

TABLE = "tcq"  # unless the address ends with "#table"
STORED = {
    "id": "bigint PRIMARY KEY",
    "path": "text",
    "hash": "text",
    "size": "bigint",
    "modified": "timestamptz",
    "code": "bytea",
    "norm": "real",
    "tcq_version": "text",
}


class Connection(NamedTuple):
    """A table of a database."""

    client: Any  # psycopg.Connection
    table: str
    address: str


def connect(address: str) -> Connection:
    """Opens "postgresql://user@host/database#table", by default the table "tcq".

    Raises EngineError.
    """
    try:
        import psycopg
    except ImportError:
        raise EngineError("PostgreSQL needs its client: pip install 'psycopg[binary]'") from None
    url, _, table = address.partition("#")
    try:
        client = psycopg.connect(url, autocommit=True)
    except psycopg.Error as error:
        raise EngineError(f"{_shown(url)} cannot be opened: {str(error).strip()}") from None
    return Connection(client, table or TABLE, f"{_shown(url)}#{table or TABLE}")


def _shown(url: str) -> str:
    """The address without a password."""
    start, at, rest = url.rpartition("@")
    scheme, _, user = start.partition("://")
    return f"{scheme}://{user.partition(':')[0]}@{rest}" if at else url


def push(connection: Connection, index: Index) -> Pushed:
    """Makes the table equal to the index, in one transaction.

    Raises EngineError if it holds codes of another model.
    """
    import psycopg
    from psycopg import sql

    client, table = connection.client, sql.Identifier(connection.table)
    types = {name: _type(kind) for name, kind in common.own_types(index).items()}
    try:
        with client.transaction(), client.cursor() as cursor:
            _create(cursor, connection, index)
            for name, kind in types.items():
                column = sql.SQL("ALTER TABLE {} ADD COLUMN IF NOT EXISTS {} " + kind)
                cursor.execute(column.format(table, sql.Identifier(name)))
            cursor.execute(sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(table))
            cursor.execute(sql.SQL("SELECT id, tcq_version FROM {}").format(table))
            versions = dict(cursor.fetchall())
            written = [item for item in common.items(index) if versions.pop(item.id, None) != item.version]
            delete = sql.SQL("DELETE FROM {} WHERE id = ANY(%s)").format(table)
            cursor.execute(delete, ([*versions, *(item.id for item in written)],))
            names = [*STORED, *types]
            copy = sql.SQL("COPY {} ({}) FROM STDIN").format(table, sql.SQL(", ").join(map(sql.Identifier, names)))
            with cursor.copy(copy) as rows:
                for item in written:
                    rows.write_row(_row(item, index, types))
    except psycopg.Error as error:
        raise EngineError(f"{connection.address} cannot be written: {str(error).strip()}") from None
    return Pushed(len(written), len(versions))


def _create(cursor: Any, connection: Connection, index: Index) -> None:
    """Creates the table, with what must agree as its comment, unless it exists."""
    from psycopg import sql

    table = sql.Identifier(connection.table)
    cursor.execute("SELECT to_regclass(%s)", (sql.Identifier(connection.table).as_string(None),))
    if cursor.fetchone()[0] is None:
        columns = ", ".join(f"{name} {kind}" for name, kind in STORED.items())
        cursor.execute(sql.SQL("CREATE TABLE {} (" + columns + ")").format(table))
        text = sql.Literal("tcq " + json.dumps(common.about(index)))
        cursor.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(table, text))
    common.require_same(connection.address, _about(cursor, connection), index)


def _about(cursor: Any, connection: Connection) -> dict[str, Any] | None:
    from psycopg import sql

    name = sql.Identifier(connection.table).as_string(None)
    cursor.execute("SELECT obj_description(to_regclass(%s))", (name,))
    text = cursor.fetchone()[0] or ""
    about: dict[str, Any] | None = json.loads(text.removeprefix("tcq ")) if text.startswith("tcq {") else None
    return about


def _type(kind: pa.DataType) -> str:
    """The column type for an own column; jsonb if it is no number, text, date or truth value."""
    tests = (
        (pa.types.is_integer, "bigint"),
        (pa.types.is_floating, "double precision"),
        (pa.types.is_boolean, "boolean"),
        (lambda t: pa.types.is_timestamp(t) and t.tz is not None, "timestamptz"),
        (pa.types.is_timestamp, "timestamp"),
        (pa.types.is_date, "date"),
        (lambda t: pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_null(t), "text"),
    )
    return next((name for fits, name in tests if fits(kind)), "jsonb")


def _row(item: Item, index: Index, types: dict[str, str]) -> list[Any]:
    wide = index.config.quantizer.num_codewords > 256
    code = item.code.astype("<u2" if wide else np.uint8).tobytes()
    v = item.values
    own = [json.dumps(v[n], default=str) if t == "jsonb" and v[n] is not None else v[n] for n, t in types.items()]
    return [item.id, v["path"], v["hash"], v["size"], v["modified"], code, item.norm, item.version, *own]


def search(
    connection: Connection,
    index: Index,
    tables: np.ndarray,
    *,
    k: int,
    condition: str | None = None,
    min_score: float = -np.inf,
) -> list[list[Hit]]:
    """The k nearest items of lookup tables (Q, M, K), best first.

    `condition` is SQL on the columns of the table. `index` says which model the queries come from.
    Raises EngineError.
    """
    import psycopg

    answers = []
    try:
        with connection.client.transaction(), connection.client.cursor() as cursor:
            cursor.execute("SET TRANSACTION READ ONLY")
            cursor.execute("SELECT to_regclass(%s)", (_quoted(connection.table),))
            if cursor.fetchone()[0] is None:
                raise EngineError(f"{connection.address} not found: tcq push writes it")
            common.require_same(connection.address, _about(cursor, connection), index)
            statement = select(connection.table, index, condition)
            for table in tables:
                cursor.execute(statement, [*(row.tolist() for row in table.astype(float)), float(min_score), k])
                names = [column.name for column in cursor.description]
                answers.append([_hit(dict(zip(names, row, strict=True))) for row in cursor])
    except psycopg.Error as error:
        what = f" with --filter {condition!r}" if condition else ""
        raise EngineError(f"{connection.address} cannot be searched{what}: {str(error).strip()}") from None
    return answers


def _quoted(name: str) -> str:
    from psycopg import sql

    return sql.Identifier(name).as_string(None)


def select(table: str, index: Index, condition: str | None) -> str:
    """The query: its parameters are the M rows of a lookup table, the least score, and k."""
    q = index.config.quantizer
    wide = q.num_codewords > 256

    def entry(m: int) -> str:
        place = f"get_byte(code, {2 * m}) + 256 * get_byte(code, {2 * m + 1})" if wide else f"get_byte(code, {m})"
        return f"(%s::float8[])[{place} + 1]"

    total = " + ".join(entry(m) for m in range(q.num_codebooks))
    scored = f"({total}) / greatest(norm, 1e-12)" if index.config.eval.score == "cosine" else total
    chosen = f"WHERE ({condition.replace('%', '%%')}\n)" if condition else ""
    return (
        f"SELECT * FROM (SELECT *, {scored} AS score FROM {_quoted(table)} {chosen}) AS scored "
        f"WHERE score >= %s ORDER BY score DESC, id LIMIT %s"
    )


def _hit(row: dict[str, Any]) -> Hit:
    own = {name: value for name, value in row.items() if name not in STORED and name != "score"}
    return Hit(row["path"], float(row["score"]), row["id"], own)


def close(connection: Connection) -> None:
    """Closes the connection."""
    connection.client.close()
