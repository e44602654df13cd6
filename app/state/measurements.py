"""Posted measurements: each kept once, with what became of it."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import orjson
from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError

from app.state.database import Database
from app.state.tables import KEYS, MEASUREMENTS
from calibration.record import Record


class Status(StrEnum):
    """What became of a record."""

    ACCEPTED = "accepted"  # counts
    QUARANTINED = "quarantined"  # does not count until someone has looked
    RELEASED = "released"  # someone has looked: counts
    REJECTED = "rejected"  # someone has looked: does not count


COUNTING = (Status.ACCEPTED, Status.RELEASED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted:
    """A record as it is kept."""

    hash: str
    status: Status
    reasons: tuple[str, ...]
    is_new: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributed:
    """A record that counts, and whose it is."""

    record: Record
    key_id: str
    is_trusted: bool


def hash_of(record: Record) -> str:
    """What identifies a record: SHA-256 over its content, whatever the order of its keys."""
    content = orjson.loads(record.model_dump_json(exclude_none=True))
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def find(database: Database, record_hash: str) -> Posted | None:
    """What became of a record posted before."""
    with database.reading() as connection:
        row = connection.execute(select(MEASUREMENTS.c.status, MEASUREMENTS.c.reasons).where(MEASUREMENTS.c.hash == record_hash)).first()
    return None if row is None else Posted(hash=record_hash, status=Status(row.status), reasons=tuple(json.loads(row.reasons)))


def keep(database: Database, record: Record, key_id: str, reasons: tuple[str, ...]) -> Posted:
    """Keeps a record; of several same posts at once one makes the row, and all get the same answer."""
    record_hash = hash_of(record)
    status = Status.QUARANTINED if reasons else Status.ACCEPTED
    row = {
        "hash": record_hash,
        "key_id": key_id,
        "status": status.value,
        "reasons": json.dumps(reasons),
        "record": record.model_dump_json(exclude_none=True),
        "received_at": time.time(),
    }
    try:
        with database.writing() as connection:
            connection.execute(insert(MEASUREMENTS).values(**row))
    except IntegrityError:
        found = find(database, record_hash)
        if found is None:  # it was not the hash that is there already
            raise
        return found
    return Posted(hash=record_hash, status=status, reasons=reasons, is_new=True)


def decide(database: Database, record_hash: str, status: Status) -> bool:
    """What someone who has looked says of a record in quarantine. Whether it was there."""
    with database.writing() as connection:
        done = connection.execute(
            update(MEASUREMENTS)
            .where(MEASUREMENTS.c.hash == record_hash, MEASUREMENTS.c.status == Status.QUARANTINED.value)
            .values(status=status.value)
        )
    return done.rowcount == 1


def quarantined(database: Database, *, limit: int = 100) -> list[Posted]:
    """What waits to be looked at, the oldest first."""
    wanted = select(MEASUREMENTS.c.hash, MEASUREMENTS.c.reasons).where(MEASUREMENTS.c.status == Status.QUARANTINED.value)
    with database.reading() as connection:
        rows = connection.execute(wanted.order_by(MEASUREMENTS.c.received_at).limit(limit)).all()
    return [Posted(hash=row.hash, status=Status.QUARANTINED, reasons=tuple(json.loads(row.reasons))) for row in rows]


def counting(database: Database) -> Iterator[Contributed]:
    """All that counts, the earliest first."""
    wanted = (
        select(MEASUREMENTS.c.record, MEASUREMENTS.c.key_id, KEYS.c.is_trusted)
        .join(KEYS, KEYS.c.id == MEASUREMENTS.c.key_id)
        .where(MEASUREMENTS.c.status.in_([status.value for status in COUNTING]))
        .order_by(MEASUREMENTS.c.received_at, MEASUREMENTS.c.hash)
    )
    with database.reading() as connection:
        for row in connection.execution_options(yield_per=500).execute(wanted):
            yield Contributed(record=Record.model_validate_json(row.record), key_id=row.key_id, is_trusted=row.is_trusted)
