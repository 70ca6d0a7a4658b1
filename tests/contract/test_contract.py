"""Every RPC of the contract against every kind of caller, at both doors, and an RPC that nobody made a policy for."""

import asyncio
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from google.api import annotations_pb2
from google.protobuf import descriptor_pb2, descriptor_pool

from controlplane.api.v1 import access_pb2
from controlplane.rpc.contract import ContractError, Rpc, read_rpc, rpcs
from tests.doors import Door
from tests.stack import Stack

SCOPES = ("full", "read", "databases", "functions", "proxies")
EVERYONE = {"nobody", "revoked", "expired", "login", *SCOPES}
HOLDERS = {"login", *SCOPES}
# Who may call what. It is written out here and not read from the contract, so that a slip there shows.
ALLOWED: dict[str, set[str]] = {
    "GetOpenApi": EVERYONE,
    "CreateSession": EVERYONE,
    "GetSession": {"login"},
    "DeleteSession": {"login"},
    "GetMe": HOLDERS,
    "GetAccount": HOLDERS,
    "ListPlans": HOLDERS,
    "ListSkus": HOLDERS,
    "ListRegions": HOLDERS,
    "ListTokens": {"login"},
    "CreateToken": {"login"},
    "GetToken": {"login"},
    "RotateToken": {"login"},
    "DeleteToken": {"login"},
    "ListDatabases": HOLDERS,
    "GetDatabase": HOLDERS,
    "CreateDatabase": {"login", "full", "databases"},
    "UpdateDatabase": {"login", "full", "databases"},
    "DeleteDatabase": {"login", "full", "databases"},
    "GetDatabaseConnection": {"login", "full", "databases"},
    "ListBackups": HOLDERS,
    "GetBackup": HOLDERS,
    "CreateBackup": {"login", "full", "databases"},
    "DeleteBackup": {"login", "full", "databases"},
    "ListFunctions": HOLDERS,
    "ListProxies": HOLDERS,
}
# Requests that change nothing: what they name does not exist, or they only validate.
REQUESTS: dict[str, dict[str, Any]] = {
    "CreateDatabase": {"database": {"name": "a", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}},
    "UpdateDatabase": {"database": {"deletion_protection": True}},
    "CreateToken": {"token": {"name": "a"}},
    "CreateSession": {"session": {"email": "", "password": ""}},
}
CONTRACT = list(rpcs().values())


@pytest.fixture(scope="module")
async def callers(stack: Stack) -> dict[str, dict[str, str]]:
    """What each kind of caller sends."""
    customer = await stack.customer()
    ends = datetime.now(UTC) + timedelta(seconds=1)
    secrets = {scope: (await customer.new_token(scope=scope))["token"] for scope in SCOPES}
    expired = await customer.new_token(expires_at=ends.isoformat())
    revoked = await customer.new_token()
    assert (await customer.by_login("DELETE", f"/api/portal/tokens/{revoked['id']}")).status_code == 200
    await asyncio.sleep((ends - datetime.now(UTC)).total_seconds() + 0.05)
    secrets |= {"revoked": revoked["token"], "expired": expired["token"]}
    bearers = {kind: {"authorization": f"Bearer {secret}"} for kind, secret in secrets.items()}
    return {**bearers, "nobody": {}, "login": {"cookie": customer.cookie, "sec-fetch-site": "same-origin"}}


@pytest.mark.parametrize("rpc", CONTRACT, ids=lambda rpc: rpc.name)
async def test_each_rpc_lets_in_whom_it_may(rpc: Rpc, callers: dict[str, dict[str, str]], door: Door) -> None:
    """Each RPC has a servicer, answers the callers that it is for, and refuses every other kind for its reason."""
    asked = {"name": "nowhere", "id": "tk_none", "validate_only": True}
    fields = rpc.request.DESCRIPTOR.fields_by_name
    request = {name: value for name, value in asked.items() if name in fields} | REQUESTS.get(rpc.name, {})
    for kind in sorted(callers):
        if (rpc.name, kind) == ("DeleteSession", "login"):
            continue  # it would log the others out, and tests/sessions has it
        answer = await door.call(rpc.name, request, **callers[kind])
        if kind in ALLOWED[rpc.name]:
            expected = {"invalid_field"} if rpc.name == "CreateSession" else {"ok", "not_found"}
            assert answer.code in expected, (kind, answer.sentence)
        elif kind in {"nobody", "revoked", "expired"}:
            assert answer.code == "unauthenticated", kind
        elif "login" in ALLOWED[rpc.name] and len(ALLOWED[rpc.name]) == 1:
            assert answer.code == "login_required", kind
        else:
            assert answer.code == "scope_denied", kind
            assert f"'{kind}'" in answer.sentence


def test_each_rpc_is_in_the_table() -> None:
    """A new RPC needs a line that says who may call it."""
    assert set(ALLOWED) == {rpc.name for rpc in CONTRACT}
    assert len(CONTRACT) == len(ALLOWED)


def test_an_rpc_without_a_policy_is_an_error() -> None:
    """Reading an RPC fails that lacks a policy or a route, and says which option to add."""
    with pytest.raises(ContractError, match=r"Orphans\.Nothing has no access policy: add `option \(access\)"):
        read_rpc(_method())
    with pytest.raises(ContractError, match=r"Orphans\.Public has no REST route: add `option \(google\.api\.http\)"):
        read_rpc(_method(public=True))
    options = descriptor_pb2.MethodOptions()
    options.Extensions[annotations_pb2.http].get = "/orphans"
    with pytest.raises(ContractError, match="has no access policy"):
        read_rpc(_method(options=options))


def test_an_rpc_without_a_policy_stops_the_start(tmp_path: Path) -> None:
    """A server whose contract has such an RPC does not start: it ends before it listens or makes anything."""
    (tmp_path / "modules").mkdir()
    module = tmp_path / "modules" / "orphans_pb2.py"
    module.write_text(
        "from google.protobuf import descriptor_pool\n"
        f"DESCRIPTOR = descriptor_pool.Default().AddSerializedFile({_file('Nothing').SerializeToString()!r})\n"
    )
    script = (
        "import sys, controlplane.api.v1 as v1; v1.__path__.append(sys.argv.pop());"
        "from controlplane.cli.main import main; main()"
    )
    data = tmp_path / "data"
    started = subprocess.run(
        [sys.executable, "-c", script, "serve", str(module.parent)],
        env={**os.environ, "HTX_DATA_DIR": str(data)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert started.returncode == 1
    assert "test.Orphans.Nothing has no access policy" in started.stderr
    assert not (data / "run" / "server.sock").exists()


def _method(*, public: bool = False, options: descriptor_pb2.MethodOptions | None = None) -> Any:
    """Return the descriptor of an RPC with these options only."""
    options = options or descriptor_pb2.MethodOptions()
    name = "Public" if public else "Nothing"
    if public:
        options.Extensions[access_pb2.access].public = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file(name, options))
    return pool.FindServiceByName("test.Orphans").methods_by_name[name]


def _file(method: str, options: descriptor_pb2.MethodOptions | None = None) -> descriptor_pb2.FileDescriptorProto:
    message = descriptor_pb2.DescriptorProto(name="Empty")
    rpc = descriptor_pb2.MethodDescriptorProto(name=method, input_type=".test.Empty", output_type=".test.Empty")
    if options is not None:
        rpc.options.CopyFrom(options)
    service = descriptor_pb2.ServiceDescriptorProto(name="Orphans", method=[rpc])
    return descriptor_pb2.FileDescriptorProto(
        name="test/orphans.proto", package="test", syntax="proto3", message_type=[message], service=[service]
    )
