"""A host's side of the link: what it asks the control plane, again and again, whatever comes in between."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import grpc
import structlog

from controlplane.operator_error import OperatorError

_TRY_AGAIN_FIRST = 0.2  # seconds
_TRY_AGAIN_LONGEST = 5.0
_OPTIONS = [
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # gRPC's own waits between two tries grow to two minutes; we have ours.
    ("grpc.max_reconnect_backoff_ms", 1000),
]

_log = structlog.get_logger("link")


class LinkError(OperatorError):
    """A host cannot work, however often it asks; the message says why."""


class Link:
    """The connection of one host. `server` is where the control plane's gRPC is: host:port, or https://host:port."""

    def __init__(self, server: str, secret: str) -> None:
        target, with_tls = server.removeprefix("https://"), server.startswith("https://")
        self.channel = (
            grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(), options=_OPTIONS)
            if with_tls
            else grpc.aio.insecure_channel(target, options=_OPTIONS)
        )
        self.metadata = (("authorization", f"Bearer {secret}"),)

    async def follow(self, start: Callable[[], Awaitable[None]], pull: Callable[[int], Awaitable[int]]) -> None:
        """Start, then pull what comes after a place, which the pull returns anew, for ever.

        What fails is tried again; where the control plane knows nothing of this start any more, all begins anew. What a
        host holds meanwhile, it goes on with. Raises LinkError if the secret is not, or no more, that of a host; or as
        start() does.
        """
        after: int | None = None
        failures = 0
        while True:
            try:
                if after is None:
                    await start()
                    after = 0
                after = await pull(after)
            except LinkError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, the host goes on
                if _begins_anew(error):
                    after = None
                if not failures:
                    _tell(error)
                delay = min(_TRY_AGAIN_LONGEST, _TRY_AGAIN_FIRST * 2 ** min(failures, 10))
                failures += 1
                await asyncio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311 - so that not all come at once
            else:
                if failures:
                    _log.info("the control plane answers again")
                failures = 0

    async def close(self) -> None:
        """Close the connection."""
        await self.channel.close()


def _begins_anew(error: Exception) -> bool:
    """Tell whether the control plane knows nothing of this start any more.

    Raises LinkError if it knows nothing of this host.
    """
    if not isinstance(error, grpc.aio.AioRpcError):
        return False
    if error.code() in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}:
        raise LinkError(error.details() or "The control plane does not know this host.") from None
    return error.code() is grpc.StatusCode.FAILED_PRECONDITION


def _tell(error: Exception) -> None:
    if isinstance(error, grpc.aio.AioRpcError):
        _log.warning("the control plane does not answer; it is asked again", error=error.details())
    else:
        _log.error("what the control plane sent could not be put in force; it is asked for again", exc_info=error)
