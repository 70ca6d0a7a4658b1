"""Which cluster takes a new database: exact under any concurrency, and said in words when there is none."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controlplane.local.postgres import EmbeddedPostgres
from tests.conftest import new_storage
from tests.stack import Customer, Stack

DATABASES = "/api/portal/databases"


@pytest.fixture(scope="module")
def crowded(folder: Path, catalog: Path) -> Path:
    """A catalogue with two small clusters in one region, and in another one that is drained."""
    base, cluster = catalog.read_text().split("[[clusters]]\n")
    small = cluster.replace("capacity = 1000", "capacity = 2").replace("local-postgresql", "second")
    drained = cluster.replace('region = "local"', 'region = "elsewhere"').replace("local-postgresql", "old")
    file = folder / "crowded.toml"
    clusters = (cluster.replace("capacity = 1000", "capacity = 3"), small, f"{drained}drained = true\n")
    file.write_text("[[clusters]]\n".join([base, *clusters]))
    return file


@pytest.fixture(scope="module")
async def stack(folder: Path, database_url: str, crowded: Path, postgres: EmbeddedPostgres) -> AsyncIterator[Stack]:
    """A stack with that catalogue."""
    url = await new_storage(postgres, "placement") if database_url else ""
    async with Stack(folder / ("place-pg" if url else "place"), database_url=url, catalog=crowded) as running:
        yield running


async def order(customer: Customer, name: str, **wanted: str) -> tuple[int, dict[str, str]]:
    """Order a database; return the status and the answer."""
    body = {"name": name, "engine": "postgresql", "sku": "db-s-1vcpu-1gb", **wanted}
    answer = await customer.call("POST", DATABASES, json=body)
    return answer.status_code, answer.json()


async def test_the_capacity_is_exact(stack: Stack, customer: Customer) -> None:
    """Of fifty orders at once as many are taken as there is room for, spread by room; the others cost no quota."""
    others = [await stack.customer() for _ in range(2)]
    callers = [customer, *others]
    answers = await asyncio.gather(*(order(callers[number % 3], f"many-{number}") for number in range(50)))
    assert Counter(status for status, _ in answers) == {201: 5, 409: 45}
    assert Counter(answer["cluster_target"] for status, answer in answers if status == 201) == {
        "local-postgresql": 3,
        "second": 2,
    }
    refused = next(answer for status, answer in answers if status == 409)
    assert refused["code"] == "conflict"
    assert "no room" in refused["error"]
    used = 0
    for caller in callers:
        quotas = (await caller.call("GET", "/api/portal/account")).json()["quotas"]
        used += quotas["databases"]["used"]
        for found in (await caller.call("GET", DATABASES)).json():
            await caller.call("DELETE", f"{DATABASES}/{found['name']}")
            await caller.until("gone", f"{DATABASES}/{found['name']}")
    assert used == 5
    status, _ = await order(customer, "again")
    assert status == 201
    await customer.call("DELETE", f"{DATABASES}/again")
    await customer.until("gone", f"{DATABASES}/again")


async def test_orders_and_deletions_at_once_do_not_block_each_other(customer: Customer) -> None:
    """An account that creates and deletes at the same time gets every order, and the counters come out at nothing."""

    async def come_and_go(name: str) -> None:
        for _ in range(4):
            status, answer = await order(customer, name)
            assert status == 201, answer
            await customer.call("DELETE", f"{DATABASES}/{name}")
            await customer.until("gone", f"{DATABASES}/{name}")

    await asyncio.gather(*(come_and_go(f"churn-{number}") for number in range(5)))
    quotas = (await customer.call("GET", "/api/portal/account")).json()["quotas"]
    assert quotas["databases"]["used"] == 0


async def test_a_region_without_the_engine_says_where_to_look(customer: Customer) -> None:
    """An engine that no cluster of the region has is a conflict that names the list of regions."""
    status, answer = await order(customer, "none", engine="mysql")
    assert (status, answer["code"]) == (409, "conflict")
    assert "/api/portal/regions" in answer["error"]
    assert "mysql" in answer["error"]


async def test_a_drained_cluster_takes_nothing_new(customer: Customer) -> None:
    """A region whose only cluster is drained takes no order, and the list of regions says so."""
    status, answer = await order(customer, "none", region="elsewhere")
    assert (status, answer["code"]) == (409, "conflict")
    regions = (await customer.call("GET", "/api/portal/regions")).json()
    assert {region["name"]: region["engines"] for region in regions} == {"local": ["postgresql"], "elsewhere": []}


async def test_a_region_that_does_not_exist_is_a_wrong_field(customer: Customer) -> None:
    """A region that is nowhere is the fault of the field, with the list to choose from."""
    status, answer = await order(customer, "none", region="mars")
    assert (status, answer["error"]) == (400, "region: there is no region 'mars': /api/portal/regions lists them")
