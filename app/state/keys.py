"""Keys of contributors: shown once, kept as a hash."""

import hashlib
import secrets
import time
from dataclasses import dataclass

from sqlalchemy import select, update

from app.state.database import Database
from app.state.tables import KEYS

PREFIX = "vrk_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key as it is known afterwards."""

    id: str
    name: str
    is_trusted: bool
    """Whether the operator answers for what comes with it."""
    is_revoked: bool


def create(database: Database, name: str, *, is_trusted: bool) -> str:
    """A new key; nobody can show it again."""
    secret = PREFIX + secrets.token_urlsafe(32)
    with database.writing() as connection:
        connection.execute(
            KEYS.insert().values(
                id=secrets.token_hex(8), digest=_digest(secret), name=name[:100], is_trusted=is_trusted, created_at=time.time()
            )
        )
    return secret


def find(database: Database, secret: str) -> Key | None:
    """The key that a caller shows, if it is one and is not revoked."""
    if not secret.startswith(PREFIX) or len(secret) > 200:
        return None
    with database.reading() as connection:
        row = connection.execute(select(KEYS).where(KEYS.c.digest == _digest(secret), KEYS.c.revoked_at.is_(None))).first()
    return None if row is None else Key(id=row.id, name=row.name, is_trusted=row.is_trusted, is_revoked=False)


def known(database: Database) -> list[Key]:
    """All keys, the oldest first."""
    with database.reading() as connection:
        rows = connection.execute(select(KEYS).order_by(KEYS.c.created_at)).all()
    return [Key(id=row.id, name=row.name, is_trusted=row.is_trusted, is_revoked=row.revoked_at is not None) for row in rows]


def revoke(database: Database, key_id: str) -> bool:
    """Takes a key back; what came with it stays. Whether there was such a key."""
    with database.writing() as connection:
        done = connection.execute(update(KEYS).where(KEYS.c.id == key_id, KEYS.c.revoked_at.is_(None)).values(revoked_at=time.time()))
    return done.rowcount == 1


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
