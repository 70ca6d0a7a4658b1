"""The seam between the provisioners and a database engine: what every driver does, and how it fails."""

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Target:
    """What a database is to be like on its cluster.

    `name` is the generated name, used for the database and for its user: 3 to 32 lower-case letters, digits and
    underscores, a letter first. `connections` is how many sessions the user may have at once; `memory_mb` and
    `storage_gb` are what the customer pays for, enforced as far as the engine can. Without `login` the data is kept,
    but nobody gets in. With `exists` the database must be there already: if it is lost, an empty one in its place would
    only hide that.
    """

    name: str
    password: str = field(repr=False)
    connections: int
    memory_mb: int
    storage_gb: int
    login: bool = True
    exists: bool = False


@dataclass(frozen=True, slots=True)
class Observation:
    """What a database is like right now: whether its user may log in, his open sessions, and its size in bytes."""

    login: bool
    connections: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in a database: of each table or collection, by its full name, how many rows, and a checksum of them all.

    The checksum does not depend on the order of the rows. Two databases with equal contents hold the same.
    """

    tables: Mapping[str, "Table"]


@dataclass(frozen=True, slots=True)
class Table:
    """How many rows a table has, and a checksum over them."""

    rows: int
    checksum: str


class Dump(Protocol):
    """A dump that is being read."""

    def chunks(self) -> AsyncIterator[bytes]:
        """Return the dump, in pieces of at most a megabyte; read it once, to its end."""

    def contents(self) -> Contents:
        """Return what is in the dump, once it was read to its end: as of the same moment."""


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


class Missing(EngineError):
    """The database, which was to be there, is not on its cluster: its data is lost, unless somebody brings it back."""

    def __init__(self) -> None:
        super().__init__("The database is no longer on its cluster; restore a backup, or contact support.")


Check: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


async def unchecked() -> None:
    """Have nothing against a change."""


class Engine(Protocol):
    """One database engine's driver, bound to one cluster. All methods raise EngineError or a kind of it.

    `check` is asked whether a change is still wanted: under the lock that keeps other workers from this database, or,
    where the engine has none, right before the first statement that changes anything. What it raises is raised here.
    Asked before the lock, it would let a worker go on that was paused there and overtaken.
    """

    async def apply(self, target: Target, *, check: Check = unchecked) -> tuple[str, ...]:
        """Make the cluster match the target, whatever it finds there; return what differed, in words for a customer.

        Such as `("the connection limit", "the password")`; empty if all was well, `("the database",)` for a new one.
        Repeating it is safe: after a crash at any point, and when limits, rights, password, owner or user were
        changed behind our back. It never loses data. Whenever it changes the password, ours or somebody else's, it ends
        the sessions of whoever came in with the old one. Raises Missing, and has changed nothing, if the target
        `exists` and the database does not.
        """

    async def drop(self, name: str, *, check: Check = unchecked) -> None:
        """Remove the database and its user for good, ending their sessions; nothing happens if they are gone."""

    async def observe(self, name: str) -> Observation | None:
        """Return what the database is like, None if it or its user is not there."""

    async def names(self, prefix: str) -> set[str]:
        """Return the names of all databases and users on the cluster that begin with this."""

    def dump(self, name: str) -> AbstractAsyncContextManager[Dump]:
        """Open a dump of the database; leaving the context ends it, whether it was read to its end or not."""

    async def restore(self, name: str, password: str, chunks: AsyncIterator[bytes]) -> None:
        """Read a dump into an empty database, logged in as its own user and never with rights beyond his.

        What is in a dump is not trusted: it came from a customer. Raises EngineError if it does not fit.
        """

    async def contents(self, name: str) -> Contents:
        """Return what is in a database now."""

    def connection(self, name: str, password: str) -> Connection:
        """Return how a customer reaches the database; this asks nobody."""
