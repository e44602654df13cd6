"""The tables, the same in SQLite and Postgres. Times are seconds since 1970; JSON is kept as text, as it came."""

from sqlalchemy import Boolean, CheckConstraint, Column, Double, ForeignKey, Index, Integer, MetaData, String, Table, Text

METADATA = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)

CONFIGS = Table(
    "public_configs",
    METADATA,
    Column("endpoint", String(200), primary_key=True),
    Column("model_id", String(200), primary_key=True),
    Column("revision", String(200), primary_key=True),
    Column("commit_hash", String(40), nullable=False),
    Column("config", Text, nullable=False),
    Column("kept_at", Double, nullable=False, index=True),
)
FILES = Table(
    "public_files",
    METADATA,
    Column("endpoint", String(200), primary_key=True),
    Column("model_id", String(200), primary_key=True),
    Column("commit_hash", String(40), primary_key=True),
    Column("files", Text, nullable=False),
    Column("kept_at", Double, nullable=False, index=True),
)
INVENTORIES = Table(
    "public_inventories",
    METADATA,
    Column("content_hash", String(64), primary_key=True),
    Column("inventory", Text, nullable=False),
    Column("kept_at", Double, nullable=False, index=True),
)
KEYS = Table(
    "api_keys",
    METADATA,
    Column("id", String(16), primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),  # SHA-256: the keys are random, so nothing slower is needed
    Column("name", String(100), nullable=False),
    Column("is_trusted", Boolean, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
)
MEASUREMENTS = Table(
    "measurements",
    METADATA,
    Column("hash", String(64), primary_key=True),
    Column("key_id", String(16), ForeignKey("api_keys.id"), nullable=False),
    Column("status", String(16), nullable=False),
    Column("reasons", Text, nullable=False),
    Column("record", Text, nullable=False),
    Column("received_at", Double, nullable=False),
    CheckConstraint("status IN ('accepted', 'quarantined', 'released', 'rejected')", name="status"),
    Index("ix_measurements_status_received_at", "status", "received_at"),
)
CORRECTIONS = Table(
    "corrections",
    METADATA,
    Column("version", String(64), primary_key=True),
    Column("corrections", Text, nullable=False),
    Column("report", Text, nullable=False),
    Column("created_at", Double, nullable=False),
)
EVENTS = Table(
    "correction_events",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("version", String(64), ForeignKey("corrections.version"), nullable=False),
    Column("action", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", Double, nullable=False),
    CheckConstraint("action IN ('activated', 'refused', 'rolled_back')", name="action"),
)
CURRENT = Table(
    "current_corrections",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", String(64), ForeignKey("corrections.version")),
    CheckConstraint("id = 1", name="single"),
)
