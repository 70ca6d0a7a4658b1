"""Hosts ask one server, customers order from another: what is ordered is in force all the same."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.hosts import function_host, proxy_host
from tests.proxies.socks import connect, echo, lets_in, wait_until_cut
from tests.replicas.conftest import Replicas
from tests.stack import eventually

FUNCTIONS, PROXIES = "/api/portal/functions", "/api/portal/proxies"
SOURCE = "def handler(event, context):\n    print('here')\n    return {'version': 1}\n"


@pytest.fixture(scope="module")
async def hosted(replicas: Replicas, folder: Path) -> AsyncIterator[Replicas]:
    """Two replicas, and a host of each kind that asks the last one."""
    async with proxy_host(replicas.last), function_host(replicas.last, folder / "functions-replicas"):
        yield replicas


async def test_a_proxy_that_another_server_has_ordered(hosted: Replicas) -> None:
    """A proxy ordered from the one is carried by a host of the other, and cut when the one deletes it."""
    customer = await hosted.first.customer()
    proxy = await customer.create(PROXIES, name="far")
    async with echo() as target:
        reader, writer = await connect(proxy, target)
        await customer.call("DELETE", f"{PROXIES}/far")
        await customer.until("gone", f"{PROXIES}/far")
        await wait_until_cut(reader)
        writer.close()
        assert not await lets_in(proxy, target)


async def test_a_function_that_another_server_has_ordered(hosted: Replicas) -> None:
    """A function ordered from the one answers at the edge of the other, and either calls it for its owner."""
    customer = await hosted.first.customer()
    made = await customer.create(FUNCTIONS, name="far", runtime="python3", source=SOURCE)
    headers = {"authorization": f"Bearer {customer.token}"}
    assert (await hosted.last.rest.get(made["path"], headers=headers)).json() == {"version": 1}
    for stack in hosted.stacks:
        answer = await stack.rest.post(f"{FUNCTIONS}/far/invoke", headers=headers)
        assert answer.json()["result"] == {"version": 1}
    waiting = asyncio.create_task(
        customer.call(
            "GET", f"{FUNCTIONS}/far/logs", params={"after": await last_line(hosted, made["name"], headers), "wait": 20}
        )
    )
    await hosted.last.rest.get(made["path"], headers=headers)
    assert {line["stream"] for line in (await waiting).json()} & {"stdout", "request"}


async def last_line(hosted: Replicas, name: str, headers: dict[str, str]) -> int:
    """Return the place of the last line once three calls are in a function's log."""

    async def place() -> int:
        lines = (await hosted.first.rest.get(f"{FUNCTIONS}/{name}/logs", headers=headers)).json()
        done = [line for line in lines if line["stream"] == "request"]
        return int(lines[-1]["sequence"]) if len(done) == 3 else 0

    return await eventually(place)


async def test_a_token_that_another_server_has_revoked(hosted: Replicas) -> None:
    """A token that the one has revoked calls no function at the edge of the other any more."""
    customer = await hosted.first.customer()
    made = await customer.create(FUNCTIONS, name="far", runtime="python3", source=SOURCE)
    token = await customer.new_token()
    headers = {"authorization": f"Bearer {token['token']}"}
    assert (await hosted.last.rest.get(made["path"], headers=headers)).status_code == 200
    await customer.by_login("DELETE", f"/api/portal/tokens/{token['id']}")
    assert (await hosted.last.rest.get(made["path"], headers=headers)).status_code == 401
