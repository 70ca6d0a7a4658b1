"""The rate limit: never more than the limit in any 60 seconds, and never less than could be."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as some

from controlplane.access.rate import WINDOW, LocalLimiter
from tests.clock import ManualClock, MovableClock
from tests.doors import Rest
from tests.stack import Stack
from tests.valkey import StandingLimiter, ValkeyServer

# Whole quarters of a second, which floats add up exactly.
GAPS = some.integers(0, 240).map(lambda quarters: quarters / 4)
STEPS = some.lists(some.tuples(GAPS, some.sampled_from(["hit", "hit", "hit", "look", "forgive"])), max_size=80)
_numbers = itertools.count()


@pytest.fixture(scope="module", params=["local", "valkey"])
async def rate(request: pytest.FixtureRequest) -> AsyncIterator[StandingLimiter]:
    """Each limiter in turn, with a time that the test moves."""
    if request.param == "local":
        clock = ManualClock()
        yield StandingLimiter(LocalLimiter(clock), clock)
        return
    async with ValkeyServer() as server:
        standing = await server.standing_limiter()
        yield standing
        await standing.limiter.close()


@pytest.fixture
def key() -> str:
    """A key under which nothing has been counted."""
    return _new_key()


@given(steps=STEPS, limit=some.integers(1, 12))
async def test_the_window_slides_exactly(rate: StandingLimiter, steps: list[tuple[float, str]], limit: int) -> None:
    """A request passes if and only if fewer than the limit passed in the 60 seconds before it."""
    key, passed = _new_key(), list[float]()
    for gap, step in steps:
        await rate.advance(gap)
        if step == "forgive":
            await rate.limiter.forgive(key)
            del passed[-1:]
            continue
        within = [time for time in passed if time > rate.now - WINDOW]
        verdict = await rate.limiter.hit(key, limit, cost=int(step == "hit"))
        assert verdict.allowed == (len(within) < limit)
        if verdict.allowed and step == "hit":
            within.append(rate.now)
            passed.append(rate.now)
        assert (verdict.limit, verdict.remaining) == (limit, limit - len(within))
        assert verdict.reset >= 1
        assert verdict.reset - 1 < min(within, default=rate.now) + WINDOW - rate.now <= verdict.reset


@given(gaps=some.lists(GAPS, max_size=80), limit=some.integers(1, 5))
async def test_waiting_as_told_is_enough(rate: StandingLimiter, gaps: list[float], limit: int) -> None:
    """Whoever was refused and waits for as long as the answer says gets in."""
    key = _new_key()
    for gap in gaps:
        await rate.advance(gap)
        verdict = await rate.limiter.hit(key, limit)
        if not verdict.allowed:
            await rate.advance(verdict.reset)
            assert (await rate.limiter.hit(key, limit)).allowed


async def test_tokens_do_not_share_a_limit(rate: StandingLimiter, key: str) -> None:
    """What one token uses up is not missing to another, and refused requests use nothing up."""
    assert [(await rate.limiter.hit(key, 2)).allowed for _ in range(5)] == [True, True, False, False, False]
    assert (await rate.limiter.hit(_new_key(), 2)).allowed
    await rate.advance(WINDOW)
    assert [(await rate.limiter.hit(key, 2)).allowed for _ in range(3)] == [True, True, False]


async def test_a_lowered_limit_holds_for_what_has_passed(rate: StandingLimiter, key: str) -> None:
    """After the limit was lowered, requests pass once enough of the earlier ones have left the window."""
    for _ in range(6):
        await rate.limiter.hit(key, 10)
        await rate.advance(5)
    verdict = await rate.limiter.hit(key, 3)  # passed at 0, 5, …, 25; it is 30 now, and those until 15 have to leave
    assert (verdict.allowed, verdict.remaining, verdict.reset) == (False, 0, 45)
    await rate.advance(44)
    assert not (await rate.limiter.hit(key, 3)).allowed
    await rate.advance(1)
    assert (await rate.limiter.hit(key, 3)).allowed


async def test_a_window_can_have_another_length(rate: StandingLimiter, key: str) -> None:
    """What is counted over an hour is free again after an hour, and not before."""
    assert (await rate.limiter.hit(key, 1, window=3600)).allowed
    await rate.advance(3599.75)
    verdict = await rate.limiter.hit(key, 1, window=3600)
    assert (verdict.allowed, verdict.reset) == (False, 1)
    await rate.advance(0.25)
    assert (await rate.limiter.hit(key, 1, window=3600)).allowed


@pytest.mark.parametrize("hours", [-100_000, 100_000])
async def test_a_jump_of_the_time_of_day_changes_nothing(hours: int) -> None:
    """Setting the machine's time neither locks anybody out nor lets anybody in, where this process counts."""
    clock = MovableClock()
    limiter = LocalLimiter(clock)
    await limiter.hit("token", 1)
    clock.jump(hours=hours)
    verdict = await limiter.hit("token", 1)
    assert (verdict.allowed, verdict.reset) == (False, 60)
    clock.let_pass(seconds=60)
    assert (await limiter.hit("token", 1)).allowed


async def test_parallel_requests_get_in_up_to_the_limit(timed: tuple[Stack, MovableClock]) -> None:
    """Of 30 requests at once exactly as many pass as the token may send; a minute later again."""
    stack, clock = timed
    customer = await stack.customer()
    token = (await customer.new_token(rate_limit_per_minute=7))["token"]
    rest = Rest(stack.rest)

    async def burst() -> list[str]:
        asks = (rest.call("ListDatabases", None, authorization=f"Bearer {token}") for _ in range(30))
        return sorted(answer.code for answer in await asyncio.gather(*asks))

    expected = ["ok"] * 7 + ["rate_limited"] * 23
    assert await burst() == expected
    clock.let_pass(seconds=55)
    assert await burst() == ["rate_limited"] * 30
    clock.jump(days=-1)
    clock.let_pass(seconds=5)
    assert await burst() == expected
    clock.jump(days=1)
    # The rate is the token's, not the account's.
    assert (await customer.call("GET", "/api/portal/databases")).status_code == 200


def _new_key() -> str:
    return f"token {next(_numbers)}"
