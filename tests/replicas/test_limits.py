"""One limit over two replicas: what passes at the one is missing at the other."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.doors import Answer
from tests.replicas.conftest import Replicas
from tests.stack import PASSWORD, Customer, eventually
from tests.valkey import ValkeyServer

LIMIT = 20


async def test_one_limit_holds_over_all_doors_of_both_replicas(replicas: Replicas) -> None:
    """Of three times the limit at once exactly the limit passes, and no two that pass are told the same remainder."""
    customer = await replicas.first.customer()
    answers = await ask_everywhere(replicas, customer)
    assert Counter(answer.code for answer in answers) == {"ok": LIMIT, "rate_limited": 2 * LIMIT}
    assert {answer.headers["ratelimit-limit"] for answer in answers} == {str(LIMIT)}
    left = sorted(int(answer.headers["ratelimit-remaining"]) for answer in answers if answer.code == "ok")
    assert left == list(range(LIMIT))
    refused = [answer for answer in answers if answer.code == "rate_limited"]
    assert {answer.headers["ratelimit-remaining"] for answer in refused} == {"0"}
    assert all(1 <= int(answer.headers["ratelimit-reset"]) <= 60 for answer in answers)
    assert fallbacks(replicas) == [0, 0]


async def test_without_valkey_each_replica_holds_the_limit(replicas: Replicas, valkey: ValkeyServer) -> None:
    """While Valkey is down, a token may ask each replica as often as its limit says, and nobody can log in."""
    customer = await replicas.first.customer()
    async with outage(replicas, valkey):
        for stack in replicas.stacks:
            answers = await ask_everywhere(Replicas((stack,), replicas.clock), customer)
            assert Counter(answer.code for answer in answers) == {"ok": LIMIT, "rate_limited": 2 * LIMIT}
        assert await log_in_everywhere(replicas, customer) == ["unavailable"] * 4
        assert all(fallbacks(replicas))


async def test_the_limit_is_shared_again_after_an_outage(replicas: Replicas, valkey: ValkeyServer) -> None:
    """Once Valkey answers again, both replicas count together as before, without a restart."""
    customer = await replicas.first.customer()
    async with outage(replicas, valkey):
        assert (await customer.call("GET", "/api/portal/databases")).status_code == 200
    before = fallbacks(replicas)
    answers = await ask_everywhere(replicas, customer)
    assert Counter(answer.code for answer in answers) == {"ok": LIMIT, "rate_limited": 2 * LIMIT}
    assert fallbacks(replicas) == before


async def ask_everywhere(replicas: Replicas, customer: Customer) -> list[Answer]:
    """Ask three times as often as a new token may, all at once, through each door by turns."""
    token = (await customer.new_token(rate_limit_per_minute=LIMIT))["token"]
    doors = replicas.doors
    return await asyncio.gather(
        *(
            doors[number % len(doors)].call("ListDatabases", authorization=f"Bearer {token}")
            for number in range(3 * LIMIT)
        )
    )


async def log_in_everywhere(replicas: Replicas, customer: Customer) -> list[str]:
    """Log in through every door; return what came of each."""
    login = {"session": {"email": customer.email, "password": PASSWORD}}
    answers = [(await door.call("CreateSession", login)).code for door in replicas.doors]
    for stack in replicas.stacks:
        stack.rest.cookies.clear()
    return answers


def fallbacks(replicas: Replicas) -> list[float]:
    """Return how many requests each replica has decided without the shared count."""
    registries = (stack.server.metrics.registry for stack in replicas.stacks)
    return [registry.get_sample_value("htx_limiter_fallbacks_total") or 0 for registry in registries]


@asynccontextmanager
async def outage(replicas: Replicas, valkey: ValkeyServer) -> AsyncIterator[None]:
    """Kill Valkey; afterwards start it again, and wait until both replicas have noticed."""
    somebody = await replicas.first.customer()

    async def noticed() -> bool:
        return await log_in_everywhere(replicas, somebody) == ["ok"] * 4

    await valkey.kill()
    try:
        yield
    finally:
        await valkey.start()
        await eventually(noticed)
