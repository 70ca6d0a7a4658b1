"""The real hosts of the data planes, in the tests' own process or in one of theirs, with credentials of their own."""

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from controlplane.functions.host.host import FunctionHost, FunctionHostSettings
from controlplane.hosts.admin import add_host
from controlplane.hosts.kinds import FUNCTIONS, PROXIES
from controlplane.hosts.model import live_hosts
from controlplane.proxies.host.host import ProxyHost, ProxyHostSettings
from tests.stack import Stack, eventually, free_port

_first_uids = itertools.count(300_000, 100)


@asynccontextmanager
async def function_host(
    stack: Stack, folder: Path, *, name: str = "functions-1", region: str = "local"
) -> AsyncIterator[FunctionHost]:
    """Take a host of functions into service, where the stack's edge looks for one, and run it."""
    secret = await new_host(stack, kind=FUNCTIONS, name=name, region=region)
    async with running_function_host(stack, secret, folder, region=region) as host:
        yield host


@asynccontextmanager
async def running_function_host(
    stack: Stack, secret: str, folder: Path, *, region: str = "local"
) -> AsyncIterator[FunctionHost]:
    """Run the host of functions with this secret until the body ends."""
    host = FunctionHost(function_host_settings(stack, secret, folder))
    await host.start()

    async def is_live() -> bool:
        if host.following.done():
            host.following.result()
        return bool(await live_hosts(stack.server.store, stack.clock, kind=FUNCTIONS, region=region))

    try:
        await eventually(is_live)
        yield host
    finally:
        await host.stop()


def function_host_settings(stack: Stack, secret: str, folder: Path) -> FunctionHostSettings:
    """Return what a host of functions must know to serve a stack."""
    first = next(_first_uids)
    return FunctionHostSettings(
        server=f"127.0.0.1:{stack.settings.grpc_port}",
        secret=secret,
        listen=stack.settings.functions_address,
        data_dir=folder,
        metrics_port=free_port(),
        uids=range(first, first + 100),
    )


@asynccontextmanager
async def proxy_host(stack: Stack, *, name: str = "proxies-1", region: str = "local") -> AsyncIterator[int]:
    """Take a host of proxies into service and run it; the port on which it carries them."""
    port = free_port()
    secret = await new_host(stack, kind=PROXIES, name=name, region=region, address=f"127.0.0.1:{port}")
    async with running_proxy_host(stack, secret, port):
        yield port


@asynccontextmanager
async def running_proxy_host(stack: Stack, secret: str, port: int) -> AsyncIterator[None]:
    """Run the host of proxies with this secret until the body ends."""
    settings = ProxyHostSettings(
        server=f"127.0.0.1:{stack.settings.grpc_port}",
        secret=secret,
        hosts=("127.0.0.1",),
        port=port,
        metrics_port=free_port(),
    )
    work = asyncio.create_task(ProxyHost(settings).run())

    async def listens() -> bool:
        if work.done():
            work.result()
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await eventually(listens)
        yield
    finally:
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work


@asynccontextmanager
async def host_process(
    stack: Stack, command: str, secret: str, folder: Path, **settings: object
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the host with this secret as an operator does, by a command and in a process of its own.

    It is ended with the body, unless it has ended by then. Settings are variables, such as HTX_PROXY_PORT.
    """
    file = folder / "secret"
    file.write_text(f"{secret}\n")
    variables = {
        "HTX_DATA_DIR": folder,
        "HTX_HOST_SECRET_FILE": file,
        "HTX_HOST_SERVER": f"127.0.0.1:{stack.settings.grpc_port}",
        **settings,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "controlplane",
        command,
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def new_host(stack: Stack, **host: Any) -> str:
    """Take a host into service, with what `add_host` must know of it; return its secret."""
    server = stack.server
    _, secret = await add_host(server.store, server.catalog, stack.clock, server.keys, **host)
    return secret
