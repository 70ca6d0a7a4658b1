"""Names of our own on clusters, stop, restore, schedules and what was observed; deleted databases; orphans."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_TIME = sa.DateTime(timezone=True)
_ALIVE = sa.text("deleted_at IS NULL")


def upgrade() -> None:
    """Make the change."""
    _add_installation()
    _widen_databases()
    _widen_backups()
    for table in ("databases", "backups"):
        _index_due(table)


def _add_installation() -> None:
    installations = op.create_table(
        "installations",
        sa.Column("only", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("only"),
    )
    # A letter first, so that what begins with it is an identifier in every engine.
    made = "h" + "".join(secrets.choice("0123456789abcdefghjkmnpqrstvwxyz") for _ in range(4))
    op.bulk_insert(installations, [{"only": 1, "id": made}])
    op.create_table(
        "orphans",
        sa.Column("place", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("first_seen_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("place", "name"),
    )


def _widen_databases() -> None:
    op.add_column("databases", sa.Column("former_name", sa.String(), nullable=True))
    # With a default, as SQLite could else only make the table anew.
    op.add_column("databases", sa.Column("object_name", sa.String(), nullable=False, server_default=""))
    op.execute("UPDATE databases SET object_name = id")  # what they have been called so far
    op.add_column("databases", sa.Column("stopped", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("databases", sa.Column("restored_from", sa.String(), nullable=True))
    op.add_column("databases", sa.Column("backup_schedule", sa.String(), nullable=True))
    op.add_column("databases", sa.Column("backups_kept", sa.Integer(), nullable=True))
    op.add_column("databases", sa.Column("backup_days_kept", sa.Integer(), nullable=True))
    op.add_column("databases", sa.Column("next_backup_at", _TIME, nullable=True))
    op.add_column("databases", sa.Column("size_bytes", sa.BigInteger(), nullable=True))
    op.add_column("databases", sa.Column("connections", sa.Integer(), nullable=True))
    op.add_column("databases", sa.Column("observed_at", _TIME, nullable=True))
    op.add_column("databases", sa.Column("undelete_until", _TIME, nullable=True))
    op.add_column("databases", sa.Column("deleted_at", _TIME, nullable=True))
    # Those that are settled are looked at from now on too.
    op.execute("UPDATE databases SET next_attempt_at = created_at WHERE state = 'ready' AND next_attempt_at IS NULL")
    op.drop_index("ix_databases_list", "databases")
    op.create_index(
        "ix_databases_list", "databases", ["account_id", "id"], sqlite_where=_ALIVE, postgresql_where=_ALIVE
    )
    op.create_index("ix_databases_former_name", "databases", ["account_id", "former_name"])
    op.create_index("ix_databases_object_name", "databases", ["object_name"], unique=True)
    op.create_index("ix_databases_deadline_at", "databases", ["deadline_at"])


def _widen_backups() -> None:
    op.add_column("backups", sa.Column("expires_at", _TIME, nullable=True))
    op.add_column("backups", sa.Column("verified_at", _TIME, nullable=True))
    op.add_column("backups", sa.Column("verification_error", sa.String(), nullable=True))
    op.create_index("ix_backups_deadline_at", "backups", ["deadline_at"])


def _index_due(table: str) -> None:
    op.drop_index(f"ix_{table}_next_attempt_at", table)
    for name, condition in (("ordered", "waiting_on IS NOT NULL"), ("looked_at", "waiting_on IS NULL")):
        where = sa.text(condition)
        op.create_index(f"ix_{table}_{name}", table, ["next_attempt_at"], sqlite_where=where, postgresql_where=where)
