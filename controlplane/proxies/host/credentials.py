"""Who may come in: credentials that come, change and go while traffic flows, what each has open and has carried."""

import asyncio
import hashlib
import hmac
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from controlplane.access.caller import Address, Network
from controlplane.clock import Clock
from controlplane.proxies.host.bandwidth import Bandwidth

_LOOKUPS = 8  # at a time for one credential, so that names that nobody answers for do not take every thread


@dataclass(frozen=True, slots=True)
class Credential:
    """A name and a password, and what may be done with them.

    `password_digest` is the SHA-256 of `salt` and the password. A slow hash would add nothing: passwords are made by us
    with at least 128 random bits, so there is nothing to guess, and it would let strangers keep the host busy.
    `networks` are the clients' own, all when empty; `bytes_per_second` is for all connections and both directions
    together, 0 for no limit.
    """

    id: str
    username: str
    salt: bytes
    password_digest: bytes
    networks: tuple[Network, ...]
    max_connections: int
    bytes_per_second: int
    expires_at: datetime | None

    def has_password(self, password: bytes) -> bool:
        """Tell whether this is the password, in the same time whatever it is."""
        return hmac.compare_digest(hashlib.sha256(self.salt + password).digest(), self.password_digest)

    def admits(self, address: Address, now: datetime) -> bool:
        """Tell whether a client at this address may come in or stay at this time."""
        if self.expires_at is not None and now >= self.expires_at:
            return False
        return not self.networks or any(address in network for network in self.networks)

    def has_login_of(self, other: "Credential") -> bool:
        """Tell whether whoever logged in by the other one could do so by this one."""
        return (self.username, self.salt, self.password_digest) == (other.username, other.salt, other.password_digest)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a credential has carried since the start; its connections are those to a target, and UDP associations.

    A byte counts when it is taken from its sender to be passed on: `up` from the client, `down` from the target.
    Handshakes and the headers of datagrams do not count.
    """

    connections: int
    bytes_up: int
    bytes_down: int

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.connections + other.connections, self.bytes_up + other.bytes_up, self.bytes_down + other.bytes_down
        )


class OverLimit(Exception):
    """The credential has as many connections open as it may have."""


class Ended(Exception):
    """The credential was removed, or changed, after the client had logged in."""


class Credentials:
    """All credentials of a host. Everything here happens at once: nothing waits, and a limit is never passed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._holders: dict[str, _Holder] = {}
        self._by_username: dict[str, _Holder] = {}
        self._sessions: set[Session] = set()
        self._forgotten = Usage(0, 0, 0)

    @property
    def open_sessions(self) -> int:
        """How many sessions are open."""
        return len(self._sessions)

    def put(self, credential: Credential) -> None:
        """Add a credential or change it; cut its connections that it would not let in any more.

        Lower limits hold for what comes: connections beyond a lower number stay, all go slower at once.

        Raises ValueError if another credential has the username.
        """
        taken = self._by_username.get(credential.username)
        if taken is not None and taken.credential.id != credential.id:
            raise ValueError(f"The username of {credential.id} is that of {taken.credential.id}.")
        holder = self._holders.get(credential.id)
        if holder is None:
            holder = self._holders[credential.id] = _Holder(credential)
        elif not holder.is_removed:
            del self._by_username[holder.credential.username]
        self._by_username[credential.username] = holder
        holder.credential = credential
        holder.is_removed = False
        holder.bandwidth.bytes_per_second = credential.bytes_per_second
        now = self._clock.now()
        _cut(session for session in holder.sessions if not session.may_stay(now))

    def remove(self, credential_id: str) -> None:
        """Let nobody in by this credential any more, and cut its connections; its counters stay. Safe to repeat."""
        holder = self._holders.get(credential_id)
        if holder is None or holder.is_removed:
            return
        holder.is_removed = True
        del self._by_username[holder.credential.username]
        _cut(holder.sessions)

    def forget(self, credential_id: str) -> None:
        """Drop the counters of a removed credential. Safe to repeat.

        Raises ValueError if it was not removed.
        """
        holder = self._holders.get(credential_id)
        if holder is None:
            return
        if not holder.is_removed:
            raise ValueError(f"{credential_id} was not removed.")
        self._forgotten += holder.usage()
        del self._holders[credential_id]

    def find(self, username: str) -> Credential | None:
        """Return the credential of a username, if there is one."""
        holder = self._by_username.get(username)
        return None if holder is None else holder.credential

    def usage(self) -> dict[str, Usage]:
        """Return by id what each credential has carried, removed ones included."""
        return {credential_id: holder.usage() for credential_id, holder in self._holders.items()}

    def total(self) -> Usage:
        """Return what all have carried, forgotten ones included."""
        return sum((holder.usage() for holder in self._holders.values()), self._forgotten)

    @contextmanager
    def session(self, proven: Credential, address: Address, cut: Callable[[], object]) -> "Iterator[Session]":
        """Open a session for a client who has proven to have this credential; it ends with the block.

        `cut` is to end it when the credential does.

        Raises OverLimit, or Ended.
        """
        holder = self._holders.get(proven.id)
        if holder is None:
            raise Ended
        session = Session(holder, proven, address, cut, self._clock.monotonic())
        if not session.may_stay(self._clock.now()):
            raise Ended
        if len(holder.sessions) >= holder.credential.max_connections:
            raise OverLimit
        holder.sessions.add(session)
        self._sessions.add(session)
        try:
            yield session
        finally:
            holder.sessions.remove(session)
            self._sessions.remove(session)

    def cut_due(self, idle_seconds: float) -> None:
        """Cut what is past its expiry, and what has carried nothing for so long. Wants to be called every second.

        Timers would be wrong after the time of day was set, and cost something at every byte.
        """
        today, now = self._clock.now(), self._clock.monotonic()
        _cut(
            session
            for session in self._sessions
            if not session.may_stay(today) or session.idle_since(now) <= now - idle_seconds
        )


class Session:
    """A connection that a credential carries, from its request until its end.

    `cut` ends it, at once and so that the ends can tell it from an orderly end.
    """

    __slots__ = ("_holder", "_idle_since", "_moved", "_seen", "address", "cut", "proven")

    def __init__(
        self, holder: "_Holder", proven: Credential, address: Address, cut: Callable[[], object], now: float
    ) -> None:
        self.proven = proven
        self.address = address
        self.cut = cut
        self._holder = holder
        self._moved = 0
        self._seen = 0
        self._idle_since = now

    @property
    def bandwidth(self) -> Bandwidth:
        """The limit that it shares with the credential's others."""
        return self._holder.bandwidth

    @property
    def lookups(self) -> asyncio.Semaphore:
        """Its credential's turns to ask for a name."""
        return self._holder.lookups

    def count_connection(self) -> None:
        """Count that it has reached its target, or that its association stands."""
        self._holder.connections += 1

    def count_up(self, size: int) -> None:
        """Count bytes from the client."""
        self._holder.bytes_up += size
        self._moved += size

    def count_down(self, size: int) -> None:
        """Count bytes to the client."""
        self._holder.bytes_down += size
        self._moved += size

    def may_stay(self, now: datetime) -> bool:
        """Tell whether the client would be let in now as it was."""
        current = self._holder.credential
        return not self._holder.is_removed and current.has_login_of(self.proven) and current.admits(self.address, now)

    def idle_since(self, now: float) -> float:
        """Return when it was last seen to have carried something, looking now."""
        if self._moved != self._seen:
            self._seen, self._idle_since = self._moved, now
        return self._idle_since


def _cut(sessions: Iterable[Session]) -> None:
    for session in list(sessions):
        session.cut()


class _Holder:
    """A credential, its sessions, and what they share."""

    def __init__(self, credential: Credential) -> None:
        self.credential = credential
        self.is_removed = False
        self.sessions: set[Session] = set()
        self.bandwidth = Bandwidth(credential.bytes_per_second)
        self.lookups = asyncio.Semaphore(_LOOKUPS)
        self.connections = 0
        self.bytes_up = 0
        self.bytes_down = 0

    def usage(self) -> Usage:
        """Return what it has carried."""
        return Usage(self.connections, self.bytes_up, self.bytes_down)
