"""When more bytes may follow."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from controlplane.proxies.host.bandwidth import Bandwidth


def test_what_was_read_is_waited_for() -> None:
    """After the burst of a tenth of a second, each byte costs its time, whoever has read it."""
    bandwidth = Bandwidth(1000)
    assert bandwidth.take(100, now=50.0) == 0
    assert bandwidth.take(500, now=50.0) == pytest.approx(0.5)
    assert bandwidth.take(500, now=50.0) == pytest.approx(1.0)
    assert bandwidth.is_spent(50.9)
    assert not bandwidth.is_spent(51.1)


def test_without_a_limit_nothing_waits() -> None:
    """No limit is no wait."""
    bandwidth = Bandwidth(0)
    assert bandwidth.take(10**12, now=1.0) == 0
    assert not bandwidth.is_spent(1.0)


@given(
    rate=some.integers(1, 10**9),
    reads=some.lists(some.tuples(some.integers(1, 65536), some.floats(0, 10)), min_size=1, max_size=50),
)
def test_no_more_than_the_rate_passes(rate: int, reads: list[tuple[int, float]]) -> None:
    """However the reads fall, those who wait as told carry no more than the rate and the burst."""
    bandwidth, now, carried = Bandwidth(rate), 1000.0, 0
    for size, pause in reads:
        now += pause
        carried += size
        now += bandwidth.take(size, now)
    assert carried <= rate * (now - 1000.0 + 0.1) * (1 + 1e-6) + 1


@pytest.mark.parametrize(("rate", "chunk"), [(0, 65536), (1, 1024), (100_000, 5000), (10**9, 65536)])
def test_a_small_limit_has_small_turns(rate: int, chunk: int) -> None:
    """What is read at a time is a twentieth of a second's worth, within bounds."""
    assert Bandwidth(rate).chunk == chunk
