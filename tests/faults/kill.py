"""One kill: a transition is ordered, its server killed at a moment of it and started again, and nothing is lost."""

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from tests.faults.installation import Installation, Uncertain
from tests.faults.table import Row
from tests.faults.transitions import Transition


class Lived(Protocol):
    """The life of a thing, as its customer knows it."""

    installation: Installation

    async def begin_order(self) -> None:
        """Be at a new order, which may be sent again."""


LivedT = TypeVar("LivedT", bound=Lived)


async def kill(
    life: LivedT,
    transition: Transition[LivedT],
    moment: int | str,
    row: Row,
    *,
    check: Callable[[Installation], Awaitable[None]],
) -> bool:
    """Order a transition and kill the server at a moment of it (`Points.arm`); return whether that came.

    Raises AssertionError for what is lost, or left over: `check` finds that in an installation at rest.
    """
    installation = life.installation
    if transition.prepare is not None:
        await transition.prepare(life)
    await life.begin_order()
    process = installation.process
    await process.arm(moment)
    is_answered = True
    try:
        await transition.order(life)
    except Uncertain:
        is_answered = False
    await installation.rest()
    await process.arm(0)
    if process.ended.is_set():
        assert process.killed_at is not None, "the server has ended by itself: see its server.log"
        row.moments.append(process.killed_at)
        row.answered += is_answered
        await installation.start_again()
        await installation.rest()
    await check(installation)
    if not is_answered:
        await transition.order(life)
        await installation.rest()
    await transition.check(life)
    if transition.bring_back is not None:
        await transition.bring_back(life)
    has_moment = process.killed_at is not None
    process.killed_at = None
    return has_moment
