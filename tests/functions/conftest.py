"""A played host for the tests of a module."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.functions.played import PlayedHost, played_host
from tests.stack import Stack


@pytest.fixture(scope="module")
async def host(stack: Stack, folder: Path) -> AsyncIterator[PlayedHost]:
    """A host that runs Python and wasm and lets nothing into the internet."""
    async with played_host(stack, folder) as host:
        yield host
