"""What strangers can do to a server: little."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from controlplane.proxies.host.socks import Limits
from tests.proxies.host.proxy import (
    CONNECT,
    PASSWORD,
    Proxy,
    Target,
    echo,
    login,
    request,
    running,
)
from tests.stack import free_port


async def _is_well(proxy: Proxy, target: Target) -> None:
    """Check that nothing is left of anybody, and that a customer gets through."""
    await proxy.quiet()
    async with proxy.connected(target.port) as client:
        assert await client.says(b"ping") == b"ping"


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    talks=some.lists(
        some.tuples(
            some.sampled_from(
                [
                    b"",
                    b"\5",
                    b"\5\1\2",
                    b"\5\1\2" + login("px_1", PASSWORD),
                    b"\5\1\2" + login("px_1", PASSWORD) + b"\5\1\0\3",
                    b"\5\1\2" + login("px_1", PASSWORD) + request(CONNECT, "127.0.0.1", 1),
                ]
            ),
            some.binary(max_size=600),
            some.booleans(),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_nonsense_hurts_nobody(talks: list[tuple[bytes, bytes, bool]]) -> None:
    """Whatever comes, after however much sense, and however it breaks off: it is closed, and nothing is left of it."""

    async def talk(proxy: Proxy, sense: bytes, nonsense: bytes, *, breaks_off: bool) -> None:
        async with proxy.dial() as client:
            client.writer.write(sense + nonsense)
            if breaks_off:
                client.break_off()
                return
            client.writer.write_eof()
            await client.is_cut()

    async def scenario() -> None:
        limits = Limits(first_delay=0, connect_seconds=1)
        async with running(limits=limits, refused_ports=range(1, 65536)) as proxy:
            await asyncio.gather(*(talk(proxy, sense, rest, breaks_off=breaks) for sense, rest, breaks in talks))
            await proxy.quiet()
        assert (proxy.server._unfinished, proxy.server._tasks) == ({}, {})  # noqa: SLF001
        assert not proxy.server._of_network  # noqa: SLF001

    with capture_logs() as logs:
        asyncio.run(scenario())
    assert logs == []


@pytest.mark.parametrize("said", [b"", b"\5", b"\5\1\2", b"\5\1\2" + login("px_1", PASSWORD), b"\5\1\2\1\xff"])
async def test_a_handshake_has_its_time(said: bytes) -> None:
    """Whoever does not finish the handshake in time is cut off, wherever it has stopped."""
    async with running(limits=Limits(handshake_seconds=0.2)) as proxy, proxy.dial() as client:
        client.writer.write(said)
        await client.is_cut()
        assert proxy.refused("slow") == 1


async def test_dribbling_gains_no_time() -> None:
    """The time is for the whole handshake: whoever sends a byte now and then is cut off just so."""
    async with running(limits=Limits(handshake_seconds=0.3)) as proxy, proxy.dial() as client:

        async def dribble() -> None:
            for byte in b"\5\1\2\1\xff" + b"u" * 255 + b"\xff":
                client.writer.write(bytes([byte]))
                await client.writer.drain()
                await asyncio.sleep(0.02)

        with pytest.raises(ConnectionError):
            await dribble()
        assert proxy.refused("slow") == 1


async def test_an_address_has_so_many_unfinished_handshakes() -> None:
    """One more than an address may have is closed at once; others come in, and so does it when one has ended."""
    limits = Limits(handshakes_per_address=3, handshake_seconds=600)
    async with running(limits=limits) as proxy, Target(echo) as target, AsyncExitStack() as stack:
        waiting = [await stack.enter_async_context(proxy.dial()) for _ in range(3)]
        async with proxy.dial() as fourth:
            await fourth.is_cut()
        assert proxy.refused("handshakes") == 1
        async with proxy.dial(source="127.0.0.2") as other, proxy.dial("::1") as another:
            assert [await other.log_in(), await another.log_in()] == [0, 0]
        await waiting[0].connect("127.0.0.1", target.port)  # which ends its handshake
        async with proxy.dial() as next_one:
            assert await next_one.log_in() == 0


async def test_the_oldest_handshake_makes_room() -> None:
    """Where all handshakes of a host are taken, the oldest unfinished one is dropped for a new client."""
    limits = Limits(handshakes=2, handshake_seconds=600)
    async with running(limits=limits) as proxy, proxy.dial() as oldest, proxy.dial() as older:
        await older.log_in()
        async with proxy.dial() as newest:
            assert await newest.log_in() == 0
            await oldest.is_cut()
            older.writer.write(request(CONNECT, "127.0.0.1", free_port()))
            assert (await older.reader.read())[:2] == b"\5\5"


async def test_stopping_cuts_everything() -> None:
    """When the server stops, nothing of it stays open: not what is carried, nor what shakes hands, nor the port."""
    async with (
        Target(echo) as target,
        running() as proxy,
        proxy.dial() as shaking,
        proxy.connected(target.port) as carried,
    ):
        carried.writer.write(b"ping")
        await carried.reader.readexactly(4)
        await proxy.server.stop()
        assert await carried.is_cut()
        await shaking.is_cut()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)


async def test_a_port_that_is_taken_is_an_error() -> None:
    """Two servers do not share a port without noticing."""
    async with running() as first, running() as second:
        with pytest.raises(OSError, match="in use"):
            await second.server.start(["127.0.0.1"], first.port)


async def test_nothing_says_where_anybody_goes() -> None:
    """Neither metrics nor logs have a customer's name, password or destination, even when something goes wrong."""
    with capture_logs() as logs:
        async with running(limits=Limits(first_delay=0)) as proxy, Target(echo) as target:
            async with proxy.connected(target.port, "127.0.0.1") as client:
                await client.says(b"secret payload")
            async with proxy.dial() as client:
                await client.log_in("px_1", b"secret password")
            async with proxy.dial() as client:
                await client.log_in()
                await client.ask(CONNECT, b"secret.invalid", 80)
            broken = proxy.server._socks._destinations  # noqa: SLF001
            broken.resolve = None  # type: ignore[assignment, method-assign]
            async with proxy.dial() as client:
                await client.log_in()
                client.writer.write(request(CONNECT, b"secret.invalid", 80))
                await client.reader.read()
            said = generate_latest(proxy.registry).decode()
    assert [entry["event"] for entry in logs] == ["connection_failed"]
    for words in ("secret", "127.0.0.1", str(target.port), "px_1"):
        assert words not in said + repr(logs)
    assert 'htx_proxy_refused_total{reason="name"} 1.0' in said
