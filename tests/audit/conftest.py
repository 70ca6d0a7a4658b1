"""A record as the API shows it, and one of the tests' own to tamper with."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from controlplane.audit.log import AuditLog
from controlplane.audit.verify import Verdict, verify
from controlplane.errors import PortalError, Unauthenticated
from controlplane.keys import Keys
from controlplane.migrations import migrate
from controlplane.rpc.call import Call
from controlplane.sql import Store
from tests.clock import ManualClock
from tests.doors import RPCS
from tests.stack import Customer

AUDIT = "/api/portal/audit"
Entry = dict[str, Any]


async def record_of(customer: Customer, **filters: Any) -> list[Entry]:
    """Return the entries of an account that fit, also of what was refused a moment ago."""
    await customer.stack.server.audit.flush()
    answer = await customer.call("GET", AUDIT, params=filters)
    assert answer.status_code == 200, answer.text
    entries: list[Entry] = answer.json()
    return entries


class Book:
    """A log over a storage of its own, and the keys that it is written with."""

    def __init__(self, url: str, key_file: Path) -> None:
        self.url = url
        self.key_file = key_file
        self.store = Store(url)
        self.keys = Keys.load(key_file)
        self.clock = ManualClock()
        self.log = AuditLog(store=self.store, keys=self.keys, clock=self.clock)

    async def write(self, account_id: str, *, target: str = "db_1") -> None:
        """Add an entry in a transaction of its own."""
        async with self.store.session() as session:
            await self.log.add(
                session,
                account_id=account_id,
                action="database.create",
                outcome="ok",
                actor="token",
                credential="tk_1",
                target=target,
            )
            await session.commit()

    def refuse(self, *, target: str = "db_1", request_id: str = "r-1", error: PortalError | None = None) -> None:
        """Note that somebody without a credential was refused."""
        rpc = RPCS["DeleteDatabase"]
        call = Call(rpc=rpc, request_id=request_id, client_ip="192.0.2.1", rest=False, metadata={})
        self.log.refused(call, error or Unauthenticated(), rpc.request(name=target).SerializeToString())

    async def verify(self) -> Verdict:
        """Hold the records against their chains."""
        return await verify(self.store, self.keys)


@pytest.fixture
async def book(storage_url: str, tmp_path: Path) -> AsyncIterator[Book]:
    """An empty book, on either kind of storage."""
    book = Book(storage_url, tmp_path / "keys.json")
    await migrate(book.store)
    yield book
    await book.store.close()


async def execute(store: Store, *statements: str) -> None:
    """Run statements as whoever can write to the database."""
    async with store.engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))


async def tamper(store: Store, *statements: str) -> None:
    """Run statements past the triggers that would refuse them."""
    if store.is_sqlite:
        names = await store.fetch(text("SELECT name FROM sqlite_schema WHERE type = 'trigger'"))
        off = [f"DROP TRIGGER {row.name}" for row in names]
    else:
        off = ["ALTER TABLE audit_entries DISABLE TRIGGER USER"]
    await execute(store, *off, *statements)
