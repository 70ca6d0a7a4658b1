"""What Alembic runs: over the connection that it is handed, in the transaction that is open there."""

from alembic import context

from controlplane import tables

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=tables.METADATA,
    render_as_batch=True,  # SQLite changes a table by making it anew
    compare_type=True,
)
context.run_migrations()
