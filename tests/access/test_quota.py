"""Quotas under load: exactly as many as the plan allows, and nothing of the rest."""

import asyncio
from collections import Counter
from typing import Any

import pytest
from sqlmodel import col, select

from controlplane.access.quota import QuotaUse
from controlplane.databases.model import ClusterUse, Database
from controlplane.rpc.idempotency import IdempotencyKey
from controlplane.tokens.model import Token
from tests.doors import Native, Rest
from tests.stack import Customer, Stack

NEW = {"engine": "postgresql", "sku": "db-s-1vcpu-1gb"}


async def rows(stack: Stack, table: Any, account_id: str) -> list[Any]:
    """Return the rows of an account."""
    return list(await stack.server.store.fetch(select(table).where(col(table.account_id) == account_id)))


async def used(customer: Customer, kind: str) -> int:
    """Return how much of a quota is used, as the customer sees it."""
    account = (await customer.call("GET", "/api/portal/account")).json()
    number: int = account["quotas"][kind]["used"]
    return number


@pytest.mark.parametrize("through", [Rest, Native])
async def test_parallel_creates_get_what_the_plan_allows(stack: Stack, through: type[Rest | Native]) -> None:
    """Of 200 creates at once, three are made and 197 are refused with 402; the refused leave nothing, keys neither."""
    customer = await stack.customer(plan="small")
    door = Rest(stack.rest) if through is Rest else Native(stack.channel)
    places = sum(row.used for row in await stack.server.store.fetch(select(ClusterUse)))

    async def create(number: int) -> str:
        new = {"database": {**NEW, "name": f"db-{number}"}}
        headers = {"authorization": f"Bearer {customer.token}", "idempotency_key": str(number)}
        return (await door.call("CreateDatabase", new, **headers)).code

    answers = Counter(await asyncio.gather(*(create(number) for number in range(200))))
    assert answers == {"ok": 3, "quota_exceeded": 197}
    assert len(await rows(stack, Database, customer.account_id)) == 3
    assert len(await rows(stack, IdempotencyKey, customer.account_id)) == 3
    assert sum(row.used for row in await stack.server.store.fetch(select(ClusterUse))) == places + 3
    assert await used(customer, "databases") == 3


async def test_the_first_create_counts_too(stack: Stack) -> None:
    """Parallel first creates of a kind count every one, though the counter's row is not there yet."""
    customer = await stack.customer(plan="small")
    await asyncio.gather(
        *(customer.by_login("POST", "/api/portal/tokens", json={"name": f"t-{number}"}) for number in range(20))
    )
    assert len(await rows(stack, Token, customer.account_id)) == await used(customer, "tokens") == 3
    counters = await rows(stack, QuotaUse, customer.account_id)
    assert {row.kind: row.used for row in counters} == {"tokens": 3}


async def test_a_place_is_free_once_the_thing_is_gone(stack: Stack) -> None:
    """A deleted database counts until it is really gone; then another can be made, under the same name."""
    customer = await stack.customer(plan="small")
    for name in ("one", "two", "three"):
        await customer.create_database(name)
    four = {**NEW, "name": "four"}
    assert (await customer.call("POST", "/api/portal/databases", json=four)).status_code == 402
    for _ in range(2):
        await customer.call("DELETE", "/api/portal/databases/one")
    # To drop a database, PostgreSQL first writes down everything that the other tests have done there.
    await customer.until("gone", "/api/portal/databases/one", seconds=60)
    assert await used(customer, "databases") == 2
    assert (await customer.call("POST", "/api/portal/databases", json=four)).status_code == 201
    again = await customer.call("POST", "/api/portal/databases", json={**NEW, "name": "one"})
    assert again.status_code == 402


async def test_accounts_do_not_share_a_quota(stack: Stack) -> None:
    """What one account uses up is not missing to another."""
    full, empty = await stack.customer(plan="small"), await stack.customer(plan="small")
    for customer, names in ((full, ("one", "two", "three")), (empty, ("one",))):
        for name in names:
            made = await customer.call("POST", "/api/portal/databases", json={**NEW, "name": name})
            assert made.status_code == 201
    assert (await used(full, "databases"), await used(empty, "databases")) == (3, 1)
