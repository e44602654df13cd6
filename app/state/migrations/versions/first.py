"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "public_configs",
        sa.Column("endpoint", sa.String(200), nullable=False),
        sa.Column("model_id", sa.String(200), nullable=False),
        sa.Column("revision", sa.String(200), nullable=False),
        sa.Column("commit_hash", sa.String(40), nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("kept_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("endpoint", "model_id", "revision", name="pk_public_configs"),
    )
    op.create_index("ix_public_configs_kept_at", "public_configs", ["kept_at"])
    op.create_table(
        "public_files",
        sa.Column("endpoint", sa.String(200), nullable=False),
        sa.Column("model_id", sa.String(200), nullable=False),
        sa.Column("commit_hash", sa.String(40), nullable=False),
        sa.Column("files", sa.Text, nullable=False),
        sa.Column("kept_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("endpoint", "model_id", "commit_hash", name="pk_public_files"),
    )
    op.create_index("ix_public_files_kept_at", "public_files", ["kept_at"])
    op.create_table(
        "public_inventories",
        sa.Column("content_hash", sa.String(64), nullable=False),
        sa.Column("inventory", sa.Text, nullable=False),
        sa.Column("kept_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("content_hash", name="pk_public_inventories"),
    )
    op.create_index("ix_public_inventories_kept_at", "public_inventories", ["kept_at"])
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("is_trusted", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("revoked_at", sa.Double),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("digest", name="uq_api_keys_digest"),
    )
    op.create_table(
        "measurements",
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(16), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reasons", sa.Text, nullable=False),
        sa.Column("record", sa.Text, nullable=False),
        sa.Column("received_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("hash", name="pk_measurements"),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name="fk_measurements_key_id"),
        sa.CheckConstraint("status IN ('accepted', 'quarantined', 'released', 'rejected')", name="ck_measurements_status"),
    )
    op.create_index("ix_measurements_status_received_at", "measurements", ["status", "received_at"])
    op.create_table(
        "corrections",
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("corrections", sa.Text, nullable=False),
        sa.Column("report", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("version", name="pk_corrections"),
    )
    op.create_table(
        "correction_events",
        sa.Column("id", sa.Integer, autoincrement=True, nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_correction_events"),
        sa.ForeignKeyConstraint(["version"], ["corrections.version"], name="fk_correction_events_version"),
        sa.CheckConstraint("action IN ('activated', 'refused', 'rolled_back')", name="ck_correction_events_action"),
    )
    op.create_table(
        "current_corrections",
        sa.Column("id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("version", sa.String(64)),
        sa.PrimaryKeyConstraint("id", name="pk_current_corrections"),
        sa.ForeignKeyConstraint(["version"], ["corrections.version"], name="fk_current_corrections_version"),
        sa.CheckConstraint("id = 1", name="ck_current_corrections_single"),
    )
    op.execute("INSERT INTO current_corrections (id, version) VALUES (1, NULL)")


def downgrade() -> None:
    for table in (
        "current_corrections", "correction_events", "corrections", "measurements", "api_keys", "public_inventories", "public_files",
        "public_configs",
    ):  # fmt: skip
        op.drop_table(table)
