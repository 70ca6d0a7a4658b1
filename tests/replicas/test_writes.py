"""What is written through two replicas at once is written once, and whole."""

import asyncio
import time
from collections import Counter
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.json_format import ParseDict
from sqlalchemy import text
from sqlmodel import col, select

from controlplane.databases.model import Database
from tests.doors import RPCS
from tests.replicas.conftest import Replicas
from tests.stack import Customer

NEW = {"engine": "postgresql", "sku": "db-s-1vcpu-1gb"}

# What there is of each token that came with a key, which is its name: one statement, so that it is of one moment.
TRACES = text("""
    SELECT token.id, token.name,
        (SELECT count(*) FROM quota_charges WHERE resource_id = token.id) AS charges,
        (SELECT count(*) FROM audit_entries WHERE target = token.id AND action = 'token.create') AS entries,
        (SELECT count(*) FROM events WHERE resource_id = token.id AND type = 'token.create') AS events,
        (SELECT count(*) FROM idempotency_keys WHERE account_id = token.account_id AND key = token.name) AS keys,
        (SELECT count(*) FROM idempotency_keys WHERE account_id = token.account_id) AS all_keys,
        (SELECT used FROM quota_uses WHERE account_id = token.account_id AND kind = 'tokens') AS used
    FROM tokens AS token WHERE token.account_id = :account_id AND token.name LIKE 'cut-%'
""")


@pytest.fixture
async def customer(replicas: Replicas) -> Customer:
    """A customer of the first replica, and so of both."""
    return await replicas.first.customer()


async def test_both_replicas_together_make_what_the_plan_allows(replicas: Replicas) -> None:
    """Of 200 creates at once at all doors of both, three are made and 197 are refused with 402."""
    customer = await replicas.first.customer(plan="small")
    create = [
        replicas.doors[number % 4].call(
            "CreateDatabase", {"database": {**NEW, "name": f"db-{number}"}}, **by_token(customer, str(number))
        )
        for number in range(200)
    ]
    answers = await asyncio.gather(*create)
    assert Counter(answer.code for answer in answers) == {"ok": 3, "quota_exceeded": 197}
    assert sorted(answer.result["name"] for answer in answers if answer.code == "ok") == await databases_of(customer)
    account = (await customer.call("GET", "/api/portal/account")).json()
    assert account["quotas"]["databases"] == {"limit": 3, "used": 3}


async def test_one_key_at_both_replicas_is_one_database(replicas: Replicas, customer: Customer) -> None:
    """A request sent at once to every door is done once: all answers are the same, and all but one are replays."""
    wanted = {"database": {**NEW, "name": "once"}}
    answers = await asyncio.gather(
        *(door.call("CreateDatabase", wanted, **by_token(customer, "one")) for door in replicas.doors * 3)
    )
    assert [answer.code for answer in answers] == ["ok"] * 12
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 11
    assert len({answer.result["id"] for answer in answers}) == 1
    assert await databases_of(customer) == ["once"]
    other = {"database": {**NEW, "name": "twice"}}
    refused = [(await door.call("CreateDatabase", other, **by_token(customer, "one"))).code for door in replicas.doors]
    assert refused == ["idempotency_mismatch"] * 4


async def test_two_requests_with_one_key_at_once(replicas: Replicas, customer: Customer) -> None:
    """Of two requests that come with one key to different replicas, one is done and the other refused."""
    codes = await asyncio.gather(
        *(
            door.call("CreateDatabase", {"database": {**NEW, "name": f"db-{number}"}}, **by_token(customer, "two"))
            for number, door in enumerate(replicas.doors)
        )
    )
    assert Counter(answer.code for answer in codes) == {"ok": 1, "idempotency_mismatch": 3}
    assert len(await databases_of(customer)) == 1


async def test_whoever_waits_at_one_replica_hears_of_the_other(replicas: Replicas, customer: Customer) -> None:
    """A reader who waits for events at the first replica gets at once what is done at the second."""
    rest, *_ = replicas.doors
    authorized = {"authorization": f"Bearer {customer.token}"}
    so_far = (await rest.call("ListEvents", **authorized)).result
    after = so_far[-1]["sequence"] if so_far else 0
    waiting = asyncio.create_task(rest.call("ListEvents", {"after": after, "wait": 12}, **authorized))
    done, _ = await asyncio.wait({waiting}, timeout=0.5)
    assert not done
    new = {"database": {**NEW, "name": "elsewhere"}}
    made = await replicas.doors[1].call("CreateDatabase", new, **authorized)
    async with asyncio.timeout(6):
        first, *_ = (await waiting).result
    assert (first["sequence"], first["type"], first["resource_id"]) == (after + 1, "database.create", made.result["id"])


async def test_two_replicas_keep_one_record(replicas: Replicas, customer: Customer) -> None:
    """Changes and refusals at both replicas at once make one record without a gap, and one feed."""
    reader = (await customer.new_token(scope="read"))["token"]
    doors, number = replicas.doors * 10, 40
    changes = [door.call("CreateToken", {"token": {"name": "t"}}, **by_login(customer)) for door in doors]
    refusals = [door.call("DeleteDatabase", {"name": "x"}, authorization=f"Bearer {reader}") for door in doors]
    answers = await asyncio.gather(*changes, *refusals)
    assert Counter(answer.code for answer in answers) == {"ok": number, "scope_denied": number}
    await replicas.check_records()
    entries = (await customer.call("GET", "/api/portal/audit")).json()
    assert [entry["sequence"] for entry in entries] == list(range(1, len(entries) + 1))
    assert sum(entry["action"] == "token.create" for entry in entries) == number + 2
    assert sum(entry["count"] for entry in entries if entry["outcome"] == "scope_denied") == number
    events = (await customer.call("GET", "/api/portal/events")).json()
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert sum(event["type"] == "token.create" for event in events) == number + 2


async def test_callers_who_hang_up_leave_whole_things(replicas: Replicas, customer: Customer) -> None:
    """A create whose caller hangs up after a moment leaves all of a token or nothing, and its key then gets it."""
    keys = [f"cut-{number}" for number in range(60)]
    began = time.monotonic()
    await asyncio.gather(
        *(door.call("CreateToken", {"token": {"name": "t"}}, **by_login(customer)) for door in replicas.doors)
    )
    took = time.monotonic() - began
    async with asyncio.TaskGroup() as group:
        callers = [
            group.create_task(hang_up(replicas, customer, keys[each::4], door=each, longest=took)) for each in range(4)
        ]
        while not all(caller.done() for caller in callers):
            await whole_tokens(replicas, customer)
    assert all(caller.result() for caller in callers)
    made = await whole_tokens(replicas, customer)
    assert made
    answers = await asyncio.gather(
        *(
            replicas.doors[number % 4].call("CreateToken", {"token": {"name": key}}, **by_login(customer, key))
            for number, key in enumerate(keys)
        )
    )
    assert {answer.code for answer in answers} == {"ok"}
    assert {answer.result["name"]: answer.result["id"] for answer in answers} == await whole_tokens(replicas, customer)
    assert made.keys() <= {answer.result["name"] for answer in answers if "idempotent-replayed" in answer.headers}


async def hang_up(replicas: Replicas, customer: Customer, keys: list[str], *, door: int, longest: float) -> int:
    """Create a token with each key, and wait for each a little longer; return how often that was not long enough."""
    stack, through_edge = replicas.stacks[door % 2], door < len(replicas.stacks)
    metadata = {name.replace("_", "-"): value for name, value in by_login(customer).items()}
    rpc, cut = RPCS["CreateToken"], 0
    create: Any = stack.channel.unary_unary(rpc.path)
    for number, key in enumerate(keys):
        patience = 0.001 + longest * number / len(keys)
        headers = {**metadata, "idempotency-key": key}
        try:
            if through_edge:
                await stack.rest.post(rpc.route, json={"name": key}, headers=headers, timeout=patience)
            else:
                raw = ParseDict({"token": {"name": key}}, rpc.request()).SerializeToString()
                await create(raw, metadata=tuple(headers.items()), timeout=patience)
        except httpx.TimeoutException:
            cut += 1
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            cut += 1
    return cut


async def whole_tokens(replicas: Replicas, customer: Customer) -> dict[str, str]:
    """Return the ids of the tokens made with keys, by their names; fail unless each is there once, with all of it."""
    rows = await replicas.last.server.store.fetch(TRACES, {"account_id": customer.account_id})
    for row in rows:
        assert (row.charges, row.entries, row.events, row.keys) == (1, 1, 1, 1)
        assert (row.all_keys, row.used) == (len(rows), len(rows) + 5)  # and those without a key
    made = {row.name: row.id for row in rows}
    assert len(made) == len(rows)
    return made


def by_login(customer: Customer, key: str | None = None) -> dict[str, str]:
    """Return the headers of a request with the customer's login, and an idempotency key if there is one."""
    headers = {"cookie": customer.cookie, "sec_fetch_site": "same-origin"}
    return headers if key is None else {**headers, "idempotency_key": key}


def by_token(customer: Customer, key: str) -> dict[str, str]:
    """Return the headers of a request with the customer's token and an idempotency key."""
    return {"authorization": f"Bearer {customer.token}", "idempotency_key": key}


async def databases_of(customer: Customer) -> list[str]:
    """Return the names of the databases that there are, sorted."""
    mine = col(Database.account_id) == customer.account_id
    return sorted(row.name for row in await customer.stack.server.store.fetch(select(Database.name).where(mine)))
