"""The few words of ASGI that gateway and engine share, and errors as ClickHouse sends them."""

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# 403 for a wrong password (516) and a missing right (497).
_STATUS = {"516": 403, "497": 403, "60": 404, "81": 404}


def headers_of(scope: Scope) -> dict[str, str]:
    """Return a request's headers, by their names in lower case."""
    return {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}


async def body_of(receive: Receive) -> AsyncIterator[bytes]:
    """Yield a request's body. Raises ConnectionResetError if the caller goes away before its end."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the caller went away")
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body"):
            return


async def answer(send: Send, body: bytes | None, headers: dict[str, str], *, status: int = 200) -> None:
    """Send the head of an answer, and the body if it is there already."""
    pairs = {"content-type": "text/plain; charset=UTF-8", "x-clickhouse-server-display-name": "chdb", **headers}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(key.encode("latin-1"), value.encode("latin-1")) for key, value in pairs.items()],
        }
    )
    if body is not None:
        await send({"type": "http.response.body", "body": body})


async def fail(send: Send, code: str, words: str) -> None:
    """Answer with an error."""
    text = words if words.startswith("Code: ") else f"Code: {code}. DB::Exception: {words}"
    headers = {"x-clickhouse-exception-code": code}
    await answer(send, f"{text}\n".encode(), headers, status=_STATUS.get(code, 500))
