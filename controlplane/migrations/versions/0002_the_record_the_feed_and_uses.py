"""The record, the feed, the uses of tokens, charges by resource; custom permissions and a grace for old secrets."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make the change."""
    op.add_column("accounts", sa.Column("oidc_subject", sa.String(), nullable=True))
    op.create_index("ix_accounts_oidc_subject", "accounts", ["oidc_subject"], unique=True)
    _widen_tokens()
    _remake_sessions()
    _count_by_resource()
    _add_feed()
    _add_record()


def _widen_tokens() -> None:
    op.add_column("tokens", sa.Column("permissions", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("tokens", sa.Column("previous_digest", sa.String(), nullable=True))
    op.add_column("tokens", sa.Column("previous_prefix", sa.String(), nullable=True))
    op.add_column("tokens", sa.Column("previous_until", _TIME, nullable=True))
    op.create_index("ix_tokens_previous_digest", "tokens", ["previous_digest"], unique=True)
    op.create_index("ix_tokens_expires_at", "tokens", ["expires_at"])
    op.create_table(
        "token_uses",
        sa.Column("token_id", sa.String(), nullable=False),
        sa.Column("last_used_at", _TIME, nullable=True),
        sa.Column("last_used_ip", sa.String(), nullable=True),
        sa.Column("secret_used_at", _TIME, nullable=True),
        sa.Column("previous_used_at", _TIME, nullable=True),
        sa.Column("refused_requests", sa.Integer(), nullable=False),
        sa.Column("last_refused_at", _TIME, nullable=True),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"]),
        sa.PrimaryKeyConstraint("token_id"),
    )
    op.create_table(
        "token_permissions",
        sa.Column("token_id", sa.String(), nullable=False),
        sa.Column("permission", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"]),
        sa.PrimaryKeyConstraint("token_id", "permission"),
    )


def _remake_sessions() -> None:
    """Make the table anew, with nobody logged in: of a login from before, nobody knows when it was last used."""
    op.drop_table("sessions")
    op.create_table(
        "sessions",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("account_id", sa.String(), nullable=False),
        sa.Column("secret_digest", sa.String(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("expires_at", _TIME, nullable=False),
        sa.Column("last_used_at", _TIME, nullable=False),
        sa.Column("last_used_ip", sa.String(), nullable=False),
        sa.Column("user_agent", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("secret_digest"),
    )
    op.create_index("ix_sessions_account_id", "sessions", ["account_id"])


def _count_by_resource() -> None:
    op.create_table(
        "quota_charges",
        sa.Column("resource_id", sa.String(), nullable=False),
        sa.Column("account_id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"]),
        sa.PrimaryKeyConstraint("resource_id"),
    )
    op.create_index("ix_quota_charges_account_id", "quota_charges", ["account_id"])
    for kind, which in (("databases", ""), ("backups", ""), ("tokens", " WHERE revoked_at IS NULL")):
        op.execute(f"INSERT INTO quota_charges SELECT id, account_id, '{kind}' FROM {kind}{which}")  # noqa: S608


def _add_feed() -> None:
    op.create_table(
        "event_heads",
        sa.Column("account_id", sa.String(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("account_id"),
    )
    op.create_table(
        "events",
        sa.Column("account_id", sa.String(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("resource_id", sa.String(), nullable=False),
        sa.Column("resource_name", sa.String(), nullable=True),
        sa.Column("status", sa.String(), nullable=True),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.Column("detail", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("account_id", "sequence"),
    )
    op.create_index("ix_events_created_at", "events", ["created_at"])


def _add_record() -> None:
    op.create_table(
        "audit_heads",
        sa.Column("account_id", sa.String(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("account_id"),
    )
    op.create_table(
        "audit_entries",
        sa.Column("account_id", sa.String(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("credential", sa.String(), nullable=True),
        sa.Column("ip", sa.String(), nullable=True),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.Column("target", sa.String(), nullable=True),
        sa.Column("target_name", sa.String(), nullable=True),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("account_id", "sequence"),
    )
    # Only ever added to: the database refuses the rest, whoever asks.
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION refuse_to_change_the_record() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'the record is only ever added to'; END $$"
        )
        op.execute(
            "CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_entries"
            " FOR EACH STATEMENT EXECUTE FUNCTION refuse_to_change_the_record()"
        )
    else:
        # REPLACE fires no trigger for the row that it deletes.
        op.execute(
            "CREATE TRIGGER append_only_replace BEFORE INSERT ON audit_entries WHEN EXISTS (SELECT 1 FROM audit_entries"
            " WHERE account_id = NEW.account_id AND sequence = NEW.sequence)"
            " BEGIN SELECT RAISE(ABORT, 'the record is only ever added to'); END"
        )
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER append_only_{verb.lower()} BEFORE {verb} ON audit_entries"
                " BEGIN SELECT RAISE(ABORT, 'the record is only ever added to'); END"
            )
