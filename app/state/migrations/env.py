"""What alembic runs: the connection is handed to it, within a transaction that is already open."""

from alembic import context

from app.state.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
