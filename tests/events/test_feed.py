"""The feed: one order for an account, in which nothing is missing, and what happens to a resource is all there."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy import text

from controlplane.accounts.model import Account
from controlplane.catalog.model import Catalog
from controlplane.clock import SystemClock
from controlplane.databases.engines.engine import ClusterUnavailable
from controlplane.events.feed import Feed
from controlplane.migrations import migrate
from controlplane.sql import Store
from tests.clock import ManualClock
from tests.events.conftest import EVENTS, feed_of
from tests.reconcile.conftest import Works
from tests.stack import Customer, Stack

DATABASES = "/api/portal/databases"


async def test_the_life_of_a_database(customer: Customer) -> None:
    """Each order of a database and its backup, and each outcome, is an event; the backup outlives it for a while."""
    made = await customer.create_database("analytics")
    backup = (await customer.call("POST", f"{DATABASES}/analytics/backups")).json()
    await customer.until("completed", f"{DATABASES}/analytics/backups/{backup['id']}")
    changed = await customer.call("PATCH", f"{DATABASES}/analytics", json={"sku": "db-s-1vcpu-1gb"})
    await customer.until("ready", f"{DATABASES}/analytics")
    deleted = await customer.call("DELETE", f"{DATABASES}/analytics")
    await customer.until("gone", f"{DATABASES}/analytics")
    events = [event for event in await feed_of(customer) if event["type"].startswith(("database.", "backup."))]
    shown = [(event["type"], event.get("resource_name"), event.get("status")) for event in events]
    assert shown == [
        ("database.create", "analytics", "provisioning"),
        ("database.ready", "analytics", "ready"),
        ("backup.create", None, "running"),
        ("backup.completed", None, "completed"),
        ("database.update", "analytics", "updating"),
        ("database.ready", "analytics", "ready"),
        ("database.delete", "analytics", "deleting"),
        ("database.deleted", "analytics", "deleted"),
    ]
    for event in events:
        assert event["resource_id"] == (backup if event["type"].startswith("backup.") else made)["id"]
        assert "detail" not in event
    caused = {event["type"]: event["request_id"] for event in events if "request_id" in event}
    assert set(caused) == {"database.create", "backup.create", "database.update", "database.delete"}
    assert caused["database.update"] == changed.headers["x-request-id"]
    assert caused["database.delete"] == deleted.headers["x-request-id"]


async def test_pages_and_links_lead_through_the_feed(customer: Customer) -> None:
    """Following `Link` gives every event once, in pages as large as asked, and then waits where the feed ends."""
    for number in range(6):
        await customer.new_token(name=f"t-{number}")
    whole = await feed_of(customer)
    assert [event["sequence"] for event in whole] == list(range(1, 9))
    path, pages = f"{EVENTS}?page_size=3", list[list[dict[str, Any]]]()
    while not pages or pages[-1]:
        answer = await customer.call("GET", path)
        pages.append(answer.json())
        path = answer.links["next"]["url"]
    assert ([len(page) for page in pages], list(itertools.chain(*pages))) == ([3, 3, 2, 0], whole)
    assert path == f"{EVENTS}?after=8&page_size=3"
    await customer.new_token()
    assert [event["sequence"] for event in (await customer.call("GET", path)).json()] == [9]


async def test_nobody_sees_anothers_feed(stack: Stack, customer: Customer) -> None:
    """A feed has its own account's events only, and its own numbers."""
    stranger = await stack.customer()
    await customer.new_token(name="mine")
    assert [event["sequence"] for event in await feed_of(stranger)] == [1, 2]
    assert not {event["resource_id"] for event in await feed_of(customer)} & {
        event["resource_id"] for event in await feed_of(stranger)
    }


async def test_a_reader_misses_nothing_while_many_write(customer: Customer) -> None:
    """Who polls while many changes and their outcomes are committed sees each exactly once, in order."""
    done = asyncio.Event()

    async def write(number: int) -> None:
        for turn in range(4):
            await customer.new_token(name=f"t-{number}-{turn}")
        name = f"db-{number}"
        await customer.create_database(name)
        for turn in range(4):
            body = {"tags": {"turn": str(turn)}}
            assert (await customer.call("PATCH", f"{DATABASES}/{name}", json=body)).status_code == 200
        await customer.call("DELETE", f"{DATABASES}/{name}")
        await customer.until("gone", f"{DATABASES}/{name}")

    async def read() -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = []
        while True:
            is_last = done.is_set()
            found = await feed_of(customer, after=seen[-1]["sequence"] if seen else 0, page_size=7)
            seen += found
            if is_last and not found:
                return seen

    readers = [asyncio.create_task(read()) for _ in range(3)]
    await asyncio.gather(*(write(number) for number in range(8)))
    done.set()
    whole = await feed_of(customer)
    assert [event["sequence"] for event in whole] == list(range(1, len(whole) + 1))
    for reader in readers:
        assert await reader == whole
    counted = [event["type"] for event in whole]
    for type_, number in {
        "token.create": 33,
        "database.ready": 8,
        "database.update": 32,
        "database.deleted": 8,
    }.items():
        assert counted.count(type_) == number, type_


@pytest.fixture
async def feeds(storage_url: str) -> AsyncIterator[list[tuple[Store, Feed]]]:
    """Three feeds over one storage, each with connections of its own, as three processes have them."""
    clock = SystemClock()
    stores = [Store(storage_url) for _ in range(3)]
    await migrate(stores[0])
    async with stores[0].session() as session:
        session.add(Account(id="ac_1", email="a@example.com", password_hash="", plan="roomy", created_at=clock.now()))
        await session.commit()
    yield [(store, Feed(store=store, clock=clock)) for store in stores]
    for store in stores:
        await store.close()


async def append(store: Store, feed: Feed, resource_id: str, *, keep: bool = True) -> None:
    """Add an event in a transaction of its own, or roll it back."""
    async with store.session() as session:
        await feed.append(session, account_id="ac_1", type_="token.create", resource_id=resource_id)
        await (session.commit() if keep else session.rollback())


async def test_several_processes_write_one_feed(feeds: list[tuple[Store, Feed]]) -> None:
    """Two processes write, commit and roll back at once; a third sees what was committed, once and in order."""
    *writers, (_, reading) = feeds
    seen: list[tuple[int, str]] = []

    async def write(who: int, number: int) -> None:
        await append(*writers[who], f"{who}-{number}", keep=number % 5 != 0)

    async def read() -> None:
        while len(seen) < 64:
            after = seen[-1][0] if seen else 0
            events = await reading.read("ac_1", after=after, limit=5)
            seen.extend((event.sequence, event.resource_id) for event in events)
            await asyncio.sleep(0)

    async with asyncio.timeout(60):
        await asyncio.gather(read(), *(write(who, number) for who in range(2) for number in range(40)))
    assert [sequence for sequence, _ in seen] == list(range(1, 65))
    assert {resource for _, resource in seen} == {f"{who}-{n}" for who in range(2) for n in range(40) if n % 5}


async def test_a_place_is_free_again_after_a_rollback(feeds: list[tuple[Store, Feed]]) -> None:
    """What was not committed is in no feed and leaves no gap."""
    (store, feed), *_ = feeds
    for keep in (True, False, True):
        await append(store, feed, f"keep-{keep}", keep=keep)
    events = await feed.read("ac_1", after=0, limit=10)
    assert [(event.sequence, event.resource_id) for event in events] == [(1, "keep-True"), (2, "keep-True")]


async def test_old_events_go_and_places_stay(feeds: list[tuple[Store, Feed]]) -> None:
    """After 90 days an event is forgotten, not before; the next one goes on counting."""
    (store, _), *_ = feeds
    clock = ManualClock()
    feed = Feed(store=store, clock=clock)
    await append(store, feed, "old")
    clock.advance(timedelta(days=1).total_seconds())
    await append(store, feed, "young")
    clock.advance(timedelta(days=89).total_seconds())
    await feed.forget_old()
    assert [event.resource_id for event in await feed.read("ac_1", after=0, limit=10)] == ["old", "young"]
    clock.advance(1)
    await feed.forget_old()
    await append(store, feed, "new")
    events = await feed.read("ac_1", after=0, limit=10)
    assert [(event.sequence, event.resource_id) for event in events] == [(2, "young"), (3, "new")]


async def test_a_change_and_what_is_told_of_it_are_one(stack: Stack, customer: Customer) -> None:
    """A change whose event cannot be written is undone, and so is its entry in the record; the next one goes well."""
    store, account_id = stack.server.store, customer.account_id
    head = len(await feed_of(customer))
    put_back = text("UPDATE event_heads SET sequence = :sequence WHERE account_id = :account_id")
    async with store.session() as session:
        feed = Feed(store=store, clock=stack.clock)
        await feed.append(session, account_id=account_id, type_="in.the-way", resource_id="x")
        await session.execute(put_back, {"sequence": head, "account_id": account_id})
        await session.commit()
    with structlog.testing.capture_logs():  # to print a bug with all its variables takes seconds
        failed = await customer.by_login("POST", "/api/portal/tokens", json={"name": "undone"})
    assert failed.status_code == 500
    async with store.session() as session:
        await session.execute(put_back, {"sequence": head + 1, "account_id": account_id})
        await session.commit()
    await customer.new_token(name="done")
    tokens = (await customer.by_login("GET", "/api/portal/tokens")).json()
    assert [token["name"] for token in tokens] == ["test", "done"]
    assert [event["type"] for event in await feed_of(customer, after=head)] == ["in.the-way", "token.create"]
    await stack.server.audit.flush()
    record = (await customer.call("GET", "/api/portal/audit")).json()
    assert [entry["sequence"] for entry in record] == list(range(1, len(record) + 1))
    outcomes = {entry["outcome"] for entry in record if entry["request_id"] == failed.headers["x-request-id"]}
    assert outcomes == {"internal"}


@pytest.fixture
async def works(storage_url: str, tmp_path: Path, catalog: Path) -> AsyncIterator[Works]:
    """A reconciler's storage, and a cluster that does as the test says."""
    works = Works(storage_url, tmp_path, Catalog.load(catalog))
    await works.open()
    yield works
    await works.close()


async def test_a_failure_says_why(works: Works) -> None:
    """What is given up is told once, with the reason in words; tries before that are not."""
    works.engine.failure = ClusterUnavailable("The cluster does not answer.")
    await works.order(within=timedelta(seconds=60))
    reconciler, feed = works.reconciler(), Feed(store=works.store, clock=works.clock)
    reconciler.start()
    for attempt in range(1, 4):
        await works.until(lambda row, attempt=attempt: row.attempts == attempt)  # type: ignore[misc]
        works.clock.advance(10)
        reconciler.wake()
    assert await feed.read("ac_1", after=0, limit=10) == []
    works.clock.advance(60)
    reconciler.wake()
    await works.until(lambda row: row.state == "failed")
    (event,) = await feed.read("ac_1", after=0, limit=10)
    assert (event.type, event.resource_id, event.resource_name) == ("database.failed", "db_1", "db-1")
    assert (event.status, event.detail, event.request_id) == ("failed", "The cluster does not answer.", None)
