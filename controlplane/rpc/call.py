"""The RPC that is being answered: what came with it, and what its answer takes along."""

import asyncio
import secrets
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import grpc
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.access.caller import Caller
from controlplane.errors import Unauthenticated
from controlplane.rpc.contract import Rpc


@dataclass(slots=True, kw_only=True)
class Call:
    """One RPC.

    `client_ip` is the address that the edge saw, or the socket's for a native caller. `rest` tells a REST caller, who
    gets headers in place of some fields. `headers` go with the answer. `after_commit` runs once the write is safe;
    `committed` tells whether it is, once that is known. `presented` is whose credential came along, whether it holds or
    not. `concerns` is the account that a call is about which nobody has signed, that of a login; `target` what it is
    about where the answer does not say so.
    """

    rpc: Rpc
    request_id: str
    client_ip: str
    rest: bool
    metadata: dict[str, str]
    headers: list[tuple[str, str]] = field(default_factory=list)
    after_commit: list[Callable[[], None]] = field(default_factory=list)
    committed: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    presented: Caller | None = None
    maybe_caller: Caller | None = None
    concerns: str | None = None
    target: str | None = None
    maybe_session: AsyncSession | None = None

    @property
    def caller(self) -> Caller:
        """Who is calling.

        Raises Unauthenticated in a public RPC that nobody has signed.
        """
        if self.maybe_caller is None:
            raise Unauthenticated
        return self.maybe_caller

    @property
    def account_id(self) -> str | None:
        """The account in whose record and feed the call belongs, if one is known."""
        return self.presented.account_id if self.presented is not None else self.concerns

    @property
    def session(self) -> AsyncSession:
        """The transaction of a write: what is done in it is committed before the answer leaves, or not at all."""
        if self.maybe_session is None:
            raise RuntimeError(f"{self.rpc.name} is a read and has no transaction: use Store.fetch")
        return self.maybe_session


@dataclass(frozen=True, slots=True)
class Answer:
    """The bytes of an answer's message, and the headers that the servicer gave it."""

    message: bytes
    headers: tuple[tuple[str, str], ...]


_current: ContextVar[Call] = ContextVar("call")


def current() -> Call:
    """Return the call that is being answered."""
    return _current.get()


def enter(rpc: Rpc, context: grpc.aio.ServicerContext) -> Call:  # type: ignore[type-arg]
    """Read what came with an RPC, and make it the current call.

    Only the edge, which is whoever reaches the Unix socket, is believed about the client's address and the request id.
    """
    peer = context.peer()
    from_edge = peer.startswith("unix:")
    given = context.invocation_metadata() or ()
    metadata: dict[str, Any] = dict(given)  # keys in -bin have bytes, and nobody here asks for those
    if not from_edge or len(metadata) < len(given):
        metadata = _joined((key, value) for key, value in given if from_edge or not key.startswith("x-htx-"))
    call = Call(
        rpc=rpc,
        request_id=(metadata.get("x-request-id") if from_edge else None) or secrets.token_hex(16),
        client_ip=metadata.get("x-htx-client-ip", "") if from_edge else _address_of(peer),
        rest=from_edge and "x-envoy-original-path" in metadata,
        metadata=metadata,
    )
    _current.set(call)
    return call


def _joined(given: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the metadata with one value for each key; several are joined, as HTTP has it."""
    metadata: dict[str, Any] = {}
    for key, value in given:
        metadata[key] = f"{metadata[key]},{value}" if key in metadata else value
    return metadata


def _address_of(peer: str) -> str:
    """Return the address in a gRPC peer such as `ipv4:127.0.0.1:5000` or `ipv6:%5B::1%5D:5000`."""
    return unquote(peer.partition(":")[2]).rpartition(":")[0].strip("[]")
