"""Hosts of proxies: who is let in as one, and what a proxy is while its host is away, killed, full or taken away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlalchemy import delete
from sqlmodel import col, select

from controlplane.api.hosts.v1 import hosts_pb2, hosts_pb2_grpc
from controlplane.hosts.admin import HostError, remove_host
from controlplane.hosts.kinds import FUNCTIONS, PROXIES
from controlplane.hosts.model import LIVE_FOR, Host
from controlplane.proxies.model import Proxy
from tests.clock import MovableClock
from tests.hosts import host_process, new_host, running_proxy_host
from tests.proxies.socks import connect, echo, lets_in, wait_until_cut
from tests.stack import Customer, Stack, eventually, free_port

REST = "/api/portal/proxies"


class Machine:
    """A host of a region of its own, which the test starts and stops."""

    def __init__(self, stack: Stack, secret: str, port: int, name: str) -> None:
        self.stack = stack
        self.secret = secret
        self.port = port
        self.name = name

    def process(self, folder: Path) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
        """Run it as `controlplane proxy-host` does, a process of its own."""
        ports = {"HTX_PROXY_PORT": self.port, "HTX_PROXY_METRICS_PORT": free_port()}
        return host_process(self.stack, "proxy-host", self.secret, folder, **ports)

    async def order(self, customer: Customer, name: str) -> dict[str, Any]:
        """Order a proxy that this host is to carry."""
        answer = await customer.call("POST", REST, json={"name": name, "region": "elsewhere"})
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made


@pytest.fixture
async def machine(stack: Stack) -> AsyncIterator[Machine]:
    """A host in a region where there is no other, taken out of service afterwards."""
    async for each in _machine(stack):
        yield each


async def _machine(stack: Stack, *, capacity: int = 1000) -> AsyncIterator[Machine]:
    port, name = free_port(), f"elsewhere-{free_port()}"
    address = f"127.0.0.1:{port}"
    secret = await new_host(stack, kind=PROXIES, name=name, region="elsewhere", address=address, capacity=capacity)
    yield Machine(stack, secret, port, name)
    await remove_host(stack.server.store, stack.clock, name=name, force=True)


async def test_a_killed_host_has_its_proxies_again(machine: Machine, customer: Customer, tmp_path: Path) -> None:
    """A host that is killed (-9) and started again lets in whom it did before, and nobody who was deleted meanwhile."""
    async with echo() as target:
        async with machine.process(tmp_path) as process:
            await _until_live(machine)
            kept, deleted = await machine.order(customer, "kept"), await machine.order(customer, "deleted")
            for each in (kept, deleted):
                await customer.until("ready", f"{REST}/{each['name']}")
                assert await lets_in(each, target)
            process.kill()
            await process.wait()
        assert not await lets_in(kept, target)
        await customer.call("DELETE", f"{REST}/deleted")
        async with machine.process(tmp_path):
            await eventually(lambda: lets_in(kept, target))
            await customer.until("gone", f"{REST}/deleted")
            assert not await lets_in(deleted, target)


async def test_what_a_host_was_not_told_while_it_was_away(timed: tuple[Stack, MovableClock]) -> None:
    """A host that was away for long begins anew, and drops what is not among all that it is told then."""
    stack, clock = timed
    customer = await stack.customer()
    async for machine in _machine(stack):
        async with echo() as target, running_proxy_host(stack, machine.secret, machine.port):
            await _until_live(machine)
            proxy = await machine.order(customer, "a")
            await customer.until("ready", f"{REST}/a")
            reader, writer = await connect(proxy, target)
            # As if its row had gone without the host, by an operator's hand.
            async with stack.server.store.session() as session:
                await session.execute(delete(Proxy).where(col(Proxy.id) == proxy["id"]))
                await session.commit()
            clock.let_pass(seconds=LIVE_FOR.total_seconds() + 1)
            await wait_until_cut(reader)
            writer.close()
            assert not await lets_in(proxy, target)


async def test_a_proxy_waits_for_its_host(machine: Machine, customer: Customer) -> None:
    """A host that does not answer is not chosen; a deletion waits for it, and tells so."""
    async with running_proxy_host(machine.stack, machine.secret, machine.port):
        await _until_live(machine)
        await machine.order(customer, "a")
        await customer.until("ready", f"{REST}/a")
    await customer.call("DELETE", f"{REST}/a")

    async def waits() -> bool:
        progress = (await customer.call("GET", f"{REST}/a")).json()["progress"]
        return bool(progress["waiting_on"] == f"host {machine.name}" and progress.get("last_error"))

    await eventually(waits)
    async with running_proxy_host(machine.stack, machine.secret, machine.port):
        await customer.until("gone", f"{REST}/a")


async def test_a_host_that_is_taken_away(machine: Machine, customer: Customer) -> None:
    """A host is not taken out of service while it carries proxies, but by force: they have failed then, and can go."""
    store, clock = machine.stack.server.store, machine.stack.clock
    async with echo() as target, running_proxy_host(machine.stack, machine.secret, machine.port):
        await _until_live(machine)
        proxy = await machine.order(customer, "a")
        await customer.until("ready", f"{REST}/a")
        with pytest.raises(HostError, match="carries 1 proxies"):
            await remove_host(store, clock, name=machine.name, force=False)
        assert await lets_in(proxy, target)
    await remove_host(store, clock, name=machine.name, force=True)
    failed = await customer.until("failed", f"{REST}/a")
    assert "out of service" in failed["progress"]["last_error"]
    await customer.call("DELETE", f"{REST}/a")
    await customer.until("gone", f"{REST}/a")
    await new_host(machine.stack, kind=PROXIES, name=machine.name, region="elsewhere", address="127.0.0.1:1")


async def test_a_host_is_never_over_its_capacity(stack: Stack, customer: Customer) -> None:
    """Of many orders at once a host takes as many as it has room for; the rest is refused and costs nothing."""
    async for machine in _machine(stack, capacity=3):
        async with running_proxy_host(stack, machine.secret, machine.port):
            await _until_live(machine)
            bodies = [{"name": f"p{number}", "region": "elsewhere"} for number in range(12)]
            answers = await asyncio.gather(*(customer.call("POST", REST, json=body) for body in bodies))
            assert sorted(answer.status_code for answer in answers) == [201] * 3 + [409] * 9
            assert {answer.json()["code"] for answer in answers if answer.status_code == 409} == {"conflict"}
            quotas = (await customer.call("GET", "/api/portal/account")).json()["quotas"]
            assert quotas["proxies"]["used"] == 3
            for answer in answers:
                if answer.status_code == 201:
                    await customer.call("DELETE", f"{REST}/{answer.json()['name']}")
                    await customer.until("gone", f"{REST}/{answer.json()['name']}")
            rows = await stack.server.store.fetch(select(Host.used).where(col(Host.name) == machine.name))
            assert rows[0].used == 0


@pytest.mark.parametrize("credential", ["", "Bearer", "Bearer hth_" + "0" * 36, "token", "functions"])
async def test_nobody_else_is_a_host(stack: Stack, customer: Customer, credential: str) -> None:
    """Without the secret of a host of this kind, nobody gets an answer: no customer either, and no other host."""
    code = grpc.StatusCode.UNAUTHENTICATED
    if credential == "token":
        credential = f"Bearer {customer.token}"
    elif credential == "functions":
        secret = await new_host(stack, kind=FUNCTIONS, name=f"functions-{free_port()}", region="elsewhere")
        credential, code = f"Bearer {secret}", grpc.StatusCode.PERMISSION_DENIED
    stub: Any = hosts_pb2_grpc.ProxyHostServiceStub(stack.channel)
    for call, request in (
        (stub.StartProxyHost, hosts_pb2.StartProxyHostRequest()),
        (stub.PullProxies, hosts_pb2.PullProxiesRequest()),
        (stub.ReportProxyUsage, hosts_pb2.ReportProxyUsageRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(request, metadata=(("authorization", credential),))
        assert refused.value.code() is code


async def test_a_repeated_report_adds_nothing(machine: Machine, customer: Customer) -> None:
    """What a host reports twice is counted once; of what another start reports, only what is new is added."""
    stub = hosts_pb2_grpc.ProxyHostServiceStub(machine.stack.channel)
    metadata = (("authorization", f"Bearer {machine.secret}"),)
    started = await stub.StartProxyHost(hosts_pb2.StartProxyHostRequest(), metadata=metadata)
    proxy = await machine.order(customer, "a")

    async def report(process: str, up: int, instance: str = started.instance) -> None:
        traffic = hosts_pb2.ProxyTraffic(id=proxy["id"], bytes_up=up, bytes_down=2 * up, connections=1)
        request = hosts_pb2.ReportProxyUsageRequest(instance=instance, process=process, proxies=[traffic])
        await stub.ReportProxyUsage(request, metadata=metadata)

    for process, up in (("one", 10), ("one", 10), ("one", 7), ("one", 15), ("two", 5), ("two", 5)):
        await report(process, up)
    days = (await customer.call("GET", f"{REST}/a/usage")).json()["days"]
    assert (sum(day["bytes_up"] for day in days), sum(day["bytes_down"] for day in days)) == (20, 40)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await report("two", 9, instance="another")
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    await customer.call("DELETE", f"{REST}/a")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"name": "No Name"}, "is no name"),
        ({"region": "nowhere"}, "no region 'nowhere'"),
        ({"address": "127.0.0.1"}, "--address"),
        ({"address": "127.0.0.1:70000"}, "--address"),
        ({"kind": FUNCTIONS}, "leave --address out"),
    ],
)
async def test_what_is_no_host(stack: Stack, wrong: dict[str, Any], complaint: str) -> None:
    """A name, a region or an address that cannot be is refused in words."""
    given = {"kind": PROXIES, "name": "a", "region": "local", "address": "127.0.0.1:1080", **wrong}
    with pytest.raises(HostError, match=complaint):
        await new_host(stack, **given)


async def _until_live(machine: Machine) -> None:
    """Wait until the control plane has heard of the host."""

    async def is_live() -> bool:
        query = select(Host.instance).where(col(Host.name) == machine.name, col(Host.last_seen_at).is_not(None))
        return any(row.instance for row in await machine.stack.server.store.fetch(query))

    await eventually(is_live)
