"""The rate limit: never more than the limit in any 60 seconds, and never less than could be."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as some

from controlplane.access.rate import WINDOW, RateLimiter
from tests.clock import ManualClock, MovableClock
from tests.doors import Rest
from tests.stack import Stack

# Whole quarters of a second, which floats add up exactly.
GAPS = some.lists(some.integers(0, 240).map(lambda quarters: quarters / 4), max_size=80)


@given(gaps=GAPS, limit=some.integers(1, 12))
def test_the_window_slides_exactly(gaps: list[float], limit: int) -> None:
    """A request passes if and only if fewer than the limit passed in the 60 seconds before it."""
    clock = ManualClock()
    limiter, passed = RateLimiter(clock), list[float]()
    for gap in gaps:
        clock.advance(gap)
        now = clock.monotonic()
        within = [time for time in passed if time > now - WINDOW]
        verdict = limiter.hit("token", limit)
        assert verdict.allowed == (len(within) < limit)
        if verdict.allowed:
            within.append(now)
            passed.append(now)
        assert (verdict.limit, verdict.remaining) == (limit, limit - len(within))
        assert verdict.reset >= 1
        assert verdict.reset - 1 < min(within) + WINDOW - now <= verdict.reset


@given(gaps=GAPS, limit=some.integers(1, 5))
def test_waiting_as_told_is_enough(gaps: list[float], limit: int) -> None:
    """Whoever was refused and waits for as long as the answer says gets in."""
    clock = ManualClock()
    limiter = RateLimiter(clock)
    for gap in gaps:
        clock.advance(gap)
        verdict = limiter.hit("token", limit)
        if not verdict.allowed:
            clock.advance(verdict.reset)
            assert limiter.hit("token", limit).allowed


def test_tokens_do_not_share_a_limit() -> None:
    """What one token uses up is not missing to another, and refused requests use nothing up."""
    clock = ManualClock()
    limiter = RateLimiter(clock)
    assert [limiter.hit("one", 2).allowed for _ in range(5)] == [True, True, False, False, False]
    assert limiter.hit("two", 2).allowed
    clock.advance(WINDOW)
    assert [limiter.hit("one", 2).allowed for _ in range(3)] == [True, True, False]


def test_a_lowered_limit_holds_for_what_has_passed() -> None:
    """After the limit was lowered, requests pass once enough of the earlier ones have left the window."""
    clock = ManualClock()
    limiter = RateLimiter(clock)
    for _ in range(6):
        limiter.hit("token", 10)
        clock.advance(5)
    verdict = limiter.hit("token", 3)  # passed at 0, 5, …, 25; it is 30 now, and those until 15 have to leave
    assert (verdict.allowed, verdict.remaining, verdict.reset) == (False, 0, 45)
    clock.advance(44)
    assert not limiter.hit("token", 3).allowed
    clock.advance(1)
    assert limiter.hit("token", 3).allowed


@pytest.mark.parametrize("hours", [-100_000, 100_000])
def test_a_jump_of_the_time_of_day_changes_nothing(hours: int) -> None:
    """Setting the machine's time neither locks anybody out nor lets anybody in."""
    clock = MovableClock()
    limiter = RateLimiter(clock)
    limiter.hit("token", 1)
    clock.jump(hours=hours)
    verdict = limiter.hit("token", 1)
    assert (verdict.allowed, verdict.reset) == (False, 60)
    clock.let_pass(seconds=60)
    assert limiter.hit("token", 1).allowed


async def test_parallel_requests_get_in_up_to_the_limit(timed: tuple[Stack, MovableClock]) -> None:
    """Of 30 requests at once, through both doors, exactly as many pass as the token may send; a minute later again."""
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
