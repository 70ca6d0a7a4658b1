"""How long the answer to a wrong login takes."""

import pytest

from controlplane.proxies.host.logins import FailedLogins
from tests.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    """A clock of the test's own."""
    return ManualClock()


@pytest.fixture
def logins(clock: ManualClock) -> FailedLogins:
    """Nobody has been wrong yet."""
    return FailedLogins(clock, first=0.5, most=8)


def test_each_wrong_login_doubles_the_wait(logins: FailedLogins) -> None:
    """The wait doubles from one wrong login to the next, and is never longer than the longest."""
    waits = [logins.count("192.0.2.1", "px_1") for _ in range(100)]
    assert waits[:6] == [0.5, 1, 2, 4, 8, 8]
    assert waits[-1] == 8


def test_an_address_is_slowed_whatever_names_it_tries(logins: FailedLogins) -> None:
    """Trying another name from the same address does not begin anew."""
    assert [logins.count("192.0.2.1", f"px_{n}") for n in range(3)] == [0.5, 1, 2]


def test_a_name_is_slowed_wherever_it_is_tried_from(logins: FailedLogins) -> None:
    """Trying the same name from another address does not begin anew."""
    assert [logins.count(f"192.0.2.{n}", "px_1") for n in range(3)] == [0.5, 1, 2]


def test_a_subscriber_has_one_network(logins: FailedLogins) -> None:
    """Addresses of one IPv6 /64 count together; those of another do not."""
    assert logins.count("2001:db8:0:1::1", "px_1") == 0.5
    assert logins.count("2001:db8:0:1::2", "px_2") == 1
    assert logins.count("2001:db8:0:2::1", "px_3") == 0.5


def test_what_is_long_ago_is_forgotten(logins: FailedLogins, clock: ManualClock) -> None:
    """A quarter of an hour after the last wrong login the next is a first one again."""
    assert [logins.count("192.0.2.1", "px_1") for _ in range(2)] == [0.5, 1]
    clock.advance(899)
    assert logins.count("192.0.2.1", "px_1") == 2
    clock.advance(900)
    assert logins.count("192.0.2.1", "px_1") == 0.5


def test_made_up_names_do_not_push_out_the_one_who_makes_them_up(logins: FailedLogins) -> None:
    """However many names are tried, no more than some are remembered, and the address goes on being slow."""
    for n in range(20_000):
        logins.count("192.0.2.1", f"px_{n}")
    assert len(logins._by_username) == 10_000  # noqa: SLF001
    assert logins.count("192.0.2.1", "px_0") == 8
