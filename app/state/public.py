"""Public configs, file headers and inventories, shared by all processes: memory first, then the database.

A database that fails costs the cache and no answer.
"""

import json
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Connection, Table, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from app.logs import LOGGER
from app.state.database import Database, StateError
from app.state.tables import CONFIGS, FILES, INVENTORIES
from estimator.inventory import Inventory
from estimator.inventory_codec import decode, encode
from estimator.sources.cache import InventoryCache
from estimator.sources.hub import HubConfig
from estimator.sources.lookup import Kept, MemoryStore, Place
from estimator.sources.safetensors import Files

MAX_ROWS = 50_000
"""Of each table; then the oldest tenth goes."""
# One write in so many looks whether there are too many.
_LOOK_EVERY = 200

Found = TypeVar("Found")


class SqlStore:
    """Configs and file headers.

    Args:
        database: with the tables.
        fresh_seconds: for which what is in memory need not be compared with what another process has [s].
    """

    def __init__(self, database: Database, *, fresh_seconds: float) -> None:
        self._database = database
        self._fresh_seconds = fresh_seconds
        self._memory = MemoryStore()

    def config(self, place: Place) -> Kept | None:
        kept = self._memory.config(place)
        if kept is not None and time.time() - kept.kept_at <= self._fresh_seconds:
            return kept
        endpoint, model_id, revision = place

        def read(connection: Connection) -> Kept | None:
            row = connection.execute(
                select(CONFIGS.c.commit_hash, CONFIGS.c.config, CONFIGS.c.kept_at).where(
                    CONFIGS.c.endpoint == endpoint, CONFIGS.c.model_id == model_id, CONFIGS.c.revision == revision
                )
            ).first()
            if row is None:
                return None
            return Kept(found=HubConfig(config=json.loads(row.config), revision=row.commit_hash, is_public=True), kept_at=row.kept_at)

        found = _read(self._database, read)
        if found is None:
            return kept
        self._memory.keep(place, found)
        return found

    def keep_config(self, place: Place, found: HubConfig) -> None:
        assert found.is_public, "only what is public is kept"
        self._memory.keep_config(place, found)
        endpoint, model_id, revision = place
        _keep(
            self._database,
            CONFIGS,
            {"endpoint": endpoint, "model_id": model_id, "revision": revision},
            {"commit_hash": found.revision, "config": json.dumps(found.config, separators=(",", ":"))},
        )

    def forget_config(self, place: Place) -> None:
        self._memory.forget_config(place)
        endpoint, model_id, revision = place
        wanted = (CONFIGS.c.endpoint == endpoint, CONFIGS.c.model_id == model_id, CONFIGS.c.revision == revision)

        def read(connection: Connection) -> bool:
            return connection.execute(select(CONFIGS.c.kept_at).where(*wanted)).first() is not None

        if _read(self._database, read):  # whoever asks for what does not exist must not make us write
            _write(self._database, lambda connection: connection.execute(delete(CONFIGS).where(*wanted)))

    def files(self, place: Place) -> Files | None:
        if (kept := self._memory.files(place)) is not None:
            return kept
        endpoint, model_id, commit = place

        def read(connection: Connection) -> Files | None:
            text = connection.execute(
                select(FILES.c.files).where(FILES.c.endpoint == endpoint, FILES.c.model_id == model_id, FILES.c.commit_hash == commit)
            ).scalar()
            return None if text is None else Files.decoded(json.loads(text))

        found = _read(self._database, read)
        if found is not None:
            self._memory.keep_files(place, found)
        return found

    def keep_files(self, place: Place, files: Files) -> None:
        self._memory.keep_files(place, files)
        endpoint, model_id, commit = place
        text = json.dumps(files.encoded(), separators=(",", ":"))
        _keep(self._database, FILES, {"endpoint": endpoint, "model_id": model_id, "commit_hash": commit}, {"files": text})


class SqlInventories(InventoryCache):
    """Inventories of public configs, by content hash."""

    def __init__(self, database: Database) -> None:
        super().__init__(None)
        self._database = database

    def _read(self, key: str) -> Inventory | None:
        def read(connection: Connection) -> Inventory | None:
            text = connection.execute(select(INVENTORIES.c.inventory).where(INVENTORIES.c.content_hash == key)).scalar()
            return None if text is None else decode(json.loads(text))

        found = _read(self._database, read)
        return found if found is not None and found.content_hash == key else None

    def _write(self, inventory: Inventory) -> None:
        text = json.dumps(encode(inventory), separators=(",", ":"))
        _keep(self._database, INVENTORIES, {"content_hash": inventory.content_hash}, {"inventory": text})


def _read(database: Database, read: Callable[[Connection], Found]) -> Found | None:
    try:
        with database.reading() as connection:
            return read(connection)
    except (StateError, ValueError, KeyError, TypeError, OSError) as error:
        LOGGER.warning("the cache cannot be read: %s", type(error).__name__)
        return None


def _write(database: Database, write: Callable[[Connection], Any]) -> None:
    try:
        with database.writing() as connection:
            write(connection)
    except (StateError, OSError) as error:
        LOGGER.warning("the cache cannot be written: %s", type(error).__name__)


def _keep(database: Database, table: Table, key: dict[str, str], values: dict[str, str]) -> None:
    def write(connection: Connection) -> None:
        upsert(connection, table, key, {**values, "kept_at": time.time()})
        if random.randrange(_LOOK_EVERY) == 0:
            _prune(connection, table)

    _write(database, write)


def upsert(connection: Connection, table: Table, key: dict[str, str], values: dict[str, Any]) -> None:
    """Writes a row, over one with the same key."""
    make = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = make(table).values(**key, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=values))


def _prune(connection: Connection, table: Table) -> None:
    count = connection.execute(select(func.count()).select_from(table)).scalar_one()
    if count > MAX_ROWS:
        oldest = select(table.c.kept_at).order_by(table.c.kept_at).offset(count - MAX_ROWS + MAX_ROWS // 10).limit(1).scalar_subquery()
        connection.execute(delete(table).where(table.c.kept_at < oldest))
