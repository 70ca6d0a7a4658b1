"""A place with clusters that break beside one that is well, and with a database for each kind of order."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from controlplane.api.v1 import databases_pb2
from tests.clusters import Cluster, Refused
from tests.faults.installation import Installation, Refusal
from tests.faults.transitions import TRANSITIONS, Life, Transition, begin, new_key
from tests.stack import eventually

KINDS = {transition.name: transition for transition in TRANSITIONS}
EVERY_KIND = ("create", "resize", "new password", "stop", "start", "back up", "restore a backup", "delete")
_SECONDS_ELSEWHERE = 10.0  # within which a cluster that is well has done an order, whatever others do


@dataclass
class Order:
    """What a database is to become."""

    life: Life
    kind: Transition[Life]

    @property
    def name(self) -> str:
        """The name of the database that waits for its cluster."""
        return f"{self.life.name}-copy" if self.kind.name == "restore a backup" else self.life.name

    async def prepare(self) -> None:
        """Bring the database to where the order begins."""
        if self.kind.prepare is not None:
            await self.kind.prepare(self.life)
        self.life.key = new_key()

    async def give(self) -> float:
        """Order it; return how many seconds that took."""
        began = time.monotonic()
        await self.kind.order(self.life)
        return time.monotonic() - began

    async def check(self) -> None:
        """Check that it is fulfilled."""
        await self.kind.check(self.life)

    async def bring_back(self) -> None:
        """Bring the database back."""
        if self.kind.bring_back is not None:
            await self.kind.bring_back(self.life)

    async def is_fulfilled(self) -> bool:
        """Return whether it is fulfilled by now."""
        with suppress(AssertionError, Refused, Refusal):
            await self.check()
            return True
        return False


class Place:
    """An installation; for each of `weak` there is a database for each kind of order, `well` is for other orders."""

    def __init__(
        self, installation: Installation, weak: list[Cluster], well: Cluster, *, kinds: tuple[str, ...] = EVERY_KIND
    ) -> None:
        self.installation = installation
        self.turn = 0
        self._well = well
        self._weak = weak
        self._kinds = [KINDS[name] for name in kinds]
        self._lives = {
            (cluster.engine, kind.name): self._new_life(cluster, kind)
            for cluster in weak
            for kind in self._kinds
            if not kind.is_own
        }

    async def begin(self) -> None:
        """Let the lives begin."""
        await asyncio.gather(*(begin(life) for life in self._lives.values()))

    async def next_turn(self) -> tuple[list[Order], list[Order]]:
        """Return what to order before something happens, and what meanwhile; the other way round the next time.

        All of it is prepared. There is one of each kind of each cluster.
        """
        self.turn += 1
        halves = list[Order](), list[Order]()
        for row, cluster in enumerate(self._weak):
            for column, kind in enumerate(self._kinds):
                life = self._new_life(cluster, kind) if kind.is_own else self._lives[cluster.engine, kind.name]
                halves[(row + column + self.turn) % 2].append(Order(life, kind))
        await asyncio.gather(*(order.prepare() for half in halves for order in half))
        return halves

    async def is_served_elsewhere(self) -> None:
        """Let the cluster that is well make a database and back it up, within a bounded time."""
        life = Life(self.installation, self._well, f"well-{self.turn}")
        for kind in ("create", "back up"):
            order = Order(life, KINDS[kind])
            await order.prepare()
            await order.give()
            await eventually(order.is_fulfilled, seconds=_SECONDS_ELSEWHERE)

    async def databases(self) -> dict[str, databases_pb2.Database]:
        """Return the databases as the API shows them, by name."""
        answer = await self.installation.ask(
            self.installation.databases.ListDatabases, databases_pb2.ListDatabasesRequest()
        )
        return {database.name: database for database in answer.databases}

    async def until(self, names: set[str], is_so: Callable[[databases_pb2.Database], bool]) -> None:
        """Wait until something is so of all these databases."""

        async def are_so() -> bool:
            there = await self.databases()
            return all(is_so(there[name]) for name in names)

        await eventually(are_so)

    def _new_life(self, cluster: Cluster, kind: Transition[Life]) -> Life:
        return Life(self.installation, cluster, f"{cluster.engine}-{kind.name.replace(' ', '-')}-{self.turn}")
