"""Both sides of a login at the provider, for the tests of our side."""

from collections.abc import AsyncIterator, Iterator

import pytest

from controlplane.sessions.oidc import OidcLogin
from tests.clock import ManualClock
from tests.sessions.issuer import SmallIssuer, running
from tests.sessions.oidc import new_login


@pytest.fixture
def clock() -> ManualClock:
    """A clock that the test moves, for all sides."""
    return ManualClock()


@pytest.fixture
def issuer(clock: ManualClock) -> Iterator[SmallIssuer]:
    """An issuer of the test's own."""
    with running(clock) as answering:
        yield answering


@pytest.fixture
async def login(issuer: SmallIssuer, clock: ManualClock) -> AsyncIterator[OidcLogin]:
    """Our side of it."""
    ours = new_login(issuer, clock)
    yield ours
    await ours.close()
