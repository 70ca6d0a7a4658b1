"""Proxies over REST, from the order to the end, with a real host that carries real traffic."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlmodel import col, select

from controlplane.proxies.model import Proxy
from tests.proxies.socks import carry, connect, echo, lets_in, wait_until_cut
from tests.stack import Customer, Stack, eventually

PROXIES = "/api/portal/proxies"

pytestmark = pytest.mark.usefixtures("proxy_port")


@pytest.fixture(scope="module")
async def target() -> AsyncIterator[int]:
    """The port of a server to reach through proxies."""
    async with echo() as port:
        yield port


async def new_proxy(customer: Customer, name: str = "office", **wanted: Any) -> dict[str, Any]:
    """Order a proxy and wait until it is ready; with its password."""
    return await customer.create(PROXIES, name=name, **wanted)


async def test_what_was_ordered_carries_traffic(customer: Customer, target: int) -> None:
    """An ordered proxy is ready within a moment and carries a connection; its password was shown once."""
    made = (await customer.call("POST", PROXIES, json={"name": "office"})).json()
    assert (made["status"], made["username"], made["region"]) == ("provisioning", made["id"], "local")
    ready = await customer.until("ready", f"{PROXIES}/office")
    await carry(made, target, 100_000)
    assert "password" not in ready
    assert ready.items() >= {key: made[key] for key in ("id", "host", "port", "username", "allowed_ips")}.items()
    assert (await customer.call("GET", PROXIES)).json() == [ready]
    assert not await lets_in(made, target, password="not the password")


async def test_a_new_password_ends_the_old_one(customer: Customer, target: int) -> None:
    """Once the proxy is ready again, the new password works; the old one does not, and its connections are cut."""
    proxy = await new_proxy(customer)
    reader, writer = await connect(proxy, target)
    rotated = (await customer.call("POST", f"{PROXIES}/office/password")).json()
    assert rotated["password"] != proxy["password"]
    await customer.until("ready", f"{PROXIES}/office")
    await wait_until_cut(reader)
    writer.close()
    assert not await lets_in(proxy, target)
    assert await lets_in(rotated, target)


async def test_a_deletion_cuts_connections(customer: Customer, target: int) -> None:
    """A deleted proxy cuts its connections and lets nobody in; its name is free and its place in the quota too."""
    poor = await customer.stack.customer(plan="small")
    proxy = await new_proxy(poor)
    reader, writer = await connect(proxy, target)
    over = await poor.call("POST", PROXIES, json={"name": "other"})
    assert (over.status_code, over.json()["code"]) == (402, "quota_exceeded")
    deleted = await poor.call("DELETE", f"{PROXIES}/office")
    assert (deleted.status_code, deleted.json()["status"]) == (200, "deleting")
    await poor.until("gone", f"{PROXIES}/office")
    await wait_until_cut(reader)
    writer.close()
    assert not await lets_in(proxy, target)
    assert (await new_proxy(poor))["id"] != proxy["id"]


async def test_addresses_that_are_let_in(customer: Customer, target: int) -> None:
    """Only the addresses of the list are let in, and a change of it cuts whoever is not on it any more."""
    proxy = await new_proxy(customer, allowed_ips=["203.0.113.0/24"])
    assert not await lets_in(proxy, target)
    await change(customer, allowed_ips=["127.0.0.1", "203.0.113.0/24"])
    reader, writer = await connect(proxy, target)
    await change(customer, allowed_ips=["203.0.113.9"])
    await wait_until_cut(reader)
    writer.close()
    await change(customer, allowed_ips=[])
    assert await lets_in(proxy, target)


async def change(customer: Customer, **wanted: Any) -> None:
    """Change the proxy and wait until that is in force."""
    answer = await customer.call("PATCH", f"{PROXIES}/office", json=wanted)
    assert answer.status_code == 200, answer.text
    await customer.until("ready", f"{PROXIES}/office")


async def test_an_expired_proxy(customer: Customer, target: int) -> None:
    """When its time is over a proxy cuts its connections, lets nobody in and says so; given more time it goes on."""
    soon = datetime.now(UTC) + timedelta(seconds=1.5)
    proxy = await new_proxy(customer, expires_at=soon.isoformat())
    reader, writer = await connect(proxy, target)
    await wait_until_cut(reader)
    writer.close()
    await customer.until("expired", f"{PROXIES}/office")
    assert not await lets_in(proxy, target)
    await change(customer, expires_at=None)
    assert await lets_in(proxy, target)


async def test_what_went_through_is_counted_to_the_byte(customer: Customer, target: int) -> None:
    """Usage shows exactly the payload of both directions, and how many connections there were."""
    proxy = await new_proxy(customer)
    for size in (1, 1_000_003, 70_000):
        await carry(proxy, target, size)

    async def used() -> Any:
        days = (await customer.call("GET", f"{PROXIES}/office/usage")).json()["days"]
        return days if days and days[-1]["connections"] == 3 else None

    total = 1 + 1_000_003 + 70_000
    days = await eventually(used)
    assert sum(day["bytes_up"] for day in days) == sum(day["bytes_down"] for day in days) == total


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "Office"}, "name"),
        ({"name": "a", "region": "nowhere"}, "region"),
        ({"name": "a", "allowed_ips": ["0.0.0.0/0"]}, "allowed_ips[0]"),
        ({"name": "a", "allowed_ips": ["203.0.113.7/24", "x"]}, "allowed_ips[0]"),
        ({"name": "a", "expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
    ],
)
async def test_what_cannot_be_ordered(somebody: Customer, body: dict[str, Any], field: str) -> None:
    """A name, a region, an address or a time that cannot be is refused with its field, before anything is there."""
    answer = await somebody.call("POST", PROXIES, json=body)
    assert (answer.status_code, answer.json()["fields"][0]["field"]) == (400, field)
    assert (await somebody.call("GET", PROXIES)).json() == []


async def test_names_are_unique(customer: Customer) -> None:
    """Of two orders of one name at the same time, one is refused with 409 and costs nothing."""
    answers = await asyncio.gather(*(customer.call("POST", PROXIES, json={"name": "twice"}) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
    quotas = (await customer.call("GET", "/api/portal/account")).json()["quotas"]
    assert quotas["proxies"]["used"] == 1


async def test_a_region_without_hosts(customer: Customer) -> None:
    """Where no host carries proxies, none can be ordered, and the regions say so."""
    regions = {each["name"]: each for each in (await customer.call("GET", "/api/portal/regions")).json()}
    assert regions["local"]["proxies"]
    without = next(name for name, region in regions.items() if not region["proxies"])
    answer = await customer.call("POST", PROXIES, json={"name": "a", "region": without})
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")


async def test_stale_changes_are_refused(customer: Customer) -> None:
    """A change with the ETag of an older state is refused with 412."""
    await new_proxy(customer)
    etag = (await customer.call("GET", f"{PROXIES}/office")).headers["etag"]
    await change(customer, allowed_ips=["127.0.0.1"])
    answer = await customer.call("DELETE", f"{PROXIES}/office", headers={"if-match": etag})
    assert (answer.status_code, answer.json()["code"]) == (412, "stale")


async def test_no_password_is_kept(stack: Stack, customer: Customer) -> None:
    """The storage has a salted digest of a proxy's password, and the password nowhere."""
    proxy = await new_proxy(customer)
    if stack.server.store.is_sqlite:
        files = stack.settings.data_dir.glob("controlplane.db*")
        assert not any(proxy["password"].encode() in file.read_bytes() for file in files)
    rows = await stack.server.store.fetch(select(Proxy).where(col(Proxy.id) == proxy["id"]))
    assert proxy["password"] not in repr(rows)
