"""The bytes of a connection."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from controlplane.proxies.host.credentials import Usage
from controlplane.proxies.host.socks import Limits
from tests.proxies.host.proxy import Target, break_off, echo, new_credential, running
from tests.stack import eventually

MB = 1_000_000


async def test_every_byte_arrives_and_is_counted_once() -> None:
    """What both sides send arrives as it was, also after one of them has ended, and is counted to the byte."""
    up, down = secrets.token_bytes(3 * MB + 1), secrets.token_bytes(5 * MB + 7)
    got = list[bytes]()

    async def trade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read())  # until the client has ended; only then is anything sent back
        writer.write(down)
        await writer.drain()

    async with running() as proxy, Target(trade) as target, proxy.connected(target.port) as client:
        assert await client.says(up) == down
        assert got == [up]
        assert proxy.usage() == Usage(1, len(up), len(down))
        assert proxy.counted("htx_proxy_bytes_total", direction="up") == len(up)
        assert proxy.counted("htx_proxy_bytes_total", direction="down") == len(down)
        assert proxy.counted("htx_proxy_connections_made_total") == 1
        await proxy.quiet()


async def test_a_target_may_end_first() -> None:
    """After the target has ended, what the client still sends arrives."""
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def end_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.write_eof()
        got.set_result(await reader.read())

    async with running() as proxy, Target(end_first) as target, proxy.connected(target.port) as client:
        assert await client.reader.read() == b"bye"
        client.writer.write(b"x" * MB)
        client.writer.write_eof()
        assert len(await asyncio.wait_for(got, 20)) == MB
        assert proxy.usage() == Usage(1, MB, 3)


async def test_a_target_that_speaks_first_is_heard_after_the_reply() -> None:
    """What a target sends at once comes after the reply, not into it."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 welcome")

    async with running() as proxy, Target(greet) as target:
        for _ in range(20):
            async with proxy.connected(target.port) as client:
                assert await client.reader.read() == b"220 welcome"


async def test_a_break_is_passed_on_as_a_break() -> None:
    """A target that breaks off, breaks off the client: half an answer must not look like a whole one."""

    async def break_it(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        break_off(writer)

    async with running() as proxy, Target(break_it) as target, proxy.connected(target.port) as client:
        client.writer.write(b"x")
        assert await client.is_cut()
        await proxy.quiet()


async def test_a_client_that_breaks_off_breaks_off_the_target() -> None:
    """A client that breaks off, breaks off the target, and its place is free again."""
    broken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        del writer
        try:
            await reader.read()
        except ConnectionResetError:
            broken.set_result(True)
        else:
            broken.set_result(False)

    async with running() as proxy, Target(wait) as target, proxy.connected(target.port) as client:
        client.break_off()
        assert await asyncio.wait_for(broken, 20)
        await proxy.quiet()


@pytest.mark.parametrize("bytes_per_second", [0, 10 * MB])
async def test_a_slow_reader_slows_the_sender(bytes_per_second: int) -> None:
    """While one side takes nothing, the other can send no more than buffers hold; after that all of it arrives."""
    begin = asyncio.Event()
    size = 64 * MB
    digests = list[bytes]()

    async def take_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await begin.wait()
        digest = hashlib.sha256()
        while data := await reader.read(65536):
            digest.update(data)
        digests.append(digest.digest())
        del writer

    data = secrets.token_bytes(size)
    async with running() as proxy, Target(take_late) as target, proxy.connected(target.port) as client:
        proxy.credentials.put(new_credential(bytes_per_second=bytes_per_second))
        seen = list[int]()

        async def has_stopped() -> bool:
            seen.append(proxy.usage().bytes_up)
            return len(seen) > 10 and seen[-1] == seen[-10] > 0

        client.writer.write(data)
        await eventually(has_stopped)
        assert proxy.usage().bytes_up < size / 2
        proxy.credentials.put(new_credential())
        begin.set()
        client.writer.write_eof()
        await client.reader.read()
        assert digests == [hashlib.sha256(data).digest()]
        assert proxy.usage().bytes_up == size


async def test_five_hundred_at_once_get_their_own_answers() -> None:
    """Five hundred connections at the same time each carry what is theirs, and all are counted."""
    async with running(limits=Limits(handshakes_per_address=600)) as proxy, Target(echo) as target:

        async def talk(number: int) -> bool:
            said = f"{number:06}".encode() * 5000
            async with proxy.connected(target.port) as client:
                ready.append(number)
                await eventually(all_are_ready)
                return await client.says(said) == said

        async def all_are_ready() -> bool:
            return len(ready) == 500

        ready = list[int]()
        assert all(await asyncio.gather(*map(talk, range(500))))
        assert proxy.usage() == Usage(500, 500 * 30_000, 500 * 30_000)
        await proxy.quiet()


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_the_bandwidth_is_shared(direction: str) -> None:
    """All connections of a credential together carry no more than its bytes a second, and not much less."""
    rate, each, count = 2 * MB, MB, 3

    async def send(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(each))
        await writer.drain()

    async def sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        del writer

    handler, said = (sink, bytes(each)) if direction == "up" else (send, b"")
    async with running() as proxy, Target(handler) as target, AsyncExitStack() as stack:
        proxy.credentials.put(new_credential(bytes_per_second=rate))
        clients = [await stack.enter_async_context(proxy.connected(target.port)) for _ in range(count)]
        began = time.monotonic()
        await asyncio.gather(*(client.says(said) for client in clients))
        took = time.monotonic() - began
    expected = each * count / rate
    assert 0.8 * expected < took < 3 * expected


async def test_a_new_bandwidth_holds_at_once() -> None:
    """A transfer that would take hours ends when the limit is lifted in the middle of it."""
    async with running() as proxy, Target(echo) as target, proxy.connected(target.port) as client:
        proxy.credentials.put(new_credential(bytes_per_second=2000))
        answer = asyncio.create_task(client.says(bytes(20 * MB)))
        await _until(lambda: proxy.usage().bytes_up > 1000)
        assert not answer.done()
        proxy.credentials.put(new_credential())
        assert len(await asyncio.wait_for(answer, 20)) == 20 * MB


async def _until(holds: Callable[[], bool]) -> None:
    async def asked() -> bool:
        return holds()

    await eventually(asked)
