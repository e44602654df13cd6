"""One engine for SQLite and Postgres, one way to read and one to write, and migrations that several processes may start at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from estimator.errors import RequestError

HEAD = "0001"
"""The newest migration: a database that has it needs no further look, and alembic is not imported."""

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_SECONDS = 10
_STATEMENT_SECONDS = 10
_KEPT_CONNECTIONS = 5
# Any number, the same for all processes of this program.
_MIGRATION_LOCK = 7_305_518
_WRITES = "vramplan_writes"

StateError = SQLAlchemyError
"""What every use of the database may raise: it is down, full, locked, or cannot be read."""


class Database:
    """The state's database; safe to use from many threads and processes.

    Args:
        url: of SQLAlchemy; `sqlite:///PATH` or `postgresql://…`.
        connections: to Postgres at most, as many as there are threads that may want one; those beyond a few are closed after use.

    Raises:
        RequestError: if the URL cannot be read, or is of another database.
    """

    def __init__(self, url: str, *, connections: int = 15) -> None:
        parsed = _url(url)
        self._is_sqlite = parsed.get_backend_name() == "sqlite"
        if self._is_sqlite:
            if parsed.database and parsed.database != ":memory:":
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._engine = create_engine(parsed, connect_args={"timeout": _BUSY_SECONDS}, hide_parameters=True)
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        else:
            options = f"-c statement_timeout={_STATEMENT_SECONDS * 1000} -c lock_timeout={_STATEMENT_SECONDS * 1000}"
            kept = min(connections, _KEPT_CONNECTIONS)
            self._engine = create_engine(
                parsed,
                pool_pre_ping=True,
                pool_size=kept,
                max_overflow=connections - kept,
                pool_timeout=5,
                connect_args={"connect_timeout": 5, "options": options},
                hide_parameters=True,
            )
        self._writer: Engine = self._engine.execution_options(**{_WRITES: True})

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one state."""
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction: all of it or nothing; on the disk once it has ended."""
        with self._writer.begin() as connection:
            yield connection

    def ping(self) -> None:
        """Asks for an answer.

        Raises:
            StateError: if there is none.
        """
        with self.reading() as connection:
            connection.execute(text("SELECT 1"))

    def migrate(self) -> None:
        """Brings the tables up to date."""
        if self._version() == HEAD:
            return
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self.writing() as connection:
            if not self._is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _version(self) -> str | None:
        with self.reading() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            return None if found is None else str(found)

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()


def _url(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise RequestError("database_url: not a URL of SQLAlchemy", field="database_url") from None
    backend = parsed.drivername.partition("+")[0]
    if backend == "postgres" or parsed.drivername == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend not in ("sqlite", "postgresql"):
        raise RequestError(f"database_url: {backend!r} is not known; accepted: sqlite, postgresql", field="database_url")
    return parsed


def _prepare_sqlite(connection: Any, _: Any) -> None:
    # pysqlite opens transactions late by itself, in which two writers read the same state and one overwrites the other.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode = WAL", f"busy_timeout = {1000 * _BUSY_SECONDS}", "synchronous = FULL", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
