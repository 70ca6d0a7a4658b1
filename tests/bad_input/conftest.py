"""What holds after all bad input: nothing more is there than before, and the server answers."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import func
from sqlmodel import col, select

from controlplane.access.quota import QuotaUse
from controlplane.databases.model import Database
from controlplane.tokens.model import Token
from tests.stack import Customer


@pytest.fixture(autouse=True)
async def unharmed(somebody: Customer) -> AsyncIterator[None]:
    """After each test nothing more is there than before, and the server answers."""
    before = await _made(somebody)
    yield
    assert await _made(somebody) == before
    assert (await somebody.call("GET", "/api/portal/databases")).status_code == 200


async def _made(customer: Customer) -> list[Any]:
    mine = [select(func.count()).where(col(table.account_id) == customer.account_id) for table in (Database, Token)]
    used = select(func.sum(QuotaUse.used)).where(col(QuotaUse.account_id) == customer.account_id)
    return [(await customer.stack.server.store.fetch(statement))[0][0] for statement in (*mine, used)]


@pytest.fixture
def bearer(somebody: Customer) -> dict[str, str]:
    """The header of somebody's token."""
    return {"authorization": f"Bearer {somebody.token}"}
