"""When a function is ready, has failed or is gone: by what the hosts of its region say, and by the time they take."""

from pathlib import Path

import grpc
import pytest
from sqlalchemy import func
from sqlmodel import col, select

from controlplane.functions.logs import FunctionLogHead, FunctionLogLine
from controlplane.functions.model import Function, FunctionCode, FunctionVersion
from controlplane.functions.provisioner import FunctionProvisioner
from controlplane.reconcile.step import NotYet
from tests.clock import MovableClock
from tests.functions.orders import FUNCTIONS, create, patch, ready
from tests.functions.played import PlayedHost, line, played_host
from tests.stack import Customer, Stack, eventually

PATH = f"{FUNCTIONS}/thumbnails"


async def until_waiting(customer: Customer, reason: str) -> None:
    """Wait until a function waits for this reason."""

    async def waits() -> bool:
        found = (await customer.call("GET", PATH)).json()
        return bool(found.get("progress", {}).get("last_error") == reason)

    await eventually(waits)


async def take_over(host: PlayedHost) -> None:
    """Take over what has changed, and say so."""
    await host.pull()
    await host.pull()


async def test_every_host_that_answers_is_waited_for(
    stack: Stack, folder: Path, customer: Customer, host: PlayedHost
) -> None:
    """A function is ready once all hosts have it, not only the one that has loaded it; and gone once none has it."""
    async with played_host(stack, folder, follows=False) as slow:
        made = await create(customer)
        await until_waiting(customer, "A host has not taken it over yet.")
        assert host.held[made["id"]].HasField("active")
        await take_over(slow)
        assert (await customer.until("ready", PATH))["version"] == 1
        assert slow.held[made["id"]].active.version == 1
        await customer.call("DELETE", PATH)
        await until_waiting(customer, "A host has not taken it over yet.")
        assert made["id"] not in host.held
        await take_over(slow)
        await customer.until("gone", PATH)


async def test_a_host_that_is_away_is_not_waited_for(timed: tuple[Stack, MovableClock], folder: Path) -> None:
    """Once a host has not asked for a while the others are enough; when it is back, it has to begin anew."""
    stack, clock = timed
    customer = await stack.customer()
    async with played_host(stack, folder, follows=False) as one, played_host(stack, folder, follows=False) as other:
        made = await create(customer)
        await one.pull()
        await one.report(one.held[made["id"]].building.id)
        await take_over(one)
        await until_waiting(customer, "A host has not taken it over yet.")
        clock.let_pass(seconds=16)
        await one.start()
        await take_over(one)
        await customer.until("ready", PATH)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await other.pull()
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        await other.start()
        await take_over(other)
        assert other.held[made["id"]].active.version == 1
        await customer.call("DELETE", PATH)


async def test_what_no_host_takes_in_time_has_failed_and_is_mended(
    timed: tuple[Stack, MovableClock], folder: Path
) -> None:
    """A function that no host loads in ten minutes has failed; when one does later, it is ready all the same."""
    stack, clock = timed
    customer = await stack.customer()
    async with played_host(stack, folder, follows=False) as host:
        made = await create(customer)
        clock.let_pass(minutes=11)
        failed = await customer.until("failed", PATH)
        assert failed["progress"]["last_error"] == "No host that runs functions answers."
        await host.start()
        await host.pull()
        await host.report(host.held[made["id"]].building.id)
        assert (await customer.call("GET", PATH)).json()["status"] == "updating"
        await take_over(host)
        found = await customer.until("ready", PATH)
        assert (found["version"], "progress" in found, found["observed_generation"]) == (1, False, 1)


async def test_a_change_that_no_host_takes_in_time_leaves_the_version_before(
    timed: tuple[Stack, MovableClock], folder: Path
) -> None:
    """A function that answers never fails: after ten minutes it says why the order is not real, and waits no more."""
    stack, clock = timed
    customer = await stack.customer()
    async with played_host(stack, folder, follows=False) as host:
        made = await create(customer)
        await host.pull()
        await host.report(host.held[made["id"]].building.id)
        await take_over(host)
        await customer.until("ready", PATH)
        await patch(customer, memory_mb=64)
        clock.let_pass(minutes=11)
        found = await customer.until("ready", PATH)
        assert (found["version"], found["observed_generation"]) == (1, 1)
        assert found["progress"] == {
            "waiting_on": "",
            "attempts": 0,
            "last_error": "No host that runs functions answers.",
        }
        await host.start()
        await host.pull()
        await host.report(host.held[made["id"]].building.id)
        await take_over(host)
        found = await customer.until("ready", PATH)
        assert (found["version"], found["observed_generation"], "progress" in found) == (2, 2, False)


async def test_without_hosts_a_deletion_is_done_at_once(stack: Stack, folder: Path, customer: Customer) -> None:
    """Where no host is left nobody has to let go of a function: its row goes, and its log, versions and code too."""
    async with played_host(stack, folder) as host:
        made = await ready(customer)
        await host.log(host.next_batch(), line(made["id"], 1, "hello"))
    await customer.call("DELETE", PATH)
    await customer.until("gone", PATH)
    for column in (
        FunctionVersion.function_id,
        FunctionCode.function_id,
        FunctionLogHead.function_id,
        FunctionLogLine.function_id,
    ):
        rows = await stack.server.store.fetch(select(func.count()).where(col(column) == made["id"]))
        assert rows[0][0] == 0, column


async def test_a_row_from_before_a_report_settles_nothing(stack: Stack, customer: Customer, host: PlayedHost) -> None:
    """A step that has read its row before a host's report came does not call the function ready by what came since."""
    host.may_load.clear()
    try:
        made = await create(customer)
        stale = (await stack.server.store.fetch(select(Function).where(col(Function.id) == made["id"])))[0]
    finally:
        host.may_load.set()
    await customer.until("ready", PATH)
    with pytest.raises(NotYet):
        await FunctionProvisioner(store=stack.server.store, clock=stack.clock).step(stale)
