"""Quotas under load: exactly as many as the plan allows, and nothing of the rest."""

import asyncio
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from sqlmodel import col, select, text, update

from controlplane.access.quota import QuotaCharge, QuotaUse
from controlplane.accounts.model import Account
from controlplane.databases.model import ClusterUse, Database
from controlplane.rpc.idempotency import IdempotencyKey
from controlplane.tokens.expiry import end_what_is_over
from controlplane.tokens.model import Token
from tests.clock import MovableClock
from tests.doors import Native, Rest
from tests.stack import Customer, Stack, eventually

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


async def test_a_release_counts_once(stack: Stack) -> None:
    """Of 50 parallel revocations of one token one frees its place, and none any other's."""
    customer = await stack.customer(plan="small")
    gone, _ = await customer.new_token(), await customer.new_token()
    path = f"/api/portal/tokens/{gone['id']}"
    answers = await asyncio.gather(*(customer.by_login("DELETE", path) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert await counted(stack, customer, "tokens") == 2
    await customer.new_token()
    assert (await customer.by_login("POST", "/api/portal/tokens", json={"name": "fourth"})).status_code == 402


async def test_a_churn_of_tokens_never_drifts(stack: Stack) -> None:
    """After 200 tokens made and revoked in parallel, the counter, the charges and those alive are one number."""
    customer = await stack.customer()
    at_once = asyncio.Semaphore(40)

    async def come_and_go(number: int) -> None:
        async with at_once:
            made = await customer.new_token()
            if number % 5:
                revoked = await customer.by_login("DELETE", f"/api/portal/tokens/{made['id']}")
                assert revoked.status_code == 200

    await asyncio.gather(*(come_and_go(number) for number in range(200)))
    alive = [row for row in await rows(stack, Token, customer.account_id) if row.revoked_at is None]
    assert await counted(stack, customer, "tokens") == len(alive) == 41


async def test_a_churn_of_databases_never_drifts(stack: Stack) -> None:
    """Databases that come and go in parallel, some ordered away before they are ready, leave the count exact."""
    customer = await stack.customer()
    names = [f"churn-{number}" for number in range(10)]

    async def left(wanted: set[str]) -> None:
        async def only_those() -> bool:
            listed = (await customer.call("GET", "/api/portal/databases")).json()
            return {(each["name"], each["status"]) for each in listed} == {(name, "ready") for name in wanted}

        await eventually(only_those, seconds=60)

    async def order_away(which: list[str]) -> None:
        ends = (customer.call("DELETE", f"/api/portal/databases/{name}") for name in [*which, *which])
        assert {answer.status_code for answer in await asyncio.gather(*ends)} <= {200, 404}

    made = (customer.call("POST", "/api/portal/databases", json={**NEW, "name": name}) for name in names)
    assert {answer.status_code for answer in await asyncio.gather(*made)} == {201}
    await order_away(names[:5])
    await left(set(names[5:]))
    await order_away(names[5:8])
    await left(set(names[8:]))
    assert await counted(stack, customer, "databases") == len(await rows(stack, Database, customer.account_id)) == 2


async def test_another_plan_holds_from_the_next_create(stack: Stack) -> None:
    """A smaller plan takes nothing away and lets nothing in, and says both numbers; a larger one lets in again."""
    customer = await stack.customer()
    names = ["one", "two", "three", "four", "five"]
    for name in names:
        made = await customer.call("POST", "/api/portal/databases", json={**NEW, "name": name})
        assert made.status_code == 201
    six = {**NEW, "name": "six"}
    await give_plan(stack, customer, "small")
    refused = await customer.call("POST", "/api/portal/databases", json=six)
    assert (refused.status_code, "5 of 3 databases in use" in refused.json()["error"]) == (402, True)
    assert [row["name"] for row in (await customer.call("GET", "/api/portal/databases")).json()] == names
    account = (await customer.call("GET", "/api/portal/account")).json()
    assert account["quotas"]["databases"] == {"limit": 3, "used": 5}
    await give_plan(stack, customer, "roomy")
    assert (await customer.call("POST", "/api/portal/databases", json=six)).status_code == 201
    assert await counted(stack, customer, "databases") == 6


async def test_an_expired_token_gives_its_place_back_once(timed: tuple[Stack, MovableClock]) -> None:
    """However often time is looked at, and though it is then revoked, an expired token frees one place."""
    stack, clock = timed
    customer = await stack.customer(plan="small")
    made = await customer.new_token(expires_at=(clock.now() + timedelta(minutes=1)).isoformat())
    assert await counted(stack, customer, "tokens") == 2
    clock.let_pass(minutes=2)
    await asyncio.gather(*(end_what_is_over(stack.server.store, clock) for _ in range(5)))
    assert await counted(stack, customer, "tokens") == 1
    for _ in range(2):
        assert (await customer.by_login("DELETE", f"/api/portal/tokens/{made['id']}")).status_code == 200
    await end_what_is_over(stack.server.store, clock)
    assert await counted(stack, customer, "tokens") == 1


async def test_a_token_that_is_given_more_time_keeps_its_place(timed: tuple[Stack, MovableClock]) -> None:
    """Whoever looks for expired tokens while one is given more time does not take its place away."""
    stack, clock = timed
    customer = await stack.customer()
    made = await customer.new_token(expires_at=(clock.now() + timedelta(minutes=1)).isoformat())
    clock.let_pass(minutes=2)
    store = stack.server.store
    async with store.session() as session:
        mine = col(Token.id) == made["id"]
        await session.execute(select(Token).where(mine).with_for_update())
        looking = asyncio.create_task(end_what_is_over(store, clock))
        if not store.is_sqlite:  # SQLite has one writer, who is here
            await eventually(lambda: _waits(stack))
        await session.execute(update(Token).where(mine).values(expires_at=None))
        await session.commit()
    await looking
    assert await counted(stack, customer, "tokens") == 2


async def counted(stack: Stack, customer: Customer, kind: str) -> int:
    """Return the counter of a kind, which is the number of its charges."""
    charges = [row for row in await rows(stack, QuotaCharge, customer.account_id) if row.kind == kind]
    number = await used(customer, kind)
    assert number == len(charges)
    return number


async def give_plan(stack: Stack, customer: Customer, plan: str) -> None:
    """Put an account on another plan."""
    async with stack.server.store.session() as session:
        await session.execute(update(Account).where(col(Account.id) == customer.account_id).values(plan=plan))
        await session.commit()


async def _waits(stack: Stack) -> bool:
    """Tell whether somebody waits for a lock in PostgreSQL."""
    waiting = text("SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
    return bool(await stack.server.store.fetch(waiting))
