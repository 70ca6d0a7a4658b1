"""The rate limit over several processes: one exact count, and what happens while it cannot be asked."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from controlplane.access.rate import WINDOW
from controlplane.access.valkey import ValkeyLimiter
from controlplane.errors import Unavailable
from controlplane.observe.metrics import Metrics, new_metrics
from tests.clock import ManualClock
from tests.edge.conftest import make_certificate
from tests.stack import eventually, free_port
from tests.valkey import PASSWORD, PATIENCE, ValkeyServer


@pytest.fixture
async def server() -> AsyncIterator[ValkeyServer]:
    """A Valkey of the test's own."""
    async with ValkeyServer() as running:
        yield running


@pytest.fixture
def clock() -> ManualClock:
    """The clock by which a limiter pauses after an outage, and counts during one."""
    return ManualClock()


@pytest.fixture
def metrics() -> Metrics:
    """What the limiter counts about itself."""
    return new_metrics()


@pytest.fixture
async def limiter(server: ValkeyServer, clock: ManualClock, metrics: Metrics) -> AsyncIterator[ValkeyLimiter]:
    """A limiter of one process."""
    made = server.limiter(clock, metrics=metrics)
    yield made
    await made.close()


async def test_processes_share_one_exact_count(server: ValkeyServer, clock: ManualClock) -> None:
    """Of 400 requests at once in two event loops, half in each, exactly the limit passes."""

    async def passed() -> int:
        metrics = new_metrics()
        limiter = server.limiter(clock, metrics=metrics)
        verdicts = await asyncio.gather(*(limiter.hit("token", 50) for _ in range(200)))
        await limiter.close()
        assert _fallbacks(metrics) == 0
        return sum(verdict.allowed for verdict in verdicts)

    assert sum(await asyncio.gather(passed(), asyncio.to_thread(asyncio.run, passed()))) == 50


async def test_the_server_keeps_the_time(limiter: ValkeyLimiter) -> None:
    """The window slides by the server's own time."""
    assert [(await limiter.hit("minute", 1)).allowed for _ in range(2)] == [True, False]
    await limiter.hit("moment", 1, window=0.1)

    async def next_one() -> bool:
        return (await limiter.hit("moment", 1, window=0.1)).allowed

    await eventually(next_one)


async def test_time_is_kept_to_the_microsecond(server: ValkeyServer) -> None:
    """A request passes when the window is over, and not a microsecond earlier."""
    standing = await server.standing_limiter()
    await standing.advance(0.123457)
    await standing.limiter.hit("token", 1)
    await standing.advance(WINDOW - 0.000001)
    assert not (await standing.limiter.hit("token", 1)).allowed
    await standing.advance(0.000001)
    assert (await standing.limiter.hit("token", 1)).allowed
    await standing.limiter.close()


async def test_keys_go_away(server: ValkeyServer, limiter: ValkeyLimiter) -> None:
    """A key lives for a window after the last request that passed, and its name says what it is for."""
    await limiter.hit("token", 1)
    assert await server.client.keys("*") == [b"htx:rate:token"]
    assert 0 < await server.client.pttl("htx:rate:token") <= WINDOW * 1000
    await limiter.hit("other", 1, window=0.05)

    async def is_gone() -> bool:
        return bool(await server.client.keys("*") == [b"htx:rate:token"])

    await eventually(is_gone)


async def test_a_clock_that_is_set_back_locks_nobody_out_for_long(server: ValkeyServer) -> None:
    """After the server's clock was set back by a day, nobody waits for longer than a window."""
    standing = await server.standing_limiter()
    limiter = standing.limiter
    assert [(await limiter.hit("token", 3)).allowed for _ in range(4)] == [True, True, True, False]
    await standing.advance(-86400)
    verdict = await limiter.hit("token", 3)
    assert (verdict.allowed, verdict.remaining, verdict.reset) == (False, 0, WINDOW)
    assert 0 < await server.client.pttl("htx:rate:token") <= WINDOW * 1000
    await standing.advance(WINDOW)
    assert [(await limiter.hit("token", 3)).allowed for _ in range(4)] == [True, True, True, False]
    await limiter.close()


async def test_a_script_that_was_forgotten_counts_once(server: ValkeyServer, limiter: ValkeyLimiter) -> None:
    """A server that has lost the script gets it again, and the request is counted once."""
    assert (await limiter.hit("token", 2)).remaining == 1
    await server.client.script_flush()
    assert (await limiter.hit("token", 2)).remaining == 0


async def test_a_connection_that_was_closed_is_no_outage(
    server: ValkeyServer, limiter: ValkeyLimiter, metrics: Metrics
) -> None:
    """What a server does to idle connections, and a restart between two requests, are not noticed."""
    await limiter.hit("token", 2)
    await server.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert (await limiter.hit("token", 2)).remaining == 0
    await server.kill()
    await server.start()
    assert (await limiter.hit("token", 2)).remaining == 1
    assert _fallbacks(metrics) == 0


async def test_an_outage(server: ValkeyServer, limiter: ValkeyLimiter, clock: ManualClock, metrics: Metrics) -> None:
    """While there is no server each process counts for itself, and says so once; then the shared count is back."""
    await limiter.hit("token", 3)
    await server.kill()
    with structlog.testing.capture_logs() as lines:
        assert [(await limiter.hit("token", 3)).remaining for _ in range(2)] == [2, 1]
        await limiter.forgive("token")
        clock.advance(1)
        assert (await limiter.hit("token", 3)).remaining == 1
        with pytest.raises(Unavailable):
            await limiter.hit("address", 3, fail_closed=True)
        assert (_is_up(metrics), _fallbacks(metrics)) == (False, 4)
        await server.start()
        assert (await limiter.hit("token", 3)).remaining == 0  # it is not tried again at once
        clock.advance(1)
        assert [(await limiter.hit("token", 3)).remaining for _ in range(2)] == [2, 1]
    assert (_is_up(metrics), _fallbacks(metrics)) == (True, 5)
    assert [line["log_level"] for line in lines] == ["error", "info"]
    assert PASSWORD not in str(lines)


async def test_a_server_that_hangs(server: ValkeyServer, clock: ManualClock, metrics: Metrics) -> None:
    """A server that does not answer costs one request in a second its patience, and the others nothing."""
    limiter = server.limiter(clock, metrics=metrics, timeout=0.25)
    server.hang()
    assert await _waited(limiter) > 0.2
    for _ in range(3):
        # Had they all waited, one after the other or side by side, it would be 25 seconds.
        assert sum(await asyncio.gather(*(_waited(limiter) for _ in range(100)))) < 5
        clock.advance(1)
    assert not _is_up(metrics)
    server.go_on()

    async def is_up() -> bool:
        clock.advance(1)
        await limiter.hit("token", 1)
        return _is_up(metrics)

    await eventually(is_up)
    await limiter.close()


async def test_connections_are_few_and_none_outlives_a_failure(
    server: ValkeyServer, limiter: ValkeyLimiter, metrics: Metrics
) -> None:
    """However many ask at once, 8 connections do; after an answer that is an error all of them are closed."""

    async def others() -> int:
        return len(await server.client.client_list()) - 1

    await asyncio.gather(*(limiter.hit("token", 100) for _ in range(100)))
    assert await others() == 8
    await server.client.set("htx:rate:broken", "no list")
    await limiter.hit("broken", 1)
    assert not _is_up(metrics)

    async def are_closed() -> bool:
        return await others() == 0

    await eventually(are_closed)


@pytest.mark.parametrize("scheme", ["valkey", "redis"])
async def test_over_tcp(server: ValkeyServer, limiter: ValkeyLimiter, clock: ManualClock, scheme: str) -> None:
    """Whichever way a process reaches the server, it is the same count."""
    url = f"{scheme}://:{PASSWORD}@127.0.0.1:{server.port}"
    other = ValkeyLimiter(url, clock=clock, metrics=new_metrics(), timeout=PATIENCE)
    await limiter.hit("token", 2)
    assert (await other.hit("token", 2)).remaining == 0
    await other.close()


@pytest.mark.parametrize("scheme", ["valkeys", "rediss"])
async def test_a_certificate_must_be_for_the_host(
    server: ValkeyServer, clock: ManualClock, tmp_path: Path, scheme: str
) -> None:
    """Over TLS a trusted certificate is taken for its own host, and for no other."""
    certificate, key = make_certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    port = free_port()
    async with await asyncio.start_server(server.relay, "127.0.0.1", port, ssl=context):
        for host, is_taken in (("localhost", True), ("127.0.0.1", False)):
            metrics = new_metrics()
            url = f"{scheme}://:{PASSWORD}@{host}:{port}?ssl_ca_certs={certificate}"
            limiter = ValkeyLimiter(url, clock=clock, metrics=metrics, timeout=PATIENCE)
            await limiter.hit("token", 2)
            await limiter.close()
            assert _is_up(metrics) == is_taken


def test_a_url_of_another_kind_is_refused(clock: ManualClock) -> None:
    """What is no address of a Valkey is found out at the start."""
    with pytest.raises(ValueError, match="valkey"):
        ValkeyLimiter("http://127.0.0.1:6379", clock=clock, metrics=new_metrics())


async def _waited(limiter: ValkeyLimiter) -> float:
    start = time.monotonic()
    await limiter.hit("token", 1)
    return time.monotonic() - start


def _fallbacks(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("htx_limiter_fallbacks_total")


def _is_up(metrics: Metrics) -> bool:
    return metrics.registry.get_sample_value("htx_limiter_up") == 1
