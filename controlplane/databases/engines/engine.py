"""The seam between the provisioner and a database engine: what every driver does, and how it fails."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Target:
    """What a database is to be like on its cluster.

    `name` is the generated name, used for the database and for its user: 3 to 63 lower-case letters, digits and
    underscores, a letter first. `connections` is how many sessions the user may have at once. Without `login` the
    data is kept, but nobody gets in.
    """

    name: str
    password: str = field(repr=False)
    connections: int
    login: bool = True


@dataclass(frozen=True, slots=True)
class Connection:
    """How a customer reaches a database. `uri` has it all in one line, percent-encoded."""

    host: str
    port: int
    database: str
    username: str
    password: str = field(repr=False)
    uri: str = field(repr=False)


class EngineError(Exception):
    """The cluster answered and refused, or the work failed there: repeating it helps only once somebody has acted.

    Here and below: the sentence is fit for a customer; what really happened is the cause, for the log.
    """


class ClusterUnavailable(EngineError):
    """The cluster cannot be reached, is starting, full or too slow: try again later."""


class Busy(EngineError):
    """Another worker is changing this database on the cluster: look again later, and decide anew."""


class Engine(Protocol):
    """One database engine's driver, bound to one cluster. All methods raise EngineError or a kind of it."""

    async def apply(self, target: Target) -> None:
        """Make the cluster match the target, whatever it finds there.

        Repeating it is safe: after a crash at any point, and when limits, rights, password, owner or user were
        changed behind our back. It never loses data.
        """

    async def drop(self, name: str) -> None:
        """Remove the database and its user for good, ending their sessions; nothing happens if they are gone."""

    async def dump(self, name: str, path: Path) -> None:
        """Write a dump that the engine's own tools restore to the file `path`, synced to the disk.

        A file that is there already is replaced. None is left behind on failure or when cancelled, but a crash may
        leave half of one: give a name aside, and rename it afterwards.
        """

    def connection(self, name: str, password: str) -> Connection:
        """Return how a customer reaches the database; this asks nobody."""
