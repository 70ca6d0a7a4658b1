"""A host in the tests' own process, with the real sandbox, and the control plane that it follows."""

import contextlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from controlplane.api.hosts.v1 import hosts_pb2
from controlplane.functions.host.host import FunctionHost, FunctionHostSettings
from controlplane.functions.host.pool import Limits
from tests.functions.host.control import ACCOUNT, SECRET, Control
from tests.stack import eventually, free_port

_numbers = itertools.count()
_FIRST_UID, _UIDS = 730_000, 50

ECHO = "def handler(event, context):\n    return {'event': event, 'request_id': context.request_id}\n"
# Does what the body says: the event is a Python expression.
DO = """
import base64, os, time
def handler(event, context):
    body = event.get("body") or ""
    if event.get("isBase64Encoded"):
        body = base64.b64decode(body).decode()
    return eval(body)
"""


def settings_for(folder: Path, control: Control, **changed: Any) -> FunctionHostSettings:
    """Return the settings of a new host below a folder."""
    number = next(_numbers)
    first = _FIRST_UID + number * _UIDS
    wanted: dict[str, Any] = {
        "server": f"127.0.0.1:{control.port}",
        "secret": SECRET,
        "listen": f"unix:{folder}/fn{number}.sock",
        "data_dir": folder / f"functions-{number}",
        "metrics_port": free_port(),
        "uids": range(first, first + _UIDS),
    }
    return FunctionHostSettings(**{**wanted, **changed})


@contextlib.asynccontextmanager
async def running_host(settings: FunctionHostSettings, *, limits: Limits | None = None) -> AsyncIterator[FunctionHost]:
    """Run a host while the body runs."""
    host = FunctionHost(settings, limits=limits)
    await host.start()
    try:
        yield host
    finally:
        await host.stop()


@contextlib.asynccontextmanager
async def serving_control() -> AsyncIterator[Control]:
    """Run a control plane while the body runs."""
    control = Control()
    await control.serve()
    try:
        yield control
    finally:
        await control.go_away()


def client_of(settings: FunctionHostSettings, **wanted: Any) -> httpx.AsyncClient:
    """Return a client of a host, as the edge is one."""
    transport = httpx.AsyncHTTPTransport(uds=settings.listen.removeprefix("unix:"))
    return httpx.AsyncClient(transport=transport, base_url="http://functions.example.com", timeout=30, **wanted)


def answering(value: object) -> str:
    """Return the code of a function that answers with a value."""
    return f"def handler(event, context):\n    return {value!r}\n"


async def get(client: httpx.AsyncClient, function: hosts_pb2.HostedFunction) -> httpx.Response:
    """Call a function at its address."""
    return await client.get(f"/f/{ACCOUNT}/{function.name}")


async def until_answers(client: httpx.AsyncClient, function: hosts_pb2.HostedFunction, status: int = 200) -> None:
    """Wait until a function answers with a status."""

    async def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return (await get(client, function)).status_code == status
        return False

    await eventually(answers)


@pytest.fixture(scope="module")
async def control() -> AsyncIterator[Control]:
    """A control plane that the tests of a module share; each deploys functions of its own."""
    async with serving_control() as control:
        yield control


@pytest.fixture(scope="module")
async def host_settings(folder: Path, control: Control) -> FunctionHostSettings:
    """The settings of the module's host."""
    return settings_for(folder, control)


@pytest.fixture(scope="module")
async def host(host_settings: FunctionHostSettings, control: Control) -> AsyncIterator[FunctionHost]:
    """A host that the tests of a module share; it has said that it is there."""

    async def started() -> bool:
        return bool(control.instance)

    async with running_host(host_settings) as host:
        await eventually(started)
        yield host


@pytest.fixture
async def client(host: FunctionHost, host_settings: FunctionHostSettings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the module's host."""
    del host
    async with client_of(host_settings) as client:
        yield client


@pytest.fixture(scope="module")
async def echo(host: FunctionHost, control: Control) -> str:
    """The address of a function that returns its event."""
    del host
    return f"/f/{ACCOUNT}/{(await control.deploy(ECHO)).name}"


@pytest.fixture(scope="module")
async def do(host: FunctionHost, control: Control) -> hosts_pb2.HostedFunction:
    """A function that does what the body says."""
    del host
    return await control.deploy(DO, timeout_ms=1000)


@pytest.fixture
def does(do: hosts_pb2.HostedFunction, client: httpx.AsyncClient) -> Any:
    """Call that function with an expression."""

    async def call(expression: str, method: str = "POST") -> httpx.Response:
        return await client.request(method, f"/f/{ACCOUNT}/{do.name}", content=expression)

    return call


@pytest.fixture
async def own() -> AsyncIterator[Control]:
    """A control plane of the test's own."""
    async with serving_control() as control:
        yield control


@pytest.fixture
def own_settings(folder: Path, own: Control) -> FunctionHostSettings:
    """The settings of a host of the test's own."""
    return settings_for(folder, own)
