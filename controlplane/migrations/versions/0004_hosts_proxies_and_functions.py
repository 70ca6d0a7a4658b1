"""The hosts of the data planes; proxies and what went through them; functions, their versions and their logs."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make the change."""
    _add_hosts()
    _add_proxies()
    _add_functions()
    _add_logs()


def _add_hosts() -> None:
    op.create_table(
        "hosts",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("region", sa.String(), nullable=False),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("capacity", sa.Integer(), nullable=False),
        sa.Column("used", sa.Integer(), nullable=False),
        sa.Column("runtimes", sa.JSON(), nullable=False),
        sa.Column("network", sa.Boolean(), nullable=False),
        sa.Column("secret_digest", sa.String(), nullable=False),
        sa.Column("instance", sa.String(), nullable=True),
        sa.Column("applied", sa.BigInteger(), nullable=False),
        sa.Column("last_seen_at", _TIME, nullable=True),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
        sa.UniqueConstraint("secret_digest"),
    )
    op.create_table(
        "host_sequences",
        sa.Column("scope", sa.String(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("scope"),
    )


def _add_proxies() -> None:
    op.create_table(
        "proxies",
        *_hosted(),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("region", sa.String(), nullable=False),
        sa.Column("host_id", sa.String(), nullable=False),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("salt", sa.LargeBinary(), nullable=False),
        sa.Column("password_digest", sa.LargeBinary(), nullable=False),
        sa.Column("allowed_ips", sa.JSON(), nullable=False),
        sa.Column("max_connections", sa.Integer(), nullable=False),
        sa.Column("bytes_per_second", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", _TIME, nullable=True),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("updated_at", _TIME, nullable=False),
        sa.UniqueConstraint("account_id", "name"),
    )
    _index("proxies")
    op.create_index("ix_proxies_host_id", "proxies", ["host_id"])
    counts = ("bytes_up", "bytes_down", "connections")
    for table, key in (("proxy_usage", ("day", sa.Date())), ("proxy_counters", ("process", sa.String()))):
        op.create_table(
            table,
            sa.Column("proxy_id", sa.String(), nullable=False),
            sa.Column(*key, nullable=False),
            *(sa.Column(name, sa.BigInteger(), nullable=False) for name in counts),
            sa.ForeignKeyConstraint(["proxy_id"], ["proxies.id"], ondelete="CASCADE"),
            sa.PrimaryKeyConstraint("proxy_id", key[0]),
        )


def _add_functions() -> None:
    op.create_table(
        "functions",
        *_hosted(),
        *_call_settings(),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("runtime", sa.String(), nullable=False),
        sa.Column("region", sa.String(), nullable=False),
        sa.Column("auth", sa.String(), nullable=False),
        sa.Column("max_concurrency", sa.Integer(), nullable=False),
        sa.Column("wanted_version", sa.Integer(), nullable=False),
        sa.Column("active_version", sa.Integer(), nullable=True),
        sa.Column("last_version", sa.Integer(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("updated_at", _TIME, nullable=False),
        sa.UniqueConstraint("account_id", "name"),
    )
    _index("functions")
    op.create_table(
        "function_versions",
        sa.Column("id", sa.String(), nullable=False),
        *_call_settings(),
        sa.Column("function_id", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("env_sealed", sa.String(), nullable=False),
        sa.Column("code_sha256", sa.String(), nullable=False),
        sa.Column("code_bytes", sa.Integer(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(["function_id"], ["functions.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("function_id", "number"),
    )
    op.create_table(
        "function_codes",
        sa.Column("function_id", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("is_archive", sa.Boolean(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["function_id"], ["functions.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("function_id", "sha256"),
    )


def _add_logs() -> None:
    op.create_table(
        "function_log_lines",
        sa.Column("function_id", sa.String(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("time", _TIME, nullable=False),
        sa.Column("stream", sa.String(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.Column("outcome", sa.String(), nullable=True),
        sa.Column("duration_ms", sa.Float(), nullable=True),
        sa.Column("memory_mb", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("function_id", "sequence"),
    )
    op.create_index("ix_function_log_lines_version", "function_log_lines", ["function_id", "version", "sequence"])
    op.create_table(
        "function_log_heads",
        sa.Column("function_id", sa.String(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("function_id"),
    )
    op.create_table(
        "function_log_batches",
        sa.Column("host_id", sa.String(), nullable=False),
        sa.Column("instance", sa.String(), nullable=False),
        sa.Column("batch", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("host_id"),
    )


def _call_settings() -> tuple[sa.schema.SchemaItem, ...]:
    """Return the columns of what a function's calls depend on."""
    return (
        sa.Column("entrypoint", sa.String(), nullable=False),
        sa.Column("memory_mb", sa.Integer(), nullable=False),
        sa.Column("timeout_ms", sa.Integer(), nullable=False),
        sa.Column("env_names", sa.JSON(), nullable=False),
        sa.Column("allow_network", sa.Boolean(), nullable=False),
    )


def _hosted() -> tuple[sa.schema.SchemaItem, ...]:
    """Return the columns of what the reconciler settles and hosts hold."""
    return (
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("account_id", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("observed_generation", sa.Integer(), nullable=False),
        sa.Column("waiting_on", sa.String(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("last_error", sa.String(), nullable=True),
        sa.Column("next_attempt_at", _TIME, nullable=True),
        sa.Column("deadline_at", _TIME, nullable=True),
        sa.Column("lease_token", sa.String(), nullable=True),
        sa.Column("lease_until", _TIME, nullable=True),
        sa.Column("host_sequence", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"]),
        sa.PrimaryKeyConstraint("id"),
    )


def _index(table: str) -> None:
    op.create_index(f"ix_{table}_list", table, ["account_id", "id"])
    op.create_index(f"ix_{table}_deadline_at", table, ["deadline_at"])
    op.create_index(f"ix_{table}_host_sequence", table, ["host_sequence"])
    for name, condition in (("ordered", "waiting_on IS NOT NULL"), ("looked_at", "waiting_on IS NULL")):
        where = sa.text(condition)
        op.create_index(f"ix_{table}_{name}", table, ["next_attempt_at"], sqlite_where=where, postgresql_where=where)
