"""What was done to servers and clusters, and what was lost by it: printed at the end."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# For those who have half an hour: all moments of all engines, and a hundred kills at random.
EVERYTHING = os.environ.get("HTX_FAULTS") == "everything"


@dataclass
class Row:
    """Of a transition of an engine: the moments of its kills, how many orders were answered before, the loss if any."""

    moments: list[str] = field(default_factory=list)
    answered: int = 0
    lost: str | None = None


class Table:
    """The rows, in the order in which they came to be."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}

    def row(self, engine: str, transition: str) -> Row:
        """Return a row, a new one if need be."""
        return self.rows.setdefault((engine, transition), Row())

    @contextmanager
    def losing(self, where: str, what: str) -> Iterator[Row]:
        """Return a row, and note there what fails meanwhile."""
        row = self.row(where, what)
        try:
            yield row
        except BaseException:
            row.lost = traceback.format_exc()
            raise

    def lines(self) -> Iterator[str]:
        """Return the table as text."""
        yield f"{'where':12}{'what':34}{'times':>6}{'answered':>10}{'lost':>6}"
        for (engine, transition), row in self.rows.items():
            yield f"{engine:12}{transition:34}{len(row.moments):6}{row.answered:10}{int(row.lost is not None):6}"
        faults = sum(len(row.moments) for row in self.rows.values())
        lost = sum(row.lost is not None for row in self.rows.values())
        yield f"{faults} faults, {lost} losses"
        if not EVERYTHING:
            yield "Left out: commits and files on MongoDB and ClickHouse, which are as on the others;"
            yield "two moments of three on ClickHouse, and of schedules, verifications, undeletes, forgetting, and"
            yield "variables of functions; each transition of functions and proxies on the other storage."
            yield "HTX_FAULTS=everything has them all."
