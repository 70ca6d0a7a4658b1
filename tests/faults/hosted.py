"""What functions and proxies have in common in their lives, and what is true of both whenever they are at rest."""

import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, ClassVar, Self

import grpc

from tests.faults.installation import Installation, Refusal, Row, Uncertain
from tests.faults.transitions import new_key


@dataclass
class HostedLife:
    """A function or a proxy from its order to its end, as its customer knows it.

    `key` is the `Idempotency-Key` of the order that he is at, `since` the place in the feed where that began, and
    `is_certain` whether each time that he sent it he got an answer.
    """

    kind: ClassVar[str]

    installation: Installation
    name: str
    key: str = field(default_factory=new_key)
    since: int = 0
    is_certain: bool = True

    async def begin_order(self) -> None:
        """Be at a new order."""
        self.key, self.is_certain = new_key(), True
        self.since = max((row["sequence"] for row in await self.installation.rows("events")), default=0)

    async def ask(self, stub: Any, method: str, request: Any) -> Any:
        """Call a method by its name."""
        try:
            return await self.installation.ask(getattr(stub, method), request, key=self.key)
        except Uncertain:
            self.is_certain = False
            raise

    async def undisturbed(
        self, order: Callable[[Self], Awaitable[None]], check: Callable[[Self], Awaitable[None]]
    ) -> None:
        """Go through a transition that is not tested now."""
        await self.begin_order()
        await order(self)
        await self.installation.rest()
        await check(self)

    async def told(self) -> list[str]:
        """Return what the feed tells since the order began, in order: of it, and of what became of it."""
        events = sorted(await self.installation.rows("events"), key=lambda row: row["sequence"])
        return [row["type"].removeprefix(f"{self.kind}.") for row in events if row["sequence"] > self.since]

    async def check_told(self, story: str, *, again: str = "") -> None:
        """Check that the feed tells just this: words with blanks between, of which each may be a regular expression.

        `again` comes behind it where the order was sent once more, after it was done the first time and not answered.
        """
        told = " ".join(await self.told())
        expected = story if self.is_certain else f"{story}( {again})?"
        assert re.fullmatch(expected, told), f"the feed tells: {told}"


async def unless_gone(order: Awaitable[Any]) -> bool:
    """Ask for something that may be gone; return whether it is there."""
    try:
        await order
    except Refusal as refusal:
        if refusal.status != grpc.StatusCode.NOT_FOUND:
            raise
        return False
    return True


async def check_hosted(installation: Installation) -> None:
    """Raise AssertionError for a count that is not what it counts, or a feed or record that do not tell what was.

    What the hosts hold is not looked at.
    """
    functions, proxies = await installation.rows("functions"), await installation.rows("proxies")
    await _check_charges(installation, functions, proxies)
    await _check_parts(installation, functions, proxies)
    await _check_feed(installation, {"function": functions, "proxy": proxies})


async def _check_charges(installation: Installation, functions: list[Row], proxies: list[Row]) -> None:
    charges = {row["resource_id"]: row["kind"] for row in await installation.rows("quota_charges")}
    assert charges == {row["id"]: "functions" for row in functions} | {row["id"]: "proxies" for row in proxies}
    uses = {row["kind"]: row["used"] for row in await installation.rows("quota_uses") if row["used"]}
    assert uses == Counter(charges.values())
    places = {row["id"]: row["used"] for row in await installation.rows("hosts") if row["used"]}
    assert places == Counter(row["host_id"] for row in proxies)


async def _check_parts(installation: Installation, functions: list[Row], proxies: list[Row]) -> None:
    """Compare what belongs to functions and proxies with them: nothing outlives them, and no code its last version."""
    versions = await installation.rows("function_versions")
    assert {row["function_id"] for row in versions} == {row["id"] for row in functions}
    wanted = {(row["function_id"], row["code_sha256"]) for row in versions}
    assert {(row["function_id"], row["sha256"]) for row in await installation.rows("function_codes")} == wanted
    logs = {row["function_id"] for row in await installation.rows("function_log_heads")}
    assert logs == {row["id"] for row in functions}
    assert {row["function_id"] for row in await installation.rows("function_log_lines")} <= logs
    counted = {row["proxy_id"] for name in ("proxy_usage", "proxy_counters") for row in await installation.rows(name)}
    assert counted <= {row["id"] for row in proxies}


async def _check_feed(installation: Installation, there: dict[str, list[Row]]) -> None:
    """Check that the feed has no gap and tells each order once, as the record does, and what became of each thing."""
    events = sorted(await installation.rows("events"), key=lambda row: row["sequence"])
    (head,) = await installation.rows("event_heads")
    assert [row["sequence"] for row in events] == list(range(1, head["sequence"] + 1))
    done = [row for row in await installation.rows("audit_entries") if row["outcome"] == "ok" and row["request_id"]]
    orders = Counter((row["request_id"], row["type"], row["resource_id"]) for row in events if row["request_id"])
    assert orders == Counter((row["request_id"], row["action"], row["target"]) for row in done)
    assert set(orders.values()) == {1}
    states = {row["id"]: f"{kind}.{row['state']}" for kind, rows in there.items() for row in rows}
    for thing, told in groupby(sorted(events, key=lambda row: row["resource_id"]), key=lambda row: row["resource_id"]):
        _check_story([(row["type"], row["request_id"]) for row in told], states.pop(thing, "gone"))
    assert not states, f"nothing is told of {states}"


def _check_story(told: list[tuple[str, str | None]], state: str) -> None:
    """Check a thing's events: it was ordered once, first; became nothing twice; and is now what became of it last."""
    types = [type_ for type_, _ in told]
    assert types[0].endswith(".create"), types
    assert sum(type_.endswith(".create") for type_ in types) == 1, types
    assert not any(before == after and not after[1] for before, after in pairwise(told)), types
    became = [type_ for type_, request_id in told if not request_id]
    assert became[-1] == state or (state == "gone" and became[-1].endswith(".deleted") and types[-1] == became[-1])
    assert state == "gone" or not any(type_.endswith(".deleted") for type_ in types), types
