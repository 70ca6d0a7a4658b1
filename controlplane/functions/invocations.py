"""Calls of functions for their owners: an event goes to a host of the region, and its answer comes back."""

import asyncio
import json
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

import structlog
from google.protobuf.struct_pb2 import NULL_VALUE, Struct, Value

from controlplane.api.v1 import functions_pb2
from controlplane.clock import Clock
from controlplane.errors import BrokenRule, InvalidField, TimedOut, TooLarge, TooManyCalls, Unavailable
from controlplane.functions.model import Function
from controlplane.hosts.kinds import FUNCTIONS
from controlplane.hosts.model import Host, live_hosts
from controlplane.keys import Keys
from controlplane.sql import Store

if TYPE_CHECKING:
    import httpx2

MOST_BYTES = 6 * 1024 * 1024  # of an event, as the contract has it
_OK, _BROKEN, _TOO_LARGE, _TOO_MANY, _TIMEOUT = 200, 502, 413, 429, 504
# As the host of a function's time limit ends the call, and this is for a host that does not: with a start before it.
_PATIENCE = 20.0  # seconds
_QUICK = 64 * 1024  # bytes; what is larger is read and written in a thread, so that nobody waits for it
# Protobuf reads 100 messages in each other and no more; an object is three of them, a list two.
_DEEPEST = 90
_EXACT = 2**53  # up to which a number of JSON is the same in protobuf

T = TypeVar("T")
_log = structlog.get_logger("invocations")


def call_secrets(keys: Keys, instance: str) -> list[str]:
    """Return what may have been shown to a start of a host to know our calls by, one for each key; a new one is first.

    Every server makes it anew of its keys, so that it is kept nowhere.
    """
    return keys.digests(f"function calls of {instance}")


class Invocations:
    """Brings events to hosts."""

    def __init__(self, *, store: Store, clock: Clock, keys: Keys) -> None:
        self._store = store
        self._clock = clock
        self._keys = keys
        self._clients: dict[str, httpx2.AsyncClient] = {}

    async def invoke(self, function: Function, event: Struct, *, request_id: str) -> functions_pb2.Invocation:
        """Call a function and return how that ended.

        Raises InvalidField for an event that is no JSON, TooLarge, TooManyCalls, TimedOut, or Unavailable while no host
        takes the call.
        """
        body = await _in_thread_if(event.ByteSize() > _QUICK, partial(_written, event))
        hosts = await live_hosts(self._store, self._clock, kind=FUNCTIONS, region=function.region)
        # Always the same one first, where the function's workers are warm and its calls are counted.
        for host in sorted(hosts, key=lambda host: crc32(f"{function.id} {host.id}".encode())):
            if function.runtime in host.runtimes:
                answer = await self._ask(host, function, body, request_id)
                if answer is not None:
                    large = len(answer.content) > _QUICK
                    return await _in_thread_if(large, partial(_read, answer, function, request_id))
        raise Unavailable

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.aclose()

    async def _ask(self, host: Host, function: Function, body: bytes, request_id: str) -> "httpx2.Response | None":
        """Return a host's answer; None if it has not taken the call, so that another may be asked.

        Raises Unavailable where the call may have been taken, and nobody knows how it ended.
        """
        import httpx2  # noqa: PLC0415 - memory that a server need not have before somebody calls a function

        limits = httpx2.Timeout(_PATIENCE, read=function.timeout_ms / 1000 + _PATIENCE, pool=None)
        for secret in call_secrets(self._keys, host.instance or ""):
            headers = {"content-type": "application/json", "x-htx-call-secret": secret, "x-request-id": request_id}
            try:
                answer = await self._client(host.address).post(
                    f"/invoke/{function.id}", content=body, headers=headers, timeout=limits
                )
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                _log.warning("a host cannot be reached", host=host.name, error=repr(error))
                return None
            except httpx2.HTTPError as error:
                raise Unavailable from error
            if answer.status_code == httpx2.codes.SERVICE_UNAVAILABLE:
                return None
            if answer.status_code != httpx2.codes.NOT_FOUND:
                return answer
        return None  # it does not know the function yet, or its secret was made by a key that is gone

    def _client(self, address: str) -> "httpx2.AsyncClient":
        import httpx2  # noqa: PLC0415 - as above

        client = self._clients.get(address)
        if client is None:
            path = address.removeprefix("unix:")
            base_url = "http://host" if path != address else f"http://{address}"
            transport = httpx2.AsyncHTTPTransport(
                uds=path if path != address else None,
                # Sooner than a host ends connections: nothing is sent where it may be doing that.
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=60),
            )
            client = self._clients[address] = httpx2.AsyncClient(
                base_url=base_url, transport=transport, trust_env=False, follow_redirects=False
            )
        return client


def _read(answer: "httpx2.Response", function: Function, request_id: str) -> functions_pb2.Invocation:
    """Return what a host's answer says.

    Raises the error that it stands for.
    """
    try:
        told = json.loads(answer.content)
        if answer.status_code == _OK:
            return _invocation(told)
        sentence = str(told["error"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Unavailable from error
    if answer.status_code == _TOO_LARGE:
        raise TooLarge(MOST_BYTES)
    if answer.status_code == _TOO_MANY:
        retry_after = answer.headers.get("retry-after", "")
        raise TooManyCalls(sentence, retry_after=int(retry_after) if retry_after.isdecimal() else 1)
    if answer.status_code == _TIMEOUT:
        raise TimedOut(sentence)
    if answer.status_code == _BROKEN:  # the function ended in another way than by raising something: so it has failed
        return functions_pb2.Invocation(
            status="failed", error=sentence, version=function.active_version or 0, request_id=request_id
        )
    raise Unavailable from ValueError(f"a host answered {answer.status_code}: {sentence}")


def _invocation(told: dict[str, Any]) -> functions_pb2.Invocation:
    invocation = functions_pb2.Invocation(
        status=told["status"],
        error=told.get("error"),
        trace=told.get("trace"),
        version=told["version"],
        duration_ms=told["duration_ms"],
        memory_mb=told["memory_mb"],
        cold_start=told["cold_start"],
        request_id=told["request_id"],
    )
    if invocation.status == "succeeded":
        try:
            _fill(invocation.result, told.get("result"), _DEEPEST)
        except (ValueError, OverflowError):
            invocation.ClearField("result")
            invocation.status = "failed"
            invocation.error = "What the handler returned cannot be shown: it is nested too deeply, or no plain JSON."
    return invocation


def _written(event: Struct) -> bytes:
    try:
        return json.dumps(
            {name: _plain(each) for name, each in event.fields.items()}, allow_nan=False, ensure_ascii=False
        ).encode()
    except ValueError:
        raise InvalidField(BrokenRule("event", "has a number that JSON does not have")) from None


def _plain(value: Value) -> Any:
    """Return a value as Python has it, a whole number as one: protobuf has floating-point numbers only."""
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return {name: _plain(each) for name, each in value.struct_value.fields.items()}
    if kind == "list_value":
        return [_plain(each) for each in value.list_value.values]
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() and abs(number) <= _EXACT else number
    return None if kind in {None, "null_value"} else getattr(value, kind)


def _fill(value: Value, plain: Any, room: int) -> None:
    """Set a value to what Python has; raise ValueError or OverflowError where protobuf cannot have it."""
    if room < 0:
        raise ValueError("it is nested too deeply")
    if isinstance(plain, dict):
        value.struct_value.SetInParent()
        for name, each in plain.items():
            _fill(value.struct_value.fields[name], each, room - 3)
    elif isinstance(plain, list):
        value.list_value.SetInParent()
        for each in plain:
            _fill(value.list_value.values.add(), each, room - 2)
    elif isinstance(plain, str):
        value.string_value = plain
    elif isinstance(plain, bool):
        value.bool_value = plain
    elif plain is None:
        value.null_value = NULL_VALUE
    else:
        value.number_value = _finite(plain)


def _finite(number: float) -> float:
    """Return a number that JSON has; Python reads others too."""
    if not math.isfinite(number):
        raise ValueError("it has a number that JSON does not have")
    return number


async def _in_thread_if(condition: bool, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if condition else work()
