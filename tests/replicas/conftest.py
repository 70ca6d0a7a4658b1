"""Two replicas: servers with an edge each, on one PostgreSQL, one Valkey and one key file."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from controlplane.access.valkey import ValkeyLimiter
from controlplane.audit.verify import verify
from controlplane.local.postgres import EmbeddedPostgres
from tests.clock import MovableClock
from tests.conftest import new_storage
from tests.doors import Door, Native, Rest
from tests.stack import Stack
from tests.valkey import PATIENCE, ValkeyServer


@dataclass(frozen=True, slots=True)
class Replicas:
    """Servers that are one to their customers, by one clock."""

    stacks: Sequence[Stack]
    clock: MovableClock

    @property
    def first(self) -> Stack:
        """The one that customers come to, unless a test says otherwise."""
        return self.stacks[0]

    @property
    def last(self) -> Stack:
        """Another one, if there is another."""
        return self.stacks[-1]

    @property
    def doors(self) -> list[Door]:
        """Both doors of each; neighbours in the list belong to different replicas."""
        return [*(Rest(stack.rest) for stack in self.stacks), *(Native(stack.channel) for stack in self.stacks)]

    async def check_records(self) -> None:
        """Write every refusal down, at all of them at once; fail if a record is not whole."""
        await asyncio.gather(*(stack.server.audit.flush() for stack in self.stacks))
        verdict = await verify(self.first.server.store, self.first.server.keys)
        assert verdict.records
        assert verdict.broken == ()


@pytest.fixture(scope="package")
async def valkey() -> AsyncIterator[ValkeyServer]:
    """The Valkey of the replicas."""
    async with ValkeyServer() as running:
        yield running


@pytest.fixture(scope="package")
async def replicas(
    folder: Path, catalog: Path, postgres: EmbeddedPostgres, valkey: ValkeyServer
) -> AsyncIterator[Replicas]:
    """Two replicas, which the tests of this package share; every record is whole after all of them."""
    url, clock, keys = await new_storage(postgres, "replicas"), MovableClock(), folder / "replicas.json"
    one, two = (
        Stack(folder / name, catalog=catalog, database_url=url, clock=clock, key_file=keys, valkey_url=valkey.url)
        for name in ("replica-1", "replica-2")
    )
    with pytest.MonkeyPatch.context() as patch:
        # This process has both replicas and all of their callers in it, and may stand still for longer than a limiter
        # waits.
        patch.setattr("controlplane.access.valkey.ValkeyLimiter", partial(ValkeyLimiter, timeout=PATIENCE))
        async with one, two:
            both = Replicas((one, two), clock)
            yield both
            await both.check_records()


@pytest.fixture(scope="package")
async def alone(folder: Path, catalog: Path) -> AsyncIterator[Replicas]:
    """A single server, on SQLite, which remembers credentials until something is committed."""
    clock = MovableClock()
    async with Stack(folder / "alone", catalog=catalog, clock=clock) as stack:
        one = Replicas((stack,), clock)
        yield one
        await one.check_records()


@pytest.fixture(params=["replicas", "alone"])
def servers(request: pytest.FixtureRequest) -> Replicas:
    """The two replicas on PostgreSQL, then the one server on SQLite."""
    servers: Replicas = request.getfixturevalue(request.param)
    return servers
