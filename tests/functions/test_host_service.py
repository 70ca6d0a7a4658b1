"""What the hosts of functions ask the control plane, over the real link."""

from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlmodel import col, update

from controlplane.api.hosts.v1 import hosts_pb2
from controlplane.functions.model import FunctionVersion
from tests.functions.orders import FUNCTIONS, SOURCE, create, ready, versions_of, zipped
from tests.functions.played import PlayedHost, line, played_host
from tests.stack import Customer, Stack, eventually

PATH = f"{FUNCTIONS}/thumbnails"


@pytest.fixture
async def asking(stack: Stack, folder: Path) -> AsyncIterator[PlayedHost]:
    """A host that asks only when the test has it ask, and has asked for everything that is there."""
    async with played_host(stack, folder, follows=False) as host:
        while not (await host.pull()).complete:
            pass
        yield host


@pytest.fixture
async def host(stack: Stack, folder: Path) -> AsyncIterator[PlayedHost]:
    """A host that follows, there for one test only: it would load what others are to be asked for."""
    async with played_host(stack, folder) as host:
        yield host


@pytest.fixture
async def abroad(stack: Stack, folder: Path) -> AsyncIterator[PlayedHost]:
    """A host of another region, which takes over nothing of this one's."""
    async with played_host(stack, folder, region="local", follows=False) as host:
        yield host


async def refusal(asked: Any) -> grpc.StatusCode:
    """Return how a question is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await asked
    code: grpc.StatusCode = refused.value.code()
    return code


async def authorize(host: PlayedHost, function_id: str, secret: str = "", **more: Any) -> Any:
    """Ask whether somebody with this token may call a function."""
    request = hosts_pb2.AuthorizeFunctionCallRequest(
        function_id=function_id,
        authorization=f"Bearer {secret}" if secret else "",
        **{"client_ip": "198.51.100.7", **more},
    )
    return await host.ask("AuthorizeFunctionCall", request)


async def test_a_host_is_told_what_it_is_to_hold(asking: PlayedHost, customer: Customer) -> None:
    """A new function comes with the version to load and all that its calls need, and its code on demand."""
    env = {"A": "1", "B": "ü"}
    made = await create(customer, env=env, memory_mb=64, timeout_ms=700, max_concurrency=3)
    page = await asking.pull()
    (function,) = page.functions
    assert (function.id, function.account_id, function.name) == (made["id"], customer.account_id, "thumbnails")
    assert (function.auth, function.max_concurrency, function.HasField("active")) == ("token", 3, False)
    building = function.building
    assert (building.version, building.runtime, building.entrypoint) == (1, "python3", "main.handler")
    assert (building.memory_mb, building.timeout_ms, dict(building.env)) == (64, 700, env)
    code = await asking.ask("GetFunctionCode", hosts_pb2.GetFunctionCodeRequest(version_id=building.id))
    assert (code.WhichOneof("code"), code.source) == ("source", SOURCE)
    assert (page.sequence, page.complete) == (asking.after, True)
    assert not (await asking.pull()).functions


async def test_an_archive_comes_as_it_was_sent(asking: PlayedHost, customer: Customer) -> None:
    """The code of a version that was sent as an archive is that archive."""
    archive = zipped(main__py=SOURCE)
    made = await create(customer, source=None, archive=archive)
    await asking.pull()
    request = hosts_pb2.GetFunctionCodeRequest(version_id=asking.held[made["id"]].building.id)
    code = await asking.ask("GetFunctionCode", request)
    assert (code.WhichOneof("code"), b64encode(code.archive).decode()) == ("archive", archive)


async def test_a_deleted_function_is_to_be_forgotten(host: PlayedHost, customer: Customer) -> None:
    """A host is told that a function goes, and nothing else of it."""
    made = await ready(customer)
    host.may_pull.clear()
    await customer.call("DELETE", PATH)
    request = hosts_pb2.PullFunctionsRequest(instance=host.instance, after=host.after)
    page = await host.ask("PullFunctions", request)
    host.may_pull.set()
    assert list(page.functions) in ([], [hosts_pb2.HostedFunction(id=made["id"], removed=True)])
    await customer.until("gone", PATH)
    assert made["id"] not in host.held


async def test_pages_stay_small(asking: PlayedHost, customer: Customer) -> None:
    """Functions with many large variables come a few at a time, in their order, until all are there."""
    env = {f"V{number}": "ü" * 4096 for number in range(100)}
    names = [f"large-{number}" for number in range(7)]
    made = [(await create(customer, name, env=env))["id"] for name in names]
    pages = [await asking.pull()]
    while not pages[-1].complete:
        pages.append(await asking.pull())
    assert len(pages) > 1
    assert all(page.ByteSize() < 6_000_000 for page in pages)
    assert [function.id for page in pages for function in page.functions] == made
    for name in names:
        await customer.call("DELETE", f"{FUNCTIONS}/{name}")  # so that no other host has to be told them


async def test_what_cannot_be_opened_keeps_nothing_else_back(
    asking: PlayedHost, stack: Stack, customer: Customer
) -> None:
    """A function whose variables no key opens is not held, and all others of its region are."""
    broken, whole = [await create(customer, name=name, env={"KEY": "value"}) for name in ("broken", "whole")]
    async with stack.server.store.session() as session:
        of_broken = update(FunctionVersion).where(col(FunctionVersion.function_id) == broken["id"])
        await session.execute(of_broken.values(env_sealed=stack.server.keys.encrypt(b"{}", bound_to="another")))
        await session.commit()
    pulled = {function.id: function for function in (await asking.pull()).functions}
    assert pulled[broken["id"]].removed
    assert pulled[whole["id"]].building.env == {"KEY": "value"}


async def test_a_host_gets_only_what_it_can_run(stack: Stack, folder: Path, customer: Customer) -> None:
    """Another runtime's functions are none of a host's, and a version with the internet none of one that has none."""
    async with (
        played_host(stack, folder, network=True) as able,
        played_host(stack, folder, runtimes=("nodejs",), follows=False) as other,
        played_host(stack, folder, follows=False) as without,
    ):
        made = await create(customer, allow_network=True)

        async def is_ready() -> bool:
            for page in (await other.pull(), await without.pull()):
                told.extend(function for function in page.functions if function.id == made["id"])
            return bool((await customer.call("GET", PATH)).json()["status"] == "ready")

        told: list[hosts_pb2.HostedFunction] = []
        await eventually(is_ready)
        assert able.held[made["id"]].active.allow_network
        assert told
        assert not any(function.HasField("building") or function.HasField("active") for function in told)
        assert (made["id"] in other.held, made["id"] in without.held) == (False, True)


async def test_the_first_report_of_a_build_stands(asking: PlayedHost, customer: Customer) -> None:
    """What is said later of the same version changes nothing, be it the opposite; nor is what is said of none."""
    made = await create(customer)
    await asking.pull()
    version_id = asking.held[made["id"]].building.id
    await asking.report(version_id)
    for error in ("", "too late"):
        await asking.report(version_id, error)
    await asking.report("fv_none", "of nothing")
    (version,) = await versions_of(customer)
    assert (version["status"], version.get("error"), version["active"]) == ("ready", None, True)
    page = await asking.pull()
    assert [function.active.version for function in page.functions] == [1]


async def test_an_error_is_kept_as_far_as_it_can_be(asking: PlayedHost, customer: Customer) -> None:
    """A long error is cut, and a character that no row can have is replaced."""
    made = await create(customer)
    await asking.pull()
    await asking.report(asking.held[made["id"]].building.id, f"\0{'x' * 10_000}")
    found = await customer.until("failed", PATH)
    assert found["progress"]["last_error"] == "\N{REPLACEMENT CHARACTER}" + "x" * 1999


async def test_another_region_is_none_of_its_business(host: PlayedHost, abroad: PlayedHost, customer: Customer) -> None:
    """A host gets no function or code of another region, cannot end a build there, and nobody calls through it."""
    host.may_load.clear()
    try:
        made = await create(customer)
        assert made["id"] not in {function.id for function in (await abroad.pull()).functions}

        async def told() -> bool:
            return made["id"] in host.held

        await eventually(told)
        version_id = host.held[made["id"]].building.id
        request = hosts_pb2.GetFunctionCodeRequest(version_id=version_id)
        assert await refusal(abroad.ask("GetFunctionCode", request)) is grpc.StatusCode.NOT_FOUND
        await abroad.report(version_id, "from afar")
        assert (await versions_of(customer))[0]["status"] == "building"
        assert (await authorize(abroad, made["id"], customer.token)).status == 404
    finally:
        host.may_load.set()
    await customer.until("ready", PATH)


async def test_another_start_has_to_begin_anew(asking: PlayedHost, customer: Customer) -> None:
    """Once a host has started again, what asks in the name of its earlier start is refused; the new one gets all."""
    made = await create(customer)
    await asking.pull()
    former, place = asking.instance, asking.after
    await asking.start()
    present, asking.instance, asking.after = asking.instance, former, place
    assert await refusal(asking.pull()) is grpc.StatusCode.FAILED_PRECONDITION
    assert await refusal(asking.log(1, line(made["id"], 1, "x"))) is grpc.StatusCode.FAILED_PRECONDITION
    asking.instance, asking.after = present, 0
    while not (await asking.pull()).complete:
        pass
    assert made["id"] in asking.held


async def test_who_may_call(host: PlayedHost, stack: Stack, customer: Customer) -> None:
    """A token of the account that permits it may call; no token, another account's, and a lesser one may not."""
    made = await ready(customer)
    first, second = [await authorize(host, made["id"], customer.token) for _ in range(2)]
    assert (first.status, first.error, second.status) == (0, "", 0)
    assert int(second.headers["ratelimit-remaining"]) == int(first.headers["ratelimit-remaining"]) - 1
    strangers = (await stack.customer()).token
    revoked = await customer.new_token()
    await customer.by_login("DELETE", f"/api/portal/tokens/{revoked['id']}")
    for secret in ("", strangers, revoked["token"], "htx_nonsense"):
        refused = await authorize(host, made["id"], secret)
        assert (refused.status, refused.code, refused.headers["www-authenticate"]) == (401, "unauthenticated", "Bearer")
    for lesser in ({"scope": "read"}, {"permissions": ["functions:get"]}, {"scope": "databases"}):
        refused = await authorize(host, made["id"], (await customer.new_token(**lesser))["token"])
        assert (refused.status, refused.code) == (403, "scope_denied"), lesser
        assert "functions:invoke" in refused.error
    fitting = await customer.new_token(permissions=["functions:invoke"])
    assert (await authorize(host, made["id"], fitting["token"])).status == 0
    assert (await authorize(host, "fn_none", customer.token)).status == 404


async def test_from_where_and_how_often(host: PlayedHost, stack: Stack, customer: Customer) -> None:
    """A call counts against the token's addresses and rate, and is noted as its use."""
    made = await ready(customer)
    bound = await customer.new_token(allowed_ips=["203.0.113.0/24"], rate_limit_per_minute=2)
    refused = await authorize(host, made["id"], bound["token"])
    assert (refused.status, refused.code) == (403, "ip_denied")
    for _ in range(2):
        assert (await authorize(host, made["id"], bound["token"], client_ip="203.0.113.9")).status == 0
    refused = await authorize(host, made["id"], bound["token"], client_ip="203.0.113.9")
    assert (refused.status, refused.code, refused.headers["ratelimit-remaining"]) == (429, "rate_limited", "0")
    assert int(refused.headers["retry-after"]) > 0
    await stack.server.uses.flush()
    used = (await customer.by_login("GET", f"/api/portal/tokens/{bound['id']}")).json()
    assert (used["last_used_ip"], used["used_permissions"]) == ("203.0.113.9", ["functions:invoke"])
    assert used["refused_requests"] == 2
