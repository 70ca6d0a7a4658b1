"""The real hosts of an installation whose server is killed: they run in the tests' own process, and stay.

They reach the server by its socket, which is the same after each start, and try it again sooner than in earnest: waits
of a second would be most of the time that all kills take.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial

import pytest

from controlplane.catalog.model import Catalog
from controlplane.clock import SystemClock
from controlplane.functions.host import directory
from controlplane.functions.host.host import FunctionHost, FunctionHostSettings
from controlplane.hosts import link
from controlplane.hosts.admin import add_host
from controlplane.hosts.kinds import FUNCTIONS, PROXIES
from controlplane.keys import Keys
from controlplane.proxies.host import server
from controlplane.proxies.host.host import ProxyHost, ProxyHostSettings
from controlplane.proxies.host.socks import Limits
from tests.faults.installation import Installation
from tests.stack import eventually, free_port

_first_uids = itertools.count(900_000, 100)


@asynccontextmanager
async def function_host(installation: Installation) -> AsyncIterator[FunctionHost]:
    """Take a host of functions into service, and run it."""
    secret = await _new_host(installation, FUNCTIONS)
    first = next(_first_uids)
    settings = FunctionHostSettings(
        server=_socket(installation),
        secret=secret,
        listen=f"unix:{installation.folder}/run/functions.sock",
        data_dir=installation.folder / "functions",
        metrics_port=free_port(),
        uids=range(first, first + 100),
    )
    with _impatient():
        host = FunctionHost(settings)
        await host.start()
        try:
            await _until_heard_of(installation, host.following)
            yield host
        finally:
            await host.stop()


@asynccontextmanager
async def proxy_host(installation: Installation) -> AsyncIterator[ProxyHost]:
    """Take a host of proxies into service, and run it; to wrong logins it answers at once, as there are hundreds."""
    port = free_port()
    secret = await _new_host(installation, PROXIES, address=f"127.0.0.1:{port}")
    settings = ProxyHostSettings(
        server=_socket(installation), secret=secret, hosts=("127.0.0.1",), port=port, metrics_port=free_port()
    )
    with _impatient():
        host = ProxyHost(settings)
        work = asyncio.create_task(host.run())
        try:
            await _until_heard_of(installation, work)
            yield host
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work


async def _new_host(installation: Installation, kind: str, *, address: str = "") -> str:
    """Return the secret of a new host."""
    _, secret = await add_host(
        installation.store,
        Catalog.load(installation.folder / "catalog.toml"),
        SystemClock(),
        Keys.load(installation.folder / "keys.json"),
        kind=kind,
        name=f"{kind}-1",
        region="local",
        address=address,
    )
    return secret


def _socket(installation: Installation) -> str:
    return f"unix:{installation.folder}/run/server.sock"


@contextmanager
def _impatient() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link, "_OPTIONS", [*link._OPTIONS, ("grpc.initial_reconnect_backoff_ms", 50)])  # noqa: SLF001
        patch.setattr(link, "_TRY_AGAIN_FIRST", 0.05)
        patch.setattr(directory, "_TRY_AGAIN", 0.1)
        patch.setattr(server, "Limits", partial(Limits, first_delay=0.0, most_delay=0.0))
        yield


async def _until_heard_of(installation: Installation, work: asyncio.Task[None]) -> None:
    """Wait until a host has told that it holds all that there is, which is nothing."""

    async def is_heard_of() -> bool:
        if work.done():
            work.result()
        return all(row["instance"] for row in await installation.rows("hosts"))

    await eventually(is_heard_of)
