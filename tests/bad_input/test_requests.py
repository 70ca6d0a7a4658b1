"""Requests that are none: paths, queries, content types and credentials."""

import asyncio
import json
from typing import Any

import grpc
import httpx
import pytest
from grpc import StatusCode

from tests.doors import Answer, Native, check_nothing_leaked, read_response
from tests.stack import Customer, Stack

DATABASES = "/api/portal/databases"
NEW = {"name": "good", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"{DATABASES}/%ff", 400),
        (f"{DATABASES}/%c0%ae", 400),
        (f"{DATABASES}/..%2f..%2fetc%2fpasswd", 400),
        (f"{DATABASES}/a%5c..%5cb", 400),
        (f"{DATABASES}/%00", 400),
        (f"{DATABASES}/..;/a", 404),
        (f"{DATABASES}/../../../etc/passwd", 404),
        (f"{DATABASES}?page_size=many", 400),
        (f"{DATABASES}?page_size=-1", 400),
        (f"{DATABASES}?page_size=1001", 400),
        (f"{DATABASES}?page_size=99999999999999999999", 400),
        (f"{DATABASES}?page_size=1&page_size=2", 200),
        (f"{DATABASES}?page_token=%ff", 400),
        (f"{DATABASES}?page_token=!!", 400),
        (f"{DATABASES}?unknown=1", 400),
        (f"{DATABASES}?validate_only=1", 400),
        (f"{DATABASES}/{'a' * 9000}", 400),
        (f"{DATABASES}/{'a' * 20000}", 431),
    ],
)
async def test_a_path_or_query_that_is_none(bearer: dict[str, str], somebody: Customer, path: str, status: int) -> None:
    """What cannot be a path or a query of ours is refused before anything looks for it."""
    # httpx would tidy the path up.
    answer = await _raw(somebody, b"GET " + path.encode() + b" HTTP/1.1\r\n", bearer)
    assert answer.status_code == status
    if status >= 400:
        read_response(answer)


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"])
async def test_another_content_type_is_refused(somebody: Customer, media: str) -> None:
    """Only JSON is read."""
    body = json.dumps(NEW).encode()
    answer = await somebody.call("POST", DATABASES, content=body, headers={"content-type": media})
    assert read_response(answer).code == "unsupported_media_type"


@pytest.mark.parametrize(
    "value",
    [
        "Bearer " + "x" * 15_000,
        "Bearer htx_" + "0" * 12_000,
        "Bearer {token},Bearer {token}",
        "Bearer {token}, {token}",
        "Bearer  {token} x",
        "bearer",
        "Bearer htx_é",
    ],
)
async def test_a_credential_that_is_none(somebody: Customer, stack: Stack, value: str) -> None:
    """A long, doubled or disfigured token is no token."""
    header = value.format(token=somebody.token).encode()
    answer = await stack.rest.get(DATABASES, headers=[(b"authorization", header)])
    assert read_response(answer).code == "unauthenticated"


async def test_two_credentials_are_none(somebody: Customer, stack: Stack) -> None:
    """Two authorization headers are refused at both doors, also when both are good or the first one is."""
    good, bad = f"Bearer {somebody.token}", "Bearer htx_bad"
    for pair in ((good, good), (good, bad), (bad, good)):
        answer = await stack.rest.get(DATABASES, headers=[("authorization", value) for value in pair])
        assert read_response(answer).code == "unauthenticated"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await _list(stack, *(("authorization", value) for value in pair))
        assert refused.value.code() is StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("value", [b"Bearer htx_a\nb: c", b"Bearer htx_a\x00", b"Bearer htx_\x01", b"Bearer htx_\xff"])
async def test_control_characters_in_a_credential(somebody: Customer, value: bytes) -> None:
    """A line break, NUL or another control character in a token never gets past the edge; other bytes are no token."""
    line = b"GET /api/portal/databases HTTP/1.1\r\nauthorization: " + value + b"\r\n"
    answer = await _raw(somebody, line, {})
    assert answer.status_code in {400, 401}
    assert answer.json()["code"] in {"invalid_request", "unauthenticated"}
    check_nothing_leaked(answer.json()["error"])


async def test_a_native_token_of_20_kb_is_only_wrong(stack: Stack, native: Native) -> None:
    """A long header is no rate limit and no failure of ours."""
    answer = await native.call("ListDatabases", None, authorization="Bearer " + "x" * 20_000)
    assert answer.code == "unauthenticated"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _list(stack, ("authorization", "Bearer " + "x" * 100_000))
    assert refused.value.code() is StatusCode.RESOURCE_EXHAUSTED


async def _list(stack: Stack, *metadata: tuple[str, str]) -> Answer:
    method: Any = stack.channel.unary_unary("/controlplane.api.v1.DatabaseService/ListDatabases")
    answer: Answer = await method(b"", metadata=metadata, timeout=10)
    return answer


async def _raw(customer: Customer, start: bytes, headers: dict[str, str]) -> httpx.Response:
    """Send bytes that no client would; return the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", customer.stack.settings.http_port)
    named = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(start + f"{named}host: 127.0.0.1\r\nconnection: close\r\n\r\n".encode())
    async with asyncio.timeout(10):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        named_back = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
        body = await reader.readexactly(int(dict(named_back)["content-length"]))
    writer.close()
    return httpx.Response(int(first.split(" ")[1]), headers=named_back, content=body)
