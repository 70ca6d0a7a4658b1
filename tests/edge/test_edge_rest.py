"""REST through the edge: what reaches the server, and what its answers become."""

import gzip
import json
from typing import Any

import grpc
import httpx
import pytest
from google.api import httpbody_pb2
from google.protobuf import json_format

from controlplane.api.v1 import backups_pb2, databases_pb2, errors_pb2
from controlplane.rpc.bare_list import bare_list
from controlplane.rpc.contract import Rpc, rpcs
from tests.edge.conftest import Edge
from tests.edge.upstream import Upstream, answering, failing, refusing, rest_headers

DATABASES = "/api/portal/databases"
CONTRACT = list(rpcs().values())


def path_of(rpc: Rpc) -> str:
    """Return a path of the RPC's route."""
    return rpc.route.replace("{name}", "analytics").replace("{id}", "42")


def no_insides(answer: httpx.Response) -> bool:
    """Whether the answer is free of what only the edge and the server tell each other."""
    inner = ("grpc-", "x-envoy-", "x-http-status", "x-htx-")
    return not [name for name in answer.headers if name.startswith(inner)]


@pytest.mark.parametrize("last", ["", "/"])
@pytest.mark.parametrize("rpc", CONTRACT, ids=lambda rpc: rpc.name)
async def test_every_route_reaches_its_rpc(rpc: Rpc, last: str, edge: Edge, upstream: Upstream) -> None:
    """Each route of the contract reaches its RPC, with and without a last slash, and answers with its status."""
    answer = await edge.http.request(rpc.verb, path_of(rpc) + last, json={} if rpc.body else None)
    assert [each.rpc for each in upstream.received] == [rpc.name]
    assert answer.status_code == rpc.status
    assert no_insides(answer)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert upstream.received[0].metadata["x-envoy-original-path"] == path_of(rpc) + last
    assert upstream.received[0].metadata["x-envoy-original-method"] == rpc.verb


@pytest.mark.parametrize("count", [0, 1, 3, 1000])
async def test_a_list_is_a_bare_array(count: int, edge: Edge, upstream: Upstream) -> None:
    """A list of any length is a bare array, with a content-length that holds."""
    items = [databases_pb2.Database(name=f"d{number}", tags={"a": '"},]'}) for number in range(count)]
    message = bare_list(databases_pb2.ListDatabasesResponse(databases=items), "databases")
    upstream.answers["ListDatabases"] = answering(message, ("link", '</x>; rel="next"'))
    answer = await edge.http.get(DATABASES, headers={"accept-encoding": "identity"})
    assert [each["name"] for each in answer.json()] == [each.name for each in items]
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["link"] == '</x>; rel="next"'
    assert no_insides(answer)


@pytest.mark.parametrize("rpc", [rpc for rpc in CONTRACT if rpc.response_body], ids=lambda rpc: rpc.name)
async def test_every_list_is_a_bare_array(rpc: Rpc, edge: Edge, upstream: Upstream) -> None:
    """Each list of the contract is an array of its items."""
    message = rpc.response()
    getattr(message, rpc.response_body).add()
    upstream.answers[rpc.name] = answering(bare_list(message, rpc.response_body), *rest_headers(rpc))
    items = (await edge.http.get(path_of(rpc))).json()
    assert isinstance(items, list)
    assert len(items) == 1


async def test_an_item_of_a_list_looks_as_it_does_alone(edge: Edge, upstream: Upstream) -> None:
    """The same database, with every kind of field, is the same text in a list and by itself."""
    item = databases_pb2.Database(id="db_1", name="ü", tags={"a": "b"}, size_bytes=4096, connections=0, generation=1)
    item.created_at.FromJsonString("2026-01-02T03:04:05.678Z")
    item.backup_retention.count = 7
    upstream.answers["GetDatabase"] = answering(item)
    upstream.answers["ListDatabases"] = answering(
        bare_list(databases_pb2.ListDatabasesResponse(databases=[item]), "databases")
    )
    alone = (await edge.http.get(f"{DATABASES}/a")).text
    assert (await edge.http.get(DATABASES)).text == f"[{alone}]"


async def test_long_answers_are_compressed_and_those_with_secrets_are_not(edge: Edge, upstream: Upstream) -> None:
    """A list is compressed for a client that asks for it; a password never is."""
    items = [databases_pb2.Database(name=f"d{number}") for number in range(20)]
    message = bare_list(databases_pb2.ListDatabasesResponse(databases=items), "databases")
    upstream.answers["ListDatabases"] = answering(message)
    connection = databases_pb2.DatabaseConnection(password="p" * 2000)
    upstream.answers["GetDatabaseConnection"] = answering(connection)
    async with edge.http.stream("GET", DATABASES, headers={"accept-encoding": "gzip"}) as listed:
        raw = b"".join([part async for part in listed.aiter_raw()])
    assert listed.headers["content-encoding"] == "gzip"
    assert len(json.loads(gzip.decompress(raw))) == 20
    shown = await edge.http.get(f"{DATABASES}/a/connection", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in shown.headers


async def test_a_document_is_passed_on_as_it_is(edge: Edge, upstream: Upstream) -> None:
    """An HttpBody reaches the caller byte for byte, and the server's own cache-control wins."""
    document = httpbody_pb2.HttpBody(
        content_type="application/json", data=b'{"openapi": "3.1.0", "x": "' + b"y" * 9000 + b'"}'
    )
    upstream.answers["GetOpenApi"] = answering(document, ("cache-control", "max-age=60"))
    answer = await edge.http.get("/api/openapi")
    assert answer.content == document.data
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "max-age=60"


async def test_the_servers_headers_pass(edge: Edge, upstream: Upstream) -> None:
    """What the server says to a REST caller in headers arrives, each cookie on its own."""
    headers = {
        "etag": '"1"',
        "location": "/x",
        "retry-after": "7",
        "ratelimit-limit": "120",
        "ratelimit-remaining": "119",
        "www-authenticate": "Bearer",
        "idempotent-replayed": "true",
        "cache-control": "private",
    }
    cookies = [("set-cookie", "a=1; HttpOnly"), ("set-cookie", "b=2")]
    upstream.answers["GetDatabase"] = answering(databases_pb2.Database(), *headers.items(), *cookies)
    answer = await edge.http.get(f"{DATABASES}/a")
    assert {name: answer.headers[name] for name in headers} == headers
    assert answer.headers.get_list("set-cookie") == ["a=1; HttpOnly", "b=2"]


async def test_what_the_client_sends_reaches_the_server(edge: Edge, upstream: Upstream) -> None:
    """Credentials, origin, conditions and trace reach the server as they were sent."""
    headers = {
        "authorization": "Bearer htx_1",
        "cookie": "__Host-htx_session=abc",
        "origin": "https://example.com",
        "referer": "https://example.com/",
        "sec-fetch-site": "same-origin",
        "idempotency-key": "k",
        "if-match": '"1"',
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    body = {"name": "analytics", "tags": {"a/b": "ü"}, "deletion_protection": True}
    answer = await edge.http.post(f"{DATABASES}?validate_only=true", json=body, headers=headers)
    assert answer.status_code == 201
    received = upstream.received[0]
    assert {name: received.metadata[name] for name in headers} == headers
    assert json_format.MessageToDict(received.request, preserving_proto_field_name=True) == {
        "database": body,
        "validate_only": True,
    }
    assert received.deadline
    assert 3 < received.deadline <= 3.5


async def test_a_client_cannot_say_what_only_the_edge_says(edge: Edge, upstream: Upstream) -> None:
    """Whatever a client claims, the server gets the address and the request id of the edge, and nothing of gRPC's."""
    forged = {
        "x-htx-host": "evil.example",
        "x-htx-client-ip": "6.6.6.6",
        "x-htx-user": "root",
        "x-forwarded-for": "6.6.6.6",
        "x-envoy-external-address": "6.6.6.6",
        "x-envoy-original-path": "/evil",
        "x-envoy-original-method": "TRACE",
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-http-status": "418",
        "x-request-id": "11111111-1111-1111-1111-111111111111",
        "grpc-encoding": "gzip",
        "grpc-timeout": "1n",
        "x-broken-bin": "!!!",
        "x!odd": "1",
    }
    answer = await edge.http.get(f"{DATABASES}/a", headers=forged)
    metadata = upstream.received[0].metadata
    assert metadata["x-htx-client-ip"] == "127.0.0.1"
    assert metadata["x-htx-host"] == edge.target
    assert metadata["x-envoy-original-path"] == f"{DATABASES}/a"
    assert metadata["x-envoy-original-method"] == "GET"
    assert metadata["x-request-id"] == answer.headers["x-request-id"] != forged["x-request-id"]
    assert not set(metadata) & {"x-htx-user", "x-http-status", "grpc-encoding", "x-broken-bin", "x!odd"}
    assert answer.status_code == 200


async def test_a_large_header_reaches_the_server(edge: Edge, upstream: Upstream) -> None:
    """Headers up to the edge's limit pass to a server that takes 32 KB of metadata."""
    answer = await edge.http.get(f"{DATABASES}/a", headers={"authorization": "Bearer " + "a" * 15000})
    assert answer.status_code == 200
    assert len(upstream.received[0].metadata["authorization"]) == 15007


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, None),
        ({"content-length": "0"}, None),
        ({"content-type": "application/json"}, b""),
        ({"content-type": "application/x-www-form-urlencoded", "content-length": "0"}, b""),
        ({"content-type": "application/json; charset=utf-8"}, b"{}"),
    ],
)
async def test_a_post_needs_no_body_where_there_is_nothing_to_say(
    headers: dict[str, str], body: bytes | None, edge: Edge, upstream: Upstream
) -> None:
    """A backup is ordered with an empty body, with any content type or none."""
    upstream.answers["CreateBackup"] = answering(backups_pb2.Backup(id="b1"), ("x-http-status", "201"))
    answer = await edge.http.post(f"{DATABASES}/a/backups", headers=headers, content=body)
    assert (answer.status_code, answer.json()["id"]) == (201, "b1")


@pytest.mark.parametrize(
    ("status", "http", "headers"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, 401, {"www-authenticate": "Bearer"}),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 402, {}),
        (grpc.StatusCode.NOT_FOUND, 404, {}),
        (grpc.StatusCode.FAILED_PRECONDITION, 412, {}),
        (grpc.StatusCode.FAILED_PRECONDITION, 422, {}),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 429, {"retry-after": "7", "ratelimit-limit": "120"}),
        (grpc.StatusCode.INTERNAL, 500, {}),
    ],
)
async def test_the_servers_errors_have_our_form(
    status: grpc.StatusCode, http: int, headers: dict[str, str], edge: Edge, upstream: Upstream
) -> None:
    """An error has the server's status, sentence, code, request id and headers, and no empty list of fields."""
    error = errors_pb2.Error(error='Not „so“, "thus".', code="some_code", request_id="r1")
    refused = refusing(status, http, error, *headers.items())
    upstream.answers |= {"ListDatabases": refused, "CreateDatabase": refused}
    for answer in (await edge.http.get(DATABASES), await edge.http.post(DATABASES)):
        assert answer.status_code == http
        assert answer.json() == {"error": error.error, "code": error.code, "request_id": "r1"}
        assert answer.headers["content-type"] == "application/json"
        assert int(answer.headers["content-length"]) == len(answer.content)
        assert {name: answer.headers[name] for name in headers} == headers
        assert no_insides(answer)


async def test_broken_rules_name_their_fields(edge: Edge, upstream: Upstream) -> None:
    """An error about fields lists each with its rule."""
    fields = [errors_pb2.FieldError(field="name", error="is taken"), errors_pb2.FieldError(field="sku", error="no")]
    error = errors_pb2.Error(error="name: is taken", code="invalid_field", request_id="r1", fields=fields)
    upstream.answers["CreateDatabase"] = refusing(grpc.StatusCode.INVALID_ARGUMENT, 400, error)
    answer = await edge.http.post(DATABASES, json={"name": "a"})
    assert answer.json()["fields"] == [{"field": "name", "error": "is taken"}, {"field": "sku", "error": "no"}]


@pytest.mark.parametrize(
    ("status", "http", "code"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 503, "unavailable"),
        (grpc.StatusCode.UNAVAILABLE, 503, "unavailable"),
        (grpc.StatusCode.CANCELLED, 503, "unavailable"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 504, "timeout"),
        (grpc.StatusCode.INTERNAL, 500, "internal"),
        (grpc.StatusCode.UNKNOWN, 500, "internal"),
    ],
)
async def test_what_grpc_itself_says_stays_inside(
    status: grpc.StatusCode, http: int, code: str, edge: Edge, upstream: Upstream
) -> None:
    """An error that the server's own code did not make has our form too, and none of its words."""
    upstream.answers["CreateDatabase"] = failing(status, "<class 'Secret'>")
    answer = await edge.http.post(DATABASES, json={})
    made: dict[str, Any] = answer.json()
    assert (answer.status_code, made["code"]) == (http, code)
    assert made["request_id"] == answer.headers["x-request-id"]
    assert "Secret" not in answer.text
    assert set(made) == {"error", "code", "request_id"}
    assert answer.headers.get("retry-after") == ("1" if http == 503 else None)


async def test_the_lua_filters_have_made_no_error(edge: Edge, upstream: Upstream) -> None:
    """Lua errors, which Envoy swallows, do not happen: lists, errors and bodies count none."""
    await edge.http.get(DATABASES)
    await edge.http.get(f"{DATABASES}?page_size=x")
    await edge.http.post(DATABASES, json={"name": "a"})
    await edge.http.post(DATABASES, json={"nme": "a"})
    upstream.answers["GetDatabase"] = failing(grpc.StatusCode.INTERNAL, "x")
    await edge.http.get(f"{DATABASES}/a")
    stats = (await edge.admin.get("/stats?filter=lua.*(errors|executions)")).text
    counts = dict(line.rsplit(": ", 1) for line in stats.splitlines())
    assert [count for name, count in counts.items() if name.endswith("errors")] == ["0"], stats
    assert [count for name, count in counts.items() if name.endswith("executions") and int(count) > 5], stats
