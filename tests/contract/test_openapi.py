"""The OpenAPI document: valid, complete, true to the contract, and still saying what the vendors' documents say."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import protovalidate
import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from openapi_schema_validator import OAS31Validator, oas31_format_checker
from openapi_spec_validator import OpenAPIV31SpecValidator

from controlplane import api
from controlplane.access.permissions import SCOPES
from controlplane.api.v1 import backups_pb2, databases_pb2, sessions_pb2, tokens_pb2
from controlplane.rpc.contract import Rpc, rpcs

Json = dict[str, Any]

DOCUMENT: Json = json.loads((Path(api.__path__[0]) / "openapi.json").read_text())
DOCUMENTED: Json = tomllib.loads(Path(__file__).with_name("documented.toml").read_text())

each_rpc = pytest.mark.parametrize("rpc", rpcs().values(), ids=lambda rpc: rpc.name)


def test_it_is_valid() -> None:
    """The document is valid OpenAPI 3.1."""
    errors = [error.message for error in OpenAPIV31SpecValidator(DOCUMENT).iter_errors()]
    assert errors == []
    assert DOCUMENT["openapi"] == "3.1.0"


@pytest.mark.parametrize("fact", DOCUMENTED["operations"], ids=lambda fact: f"{fact['method']} {fact['path']}")
def test_a_documented_operation_is_there(fact: Json) -> None:
    """Each documented operation is there with its parameters, JSON and statuses."""
    operation = DOCUMENT["paths"][fact["path"]][fact["method"]]
    assert {str(status) for status in fact["statuses"]} <= set(operation["responses"])
    assert {"bearerAuth": []} in operation["security"]
    in_path = {parameter["name"] for parameter in _parameters(operation) if parameter["in"] == "path"}
    assert in_path == set(fact.get("parameters", []))
    if "request" in fact:
        assert operation["requestBody"]["required"] is True
        assert _schema(operation["requestBody"]) == _component(fact["request"])
    if "answer" in fact:
        answer = _schema(operation["responses"][str(fact["statuses"][0])])
        wanted = _component(fact["answer"])
        assert answer == ({"type": "array", "items": wanted} if fact.get("list") else wanted)


@pytest.mark.parametrize("name", DOCUMENTED["schemas"])
def test_a_documented_schema_is_there(name: str) -> None:
    """Each documented schema has its properties with their types and values, and demands what it demanded."""
    schema, fact = DOCUMENT["components"]["schemas"][name], DOCUMENTED["schemas"][name]
    assert schema["type"] == "object"
    for field, wanted in fact["properties"].items():
        found = schema["properties"][field]
        assert {key: _shape(found[key]) for key in wanted} == wanted
    if "required" in fact:
        assert schema["required"] == fact["required"]


def _shape(found: Any) -> Any:
    """Leave out what we say beyond the documents."""
    if isinstance(found, dict):
        return {key: value for key, value in found.items() if key not in {"example", "examples", "description"}}
    return found


def test_the_documented_credential_is_there() -> None:
    """The bearer scheme has its documented name and is asked for by default."""
    scheme = DOCUMENT["components"]["securitySchemes"][DOCUMENTED["bearer"]]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert {DOCUMENTED["bearer"]: []} in DOCUMENT["security"]


def test_the_documented_request_is_the_example() -> None:
    """The example of a new database is the documented curl line's."""
    body = DOCUMENT["paths"]["/api/portal/databases"]["post"]["requestBody"]
    wanted = {"name": "analytics", "engine": "postgresql", "sku": "db-s-1vcpu-2gb"}
    assert body["content"]["application/json"]["example"] == wanted


def test_each_rpc_has_an_operation_and_no_other_exists() -> None:
    """The document has the RPCs' routes and nothing else."""
    documented = {
        (operation["operationId"], verb.upper(), path.removesuffix("/"))
        for path, operations in DOCUMENT["paths"].items()
        for verb, operation in operations.items()
    }
    assert documented == {(rpc.name, rpc.verb, rpc.route) for rpc in rpcs().values()}


@each_rpc
def test_an_operation_asks_for_what_the_policy_asks(rpc: Rpc) -> None:
    """An operation shows the credentials, the permission and the scopes that its RPC's policy takes."""
    operation = _operation(rpc)
    wanted: Json = {
        "public": [],
        "login": [{"sessionCookie": []}],
        "authenticated": [{"bearerAuth": []}, {"sessionCookie": []}],
        "permission": [{"bearerAuth": []}, {"sessionCookie": []}],
    }
    assert operation["security"] == wanted[rpc.access.WhichOneof("rule") or ""]
    assert operation.get("x-permission", "") == rpc.access.permission
    if rpc.access.permission:
        reads = rpc.access.permission.endswith((":get", ":list"))
        product = rpc.access.permission.partition(":")[0]
        assert operation["x-scopes"] == [scope for scope in SCOPES if reads or scope in {"full", product}]
        assert f"`{rpc.access.permission}`" in operation["responses"]["403"]["description"]


@each_rpc
def test_an_operation_takes_every_field_of_the_request(rpc: Rpc) -> None:
    """Each field of a request is a path parameter, a query parameter or the body."""
    operation = _operation(rpc)
    places = {parameter["name"]: parameter["in"] for parameter in _parameters(operation)}
    assert {name for name, place in places.items() if place == "path"} == set(re.findall(r"\{(\w+)\}", rpc.route))
    fields = {name for name, place in places.items() if place != "header"} | ({rpc.body} if rpc.body else set())
    assert fields == set(rpc.request.DESCRIPTOR.fields_by_name)
    assert ("requestBody" in operation) == bool(rpc.body)


@each_rpc
def test_an_operation_lists_its_answers(rpc: Rpc) -> None:
    """An operation lists the status of success, its RPC's own errors, and the errors that all of its kind share."""
    operation = _operation(rpc)
    wanted = {rpc.status, 400, 431, 503, 504, *rpc.errors}
    if rpc.body:
        wanted |= {413, 415}
    if not rpc.access.public:
        wanted |= {401, 403, 429}
        wanted |= {409, 422} if rpc.verb == "POST" else set()
    assert set(operation["responses"]) == {str(status) for status in wanted}
    for status in wanted - {rpc.status}:
        assert _schema(_resolve(operation["responses"][str(status)])) == _component("Error")
    if rpc.status == 303:
        assert "content" not in operation["responses"]["303"]
        return
    answer = _schema(operation["responses"][str(rpc.status)])
    assert (answer.get("type") == "array") == bool(rpc.response_body)


@each_rpc
def test_an_operation_lists_its_headers(rpc: Rpc) -> None:
    """Idempotency, versions, pages, the rate and the request's id stand where they apply."""
    operation = _operation(rpc)
    takes = {parameter["name"] for parameter in _parameters(operation) if parameter["in"] == "header"}
    gives = set(operation["responses"][str(rpc.status)]["headers"])
    repeatable = rpc.verb == "POST" and not rpc.access.public
    versioned = {"Backup", "Database", "DatabaseConnection", "Function", "Proxy", "Token"}
    assert ("Idempotency-Key" in takes) == ("Idempotent-Replayed" in gives) == repeatable
    assert ("If-Match" in takes) == (412 in rpc.errors)
    assert ("ETag" in gives) == (rpc.response.DESCRIPTOR.name in versioned)
    assert ("Link" in gives) == (rpc.waits or "page_token" in rpc.request.DESCRIPTOR.fields_by_name)
    assert ("Location" in gives) == (rpc.status == 303)
    by_token = bool(rpc.access.permission) or rpc.access.authenticated
    assert {"RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"}.issubset(gives) == by_token
    assert all("X-Request-Id" in _resolve(answer)["headers"] for answer in operation["responses"].values())
    if "429" in operation["responses"]:
        assert "Retry-After" in _resolve(operation["responses"]["429"])["headers"]


def test_every_reference_leads_somewhere() -> None:
    """Every `$ref` leads to a component, and every component is led to."""
    references = {node["$ref"] for node in _nodes(DOCUMENT) if "$ref" in node}
    components = {
        f"#/components/{kind}/{name}"
        for kind, named in DOCUMENT["components"].items()
        if kind != "securitySchemes"
        for name in named
    }
    assert references == components


def test_every_example_is_valid() -> None:
    """Each example in the document is valid against the schema that it stands beside."""
    examples = [
        (node, example)
        for node in _nodes(DOCUMENT)
        if isinstance(node.get("examples"), list)
        for example in node["examples"]
    ]
    examples += [
        (node["schema"], node["example"]) for node in _nodes(DOCUMENT) if "schema" in node and "example" in node
    ]
    broken = [(example, error.message) for schema, example in examples for error in _errors(schema, example)]
    assert broken == []
    assert {"name": "analytics-copy"} in [example for _, example in examples]


@pytest.mark.parametrize("rpc", [rpc for rpc in rpcs().values() if rpc.body], ids=lambda rpc: rpc.name)
def test_the_server_takes_the_examples_of_a_body(rpc: Rpc) -> None:
    """Each example of a body keeps the field rules that the server checks."""
    body = _operation(rpc)["requestBody"]
    for example in [body["content"]["application/json"]["example"], *_resolve(_schema(body))["examples"]]:
        request = json_format.ParseDict({rpc.body: example}, rpc.request())
        assert protovalidate.collect_violations(getattr(request, rpc.body)) == []


@pytest.mark.parametrize(
    ("message", "body", "right"),
    [
        (databases_pb2.CreateDatabase, {}, True),
        (databases_pb2.CreateDatabase, {"name": "Analytics"}, False),
        (databases_pb2.CreateDatabase, {"name": ""}, False),
        (databases_pb2.CreateDatabase, {"name": "a" * 63}, True),
        (databases_pb2.CreateDatabase, {"name": "a" * 64}, False),
        (databases_pb2.CreateDatabase, {"engine": "oracle"}, False),
        (databases_pb2.CreateDatabase, {"sku": ""}, False),
        (databases_pb2.CreateDatabase, {"sku": "é" * 64}, True),
        (databases_pb2.CreateDatabase, {"sku": "é" * 65}, False),
        (databases_pb2.CreateDatabase, {"region": ""}, False),
        (databases_pb2.CreateDatabase, {"tags": {"env": ""}}, True),
        (databases_pb2.CreateDatabase, {"tags": {"-": "live"}}, False),
        (databases_pb2.CreateDatabase, {"tags": {"env": "a" * 256}}, False),
        (databases_pb2.CreateDatabase, {"tags": {f"t{n}": "" for n in range(51)}}, False),
        (databases_pb2.UpdateDatabase, {"tags": {"env": None, "team": "data"}}, True),
        (databases_pb2.CreateDatabase, {"backup_schedule": "0 3 * * *"}, True),
        (databases_pb2.CreateDatabase, {"backup_schedule": "0" * 101}, False),
        (databases_pb2.CreateDatabase, {"backup_retention": {}}, True),
        (databases_pb2.CreateDatabase, {"backup_retention": {"count": 0}}, False),
        (databases_pb2.CreateDatabase, {"backup_retention": {"days": 3651}}, False),
        (databases_pb2.UpdateDatabase, {"tags": {"env": 1}}, False),
        (databases_pb2.UpdateDatabase, {"backup_schedule": ""}, False),
        (databases_pb2.UpdateDatabase, {"backup_retention": {"count": 1001}}, False),
        (backups_pb2.RestoreDatabase, {"name": "Copy"}, False),
        (backups_pb2.RestoreDatabase, {"sku": ""}, False),
        (sessions_pb2.CreateSession, {"password": ""}, False),
        (sessions_pb2.CreateSession, {"email": "a" * 255}, False),
        (tokens_pb2.CreateToken, {"scope": "everything"}, False),
        (tokens_pb2.CreateToken, {"allowed_ips": ["::1"] * 100}, True),
        (tokens_pb2.CreateToken, {"allowed_ips": ["::1"] * 101}, False),
        (tokens_pb2.CreateToken, {"allowed_ips": [""]}, False),
        (tokens_pb2.CreateToken, {"rate_limit_per_minute": 0}, False),
        (tokens_pb2.CreateToken, {"rate_limit_per_minute": 1}, True),
    ],
)
def test_the_document_and_the_server_agree(message: type[Message], body: Json, right: bool) -> None:
    """A body is valid by the document's schema when and only when it keeps the server's field rules."""
    name = message.DESCRIPTOR.name
    whole = DOCUMENT["components"]["schemas"][name]["examples"][0] | body
    violations = protovalidate.collect_violations(json_format.ParseDict(whole, message()))
    assert (not violations) is right
    assert (not _errors(_component(name), whole)) is right


@pytest.mark.parametrize("name", ["CreateDatabase", "RestoreDatabase", "CreateSession", "CreateToken"])
def test_what_the_server_requires_is_required(name: str) -> None:
    """A body without one of its required fields is refused by the document and by the server."""
    schema = DOCUMENT["components"]["schemas"][name]
    modules = {
        "CreateDatabase": databases_pb2,
        "RestoreDatabase": backups_pb2,
        "CreateSession": sessions_pb2,
        "CreateToken": tokens_pb2,
    }
    for missing in schema["required"]:
        body = {field: value for field, value in schema["examples"][0].items() if field != missing}
        message = json_format.ParseDict(body, getattr(modules[name], name)())
        assert protovalidate.collect_violations(message)
        assert _errors(_component(name), body)


def _operation(rpc: Rpc) -> Json:
    paths: Json = {path.removesuffix("/"): operations for path, operations in DOCUMENT["paths"].items()}
    operation: Json = paths[rpc.route][rpc.verb.lower()]
    return operation


def _parameters(operation: Json) -> list[Json]:
    return [_resolve(parameter) for parameter in operation.get("parameters", [])]


def _schema(node: Json) -> Json:
    schema: Json = node["content"]["application/json"]["schema"]
    return schema


def _component(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _resolve(node: Json) -> Json:
    if "$ref" not in node:
        return node
    found = DOCUMENT
    for step in node["$ref"].removeprefix("#/").split("/"):
        found = found[step]
    return found


def _nodes(node: Any) -> Iterator[Json]:
    """Yield every JSON object in the document."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _nodes(child)


def _errors(schema: Json, value: Any) -> list[Any]:
    whole = schema | {"components": DOCUMENT["components"]}
    return list(OAS31Validator(whole, format_checker=oas31_format_checker).iter_errors(value))
