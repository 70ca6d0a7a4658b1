"""What every peer reads: ten accounts, a hundred tokens, two hundred databases, in one SQLite file."""

import base64
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from controlplane.access.secrets import SHOWN_PREFIX, new_token
from controlplane.accounts import admin
from controlplane.accounts.model import Account
from controlplane.audit.log import AuditLog
from controlplane.catalog.model import Catalog
from controlplane.clock import SystemClock
from controlplane.databases.model import READY, Database
from controlplane.ids import new_id
from controlplane.keys import Keys
from controlplane.migrations import migrate
from controlplane.settings import Settings
from controlplane.sql import Store
from controlplane.tokens.model import Token

ACCOUNTS = 10
TOKENS_PER_ACCOUNT = 10
DATABASES_PER_ACCOUNT = 20
REVOCABLE = 20
RATE_LIMIT = 1_000_000  # per minute and token: counted at every request, never reached
# Protobuf prints as many digits of a second as it needs, pydantic six: with these both print six.
_ORDERED = datetime(2026, 1, 15, 9, 30, 0, 123456, tzinfo=UTC)
_CATALOG = f"""\
default_plan = "bench"
default_region = "local"

[[plans]]
name = "bench"
rate_limit_per_minute = {RATE_LIMIT}
quotas = {{ databases = 1000, tokens = 1000 }}

[[skus]]
name = "db-s-1vcpu-2gb"
engines = ["postgresql"]
vcpus = 1
memory_mb = 2048
storage_gb = 20
connections = 40

[[regions]]
name = "local"
title = "This machine"
"""


@dataclass(frozen=True, slots=True)
class Login:
    """How the holder of the revocable tokens logs in."""

    email: str
    password: str


@dataclass(frozen=True, slots=True)
class Seed:
    """What is in the database, as a caller knows it.

    `tokens` are good. `refused` are credentials that are not, with the status that each must get. `revocable` are good
    until the benchmark revokes them: each secret with its token's id, all of the account that `login` opens.
    """

    tokens: list[str]
    refused: list[tuple[str, int]]
    revocable: list[tuple[str, str]]
    login: Login
    mac_key: bytes


async def seed(settings: Settings) -> Seed:
    """Write the catalogue and fill the database of these settings."""
    assert settings.catalog is not None
    settings.catalog.write_text(_CATALOG)
    keys = Keys.load(settings.data_dir / "keys.json")
    store = Store(settings.storage_url)
    try:
        await migrate(store)
        return await _fill(store, Catalog.load(settings.catalog), keys)
    finally:
        await store.close()


async def open_account(store: Store, keys: Keys) -> tuple[str, str]:
    """Bring the schema up to date and open an account on the plan `bench`; return its id and a token of full scope."""
    await migrate(store)
    account = Account(
        id=new_id("ac"), email=f"{new_id('c')}@example.com", password_hash="", plan="bench", created_at=_ORDERED
    )
    secret, token = token_of(keys, account.id)
    async with store.session() as session:
        session.add(account)
        await session.flush()
        session.add(token)
        await session.commit()
    return account.id, secret


async def _fill(store: Store, catalog: Catalog, keys: Keys) -> Seed:
    logins = [Login(f"customer-{number}@example.com", secrets.token_urlsafe(12)) for number in range(ACCOUNTS)]
    clock = SystemClock()
    audit = AuditLog(store=store, keys=keys, clock=clock)
    accounts = [
        await admin.create_account(store, catalog, clock, audit=audit, email=login.email, password=login.password)
        for login in logins
    ]
    rows: list[Token | Database] = []

    def token(account: Account, **values: Any) -> tuple[str, str]:
        secret, row = token_of(keys, account.id, **values)
        rows.append(row)
        return secret, row.id

    tokens = []
    for account in accounts:
        rows += [_database(account, number) for number in range(DATABASES_PER_ACCOUNT)]
        tokens += [token(account, **_terms(number))[0] for number in range(TOKENS_PER_ACCOUNT)]
    gone, past = datetime.now(UTC), datetime.now(UTC) - timedelta(minutes=1)
    refused = [
        (new_token(), 401),
        (token(accounts[0], revoked_at=gone)[0], 401),
        (token(accounts[0], expires_at=past)[0], 401),
        (token(accounts[0], allowed_ips=["198.51.100.0/24"])[0], 403),
    ]
    revocable = [token(accounts[0]) for _ in range(REVOCABLE)]
    async with store.session() as session:
        session.add_all(rows)
        await session.commit()
    return Seed(tokens, refused, revocable, logins[0], base64.b64decode(keys.mac["k1"]))


def token_of(keys: Keys, account_id: str, **values: Any) -> tuple[str, Token]:
    """Return a new token's secret and its row."""
    secret = new_token()
    columns: dict[str, Any] = {"name": "bench", "scope": "full", "created_at": _ORDERED, **values}
    digest, prefix = keys.digest(secret), secret[:SHOWN_PREFIX]
    return secret, Token(id=new_id("tk"), account_id=account_id, secret_digest=digest, prefix=prefix, **columns)


def _terms(number: int) -> dict[str, Any]:
    """Return what a token may do and from where: every kind of check is made for some of them."""
    return {
        "scope": ("full", "read", "databases", None, "functions")[number % 5],
        "allowed_ips": ["198.51.100.7", "127.0.0.0/8"] if number % 2 else [],
        "expires_at": datetime.now(UTC) + timedelta(days=30) if number % 3 else None,
    }


def _database(account: Account, number: int) -> Database:
    at, database_id = _ORDERED + timedelta(hours=number), new_id("db")
    return Database(
        id=database_id,
        object_name=database_id,
        account_id=account.id,
        name=f"analytics-{number}",
        engine="postgresql",
        sku="db-s-1vcpu-2gb",
        region="local",
        cluster_target="local-postgresql",
        tags={"env": "production"},
        state=READY,
        observed_generation=1,
        password_sealed=f"k1:{secrets.token_urlsafe(60)}",
        created_at=at,
        updated_at=at,
    )


def write_tokens(path: Path, tokens: list[str]) -> Path:
    """Write a file with one token a line, readable by its owner only."""
    path.touch(mode=0o600)
    path.write_text("\n".join(tokens) + "\n")
    return path
