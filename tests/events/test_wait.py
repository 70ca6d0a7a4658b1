"""Waiting for an event: it comes at once, from wherever, and whoever waits costs nothing and is sent home in time."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import httpx
import pytest

from controlplane.api.v1 import events_pb2, events_pb2_grpc
from controlplane.clock import SystemClock
from controlplane.events.feed import Feed
from controlplane.local.postgres import EmbeddedPostgres
from controlplane.sql import Store
from tests.clock import MovableClock
from tests.doors import Door
from tests.events.conftest import EVENTS, ask, feed_of
from tests.stack import Customer, Stack, eventually

SOON = 10  # seconds; much less than is waited for, much more than it takes


def waiters(stack: Stack) -> dict[str, set[asyncio.Event]]:
    """Return who waits in the stack's server, by account."""
    return stack.server.house.feed._waiting._waiters  # noqa: SLF001 - nothing shows from outside that somebody waits


async def until_waiting(stack: Stack, customer: Customer, *, number: int = 1) -> None:
    """Wait until so many wait for events of an account."""

    async def waiting() -> bool:
        return len(waiters(stack).get(customer.account_id, ())) == number

    await eventually(waiting)


def stop_looking(stack: Stack) -> None:
    """Stop looking for other processes' events until somebody waits anew: only what is announced wakes now."""
    watch = stack.server.house.feed._waiting._watch  # noqa: SLF001
    assert watch is not None
    watch.cancel()


@pytest.fixture
async def elsewhere(stack: Stack) -> AsyncIterator[tuple[Store, Feed]]:
    """A feed on the stack's storage, with connections of its own, as another process has it."""
    store = Store(stack.settings.storage_url)
    yield store, Feed(store=store, clock=SystemClock())
    await store.close()


async def test_what_is_there_is_not_waited_for(customer: Customer, door: Door) -> None:
    """A question that can be answered is answered at once, whatever it would wait."""
    async with asyncio.timeout(SOON):
        answer = await door.call("ListEvents", {"after": 1, "wait": 30}, authorization=f"Bearer {customer.token}")
    assert [event["type"] for event in answer.result] == ["token.create"]


async def test_a_change_wakes_whoever_waits(stack: Stack, customer: Customer) -> None:
    """All who wait get the event of a change as soon as it is committed, and where to go on from."""
    async with asyncio.timeout(SOON):
        asked = [asyncio.create_task(ask(customer, after=2, wait=30)) for _ in range(20)]
        await until_waiting(stack, customer, number=20)
        stop_looking(stack)
        made = await customer.new_token(name="awaited")
        answers = await asyncio.gather(*asked)
    for answer in answers:
        assert [(event["type"], event["resource_id"]) for event in answer.json()] == [("token.create", made["id"])]
        assert answer.links["next"]["url"] == f"{EVENTS}?after=3&wait=30"
    assert customer.account_id not in waiters(stack)


async def test_another_process_wakes_whoever_waits(
    stack: Stack, customer: Customer, elsewhere: tuple[Store, Feed]
) -> None:
    """An event that another process commits is answered as well, though nobody announces it here."""
    store, feed = elsewhere
    async with asyncio.timeout(SOON):
        asked = asyncio.create_task(feed_of(customer, after=2, wait=30))
        await until_waiting(stack, customer)
        async with store.session() as session:
            await feed.append(session, account_id=customer.account_id, type_="far.away", resource_id="x")
            await session.commit()
        assert [event["type"] for event in await asked] == ["far.away"]


async def test_an_outcome_wakes_whoever_waits(stack: Stack, customer: Customer, postgres: EmbeddedPostgres) -> None:
    """Whoever follows the feed hears of what was provisioned, and not only of what was asked for."""
    await customer.create_database("awaited")
    connection = (await customer.call("GET", "/api/portal/databases/awaited/connection")).json()
    admin = await asyncpg.connect(postgres.admin_dsn)
    name = connection["database"]
    await admin.execute("SELECT pg_advisory_lock(hashtextextended($1, 0))", name)  # its deletion waits
    await customer.call("DELETE", "/api/portal/databases/awaited")
    async with asyncio.timeout(SOON):
        asked = asyncio.create_task(feed_of(customer, after=-1, wait=30))
        await until_waiting(stack, customer)
        stop_looking(stack)
        await admin.close()
        assert [event["type"] for event in await asked] == ["database.deleted"]


async def test_others_are_not_woken(stack: Stack, customer: Customer) -> None:
    """What happens in another account answers nobody here: after the wait the answer is empty."""
    stranger = await stack.customer()
    began = time.monotonic()
    asked = asyncio.create_task(ask(customer, after=2, wait=1))
    await until_waiting(stack, customer)
    await stranger.new_token()
    answer = await asked
    assert (answer.json(), answer.links["next"]["url"]) == ([], f"{EVENTS}?after=2&wait=1")
    assert time.monotonic() - began >= 1


async def test_from_now_on(stack: Stack, customer: Customer) -> None:
    """-1 leaves out what has happened; the answer says where that is, also when nothing has happened since."""
    empty = await ask(customer, after=-1)
    assert (empty.json(), empty.links["next"]["url"]) == ([], f"{EVENTS}?after=2")
    shown = await _native(stack.channel, customer, after=-1)
    assert (list(shown.events), shown.last_sequence) == ([], 2)
    call = _native(stack.channel, customer, after=-1, wait=30)
    await until_waiting(stack, customer)
    await customer.new_token()
    async with asyncio.timeout(SOON):
        assert [event.sequence for event in (await call).events] == [3]
    shown = await _native(stack.channel, customer, page_size=2)
    assert ([event.sequence for event in shown.events], shown.last_sequence) == ([1, 2], 2)


async def test_waiting_costs_one_request(customer: Customer) -> None:
    """However long a request waits, it counts once in the rate."""
    token = (await customer.new_token(rate_limit_per_minute=10))["token"]
    left = []
    for _ in range(2):
        answer = await customer.call("GET", EVENTS, token=token, params={"after": 3, "wait": 1})
        left.append((answer.json(), answer.headers["ratelimit-remaining"]))
    assert left == [([], "9"), ([], "8")]


@pytest.mark.parametrize("end", ["token", "login"])
async def test_who_is_shut_out_while_waiting_gets_nothing(stack: Stack, customer: Customer, end: str) -> None:
    """A token that is revoked, or a login that ends, while it waits gets a 401 instead of the event."""
    made = await customer.new_token(scope="read")
    path = f"{EVENTS}?after=-1&wait=30"
    if end == "token":
        asked = asyncio.create_task(customer.call("GET", path, token=made["token"]))
    else:
        asked = asyncio.create_task(customer.by_login("GET", path))
    await until_waiting(stack, customer)
    if end == "token":
        await customer.by_login("DELETE", f"/api/portal/tokens/{made['id']}")
    else:
        await customer.by_login("DELETE", "/api/portal/session")
    async with asyncio.timeout(SOON):
        refused = await asked
    assert (refused.status_code, refused.json()["code"]) == (401, "unauthenticated")


async def test_who_hangs_up_waits_no_longer(stack: Stack, customer: Customer) -> None:
    """A client that goes away, through either door, leaves nobody waiting."""
    async with httpx.AsyncClient(base_url=str(stack.rest.base_url)) as client:
        headers = {"authorization": f"Bearer {customer.token}"}
        asked = asyncio.create_task(client.get(f"{EVENTS}?after=2&wait=30", headers=headers, timeout=60))
        await until_waiting(stack, customer)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
    await until_waiting(stack, customer, number=0)
    call = _native(stack.channel, customer, after=2, wait=30)
    await until_waiting(stack, customer)
    call.cancel()
    await until_waiting(stack, customer, number=0)
    assert customer.account_id not in waiters(stack)


async def test_the_edge_waits_along(timed: tuple[Stack, MovableClock]) -> None:
    """A wait that is longer than the edge gives other requests ends with an empty answer, and not with a 504."""
    stack, _ = timed
    customer = await stack.customer()
    assert stack.settings.upstream_timeout == 3
    began = time.monotonic()
    assert (await ask(customer, after=2, wait=5)).json() == []
    assert time.monotonic() - began >= 5


async def test_a_server_that_stops_sends_everybody_home(folder: Path, database_url: str, catalog: Path) -> None:
    """Whoever waits when the server stops gets an answer right away, and can go on from there elsewhere."""
    own = Stack(folder / f"stops-{bool(database_url)}", database_url=database_url, catalog=catalog)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{own.settings.grpc_port}") as channel:
        async with own:
            customer = await own.customer()
            call = _native(channel, customer, after=2, wait=30)
            await until_waiting(own, customer)
            began = time.monotonic()
        shown = await call
    assert (list(shown.events), shown.last_sequence) == ([], 2)
    assert time.monotonic() - began < SOON


async def test_a_closed_feed_lets_nobody_wait(elsewhere: tuple[Store, Feed]) -> None:
    """Who asks while the server stops is answered at once."""
    _, feed = elsewhere
    feed.close()
    async with asyncio.timeout(SOON):
        assert await feed.read("ac_none", after=0, limit=1, wait=30) == []
    assert feed._waiting._watch is None  # noqa: SLF001 - a task that nobody would end


@pytest.mark.parametrize("query", [{"after": -2}, {"after": "x"}, {"wait": 31}, {"wait": -1}, {"page_size": 1001}])
async def test_what_cannot_be_asked(somebody: Customer, query: dict[str, Any]) -> None:
    """A place before -1, a wait of more than 30 seconds, and a page that is too large are refused."""
    answer = await somebody.call("GET", EVENTS, params=query)
    assert (answer.status_code, answer.json()["code"] in {"invalid_field", "invalid_request"}) == (400, True)


def _native(channel: grpc.aio.Channel, customer: Customer, **request: int) -> Any:
    """Ask natively; the call can be awaited or cancelled, and its answer is the whole message."""
    stub: Any = events_pb2_grpc.EventServiceStub(channel)
    return stub.ListEvents(events_pb2.ListEventsRequest(**request), metadata=customer.metadata)
