"""Bodies that are no order: not JSON, not the JSON of this route, too large, or not a message."""

from typing import Any

import grpc
import pytest
from grpc import StatusCode

from tests.doors import RPCS, Door, Native, read_response
from tests.stack import Customer, Stack

DATABASES = "/api/portal/databases"
NEW = {"name": "good", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "name"),
        (b"{}", "name"),
        (b" ", "object"),
        (b"null", "object"),
        (b"[]", "object"),
        (b'"text"', "object"),
        (b"17", "object"),
        (b'[{"name":"good"}]', "object"),
        (b'{"name":"good","name":"other","engine":"postgresql","sku":"db-s-1vcpu-1gb"}', "twice"),
        (b'{"name":17,"engine":"postgresql","sku":"db-s-1vcpu-1gb"}', "name"),
        (b'{"name":["good"],"engine":"postgresql","sku":"db-s-1vcpu-1gb"}', "list"),
        (b'{"name":{"a":1},"engine":"postgresql","sku":"db-s-1vcpu-1gb"}', "field"),
        (b'{"name":null,"engine":"postgresql","sku":"db-s-1vcpu-1gb"}', "name"),
        (b'{"name":"good","engine":"postgresql","sku":"db-s-1vcpu-1gb","tags":["a"]}', "tags"),
        (b'{"name":"good","engine":"postgresql","sku":"db-s-1vcpu-1gb","tags":{"a":17}}', "tags"),
        (b'{"name":"good","engine":"postgresql","sku":"db-s-1vcpu-1gb","deletion_protection":"maybe"}', "protection"),
        (b'{"name":"good","engine":"postgresql","sku":"db-s-1vcpu-1gb","tags":{"a":1e999}}', ""),
        (b'{"name":' + b"9" * 5000 + b"}", ""),
        (b'{"tags":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", "deep"),
        (b'{"tags":' + b"[" * 30000, "deep"),
        (b'{"name":"\xff\xfe"}', "UTF-8"),
        (b'{"name":"\\ud800"}', ""),
        (b'{"name":"good"', "JSON"),
        (b"name=good", "object"),
        (b"\x00" * 100, "object"),
    ],
)
async def test_a_body_that_is_no_order(somebody: Customer, body: bytes, words: str) -> None:
    """Empty, broken, nested, mistyped and repeating bodies are refused, and the sentence says why."""
    headers = {"content-type": "application/json"}
    answer = read_response(await somebody.call("POST", DATABASES, content=body, headers=headers))
    assert answer.code in {"invalid_request", "invalid_field"}
    assert words in answer.sentence


@pytest.mark.parametrize(
    "number", ["0", "-1", "1.5", "4294967296", "1e400", "99999999999999999999", '"many"', "[1]", "true", "NaN"]
)
async def test_a_number_that_does_not_fit(somebody: Customer, number: str) -> None:
    """A number below, above or beside what its field takes is refused."""
    body = f'{{"name":"a","rate_limit_per_minute":{number}}}'
    headers = {"content-type": "application/json"}
    sent = await somebody.by_login("POST", "/api/portal/tokens", content=body, headers=headers)
    assert read_response(sent).code in {"invalid_request", "invalid_field"}


@pytest.mark.parametrize(
    "time",
    ["", "now", "2050-01-01", "2050-13-01T00:00:00Z", "10000-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "1e9"],
)
async def test_a_time_that_is_none(somebody: Customer, time: str) -> None:
    """A time that is not RFC 3339, or lies outside of the years that there are, is refused."""
    body = {"name": "a", "expires_at": time}
    sent = await somebody.by_login("POST", "/api/portal/tokens", json=body)
    assert read_response(sent).code in {"invalid_request", "invalid_field"}


async def test_a_body_of_70_kb_is_too_large(bearer: dict[str, str], door: Door) -> None:
    """Above 64 KB nothing is read, whatever it says."""
    tags = {f"k{number}": "v" * 255 for number in range(270)}
    answer = await door.call("CreateDatabase", {"database": {**NEW, "tags": tags}}, **bearer)
    assert answer.code == "too_large"


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff",
        b"\x0a",
        b"\x0a\xff\xff\xff\xff\x0f",
        b"\x0b",
        b"\x0a\x03\x0a\x01\xff",
        b"\x08\x01",
        b"\x00\x00\x00",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b'{"name": "good"}',
        b"\x12" * 1000,
    ],
)
async def test_bytes_that_are_no_message(bearer: dict[str, str], native: Native, raw: bytes) -> None:
    """Malformed messages are refused with one sentence, by who reads and who writes, and only after who is asking."""
    for name in ("CreateDatabase", "UpdateDatabase", "GetDatabase"):
        answer = await native.send(RPCS[name], raw, **bearer)
        assert answer.code in {"invalid_request", "invalid_field"}
        assert (await native.send(RPCS[name], raw)).code == "unauthenticated"


async def test_a_native_request_that_cannot_be_kept(somebody: Customer, native: Native) -> None:
    """Times outside of all years, values of no kind and numbers beyond the storage's are refused or bounded."""
    login = {"cookie": somebody.cookie, "sec_fetch_site": "same-origin"}
    create, update = RPCS["CreateToken"], RPCS["UpdateDatabase"]
    for time in ({"seconds": 10**15}, {"seconds": -(10**15)}, {"seconds": 2**62}, {"seconds": 1, "nanos": 2**31 - 1}):
        token = create.request(token={"name": "a", "expires_at": time})
        answer = await native.send(create, token.SerializeToString(), **login)
        assert (answer.code, next(iter(answer.fields)).rpartition(".")[2]) == ("invalid_field", "expires_at")
    values: list[dict[str, Any]] = [{"a": {}}, {"a": {"list_value": {}}}, {"": {"null_value": 0}}]
    for fields in values:
        change = update.request(name="a", database={"tags": {"fields": fields}})
        assert (await native.send(update, change.SerializeToString(), **login)).code == "invalid_field"
    nested: dict[str, Any] = {"fields": {"a": {"string_value": "v"}}}
    for _ in range(40):
        nested = {"fields": {"a": {"struct_value": nested}}}
    change = update.request(name="a", database={"tags": nested})
    assert (await native.send(update, change.SerializeToString(), **login)).code in {
        "invalid_field",
        "invalid_request",
    }


async def test_a_message_beyond_all_bounds_and_unknown_methods(stack: Stack) -> None:
    """A message of 17 MB, and a method or service that there is not, are refused by gRPC itself."""
    expected = {
        "DatabaseService/ListDatabases": (b"\0" * 17_000_000, StatusCode.RESOURCE_EXHAUSTED),
        "DatabaseService/DropEverything": (b"", StatusCode.UNIMPLEMENTED),
        "NoService/ListDatabases": (b"", StatusCode.UNIMPLEMENTED),
    }
    for path, (raw, code) in expected.items():
        method: Any = stack.channel.unary_unary(f"/controlplane.api.v1.{path}")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await method(raw, timeout=10)
        assert refused.value.code() is code
