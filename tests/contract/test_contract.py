"""Every RPC against every kind of caller and every permission, at both doors; the page about it; what has no policy."""

import asyncio
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from google.api import annotations_pb2
from google.protobuf import descriptor_pb2, descriptor_pool

from controlplane.api.v1 import access_pb2
from controlplane.rpc.contract import ContractError, Rpc, read_rpc, rpcs
from tests.doors import Answer, Door, Native
from tests.stack import PASSWORD, Stack

SCOPES = ("full", "read", "databases", "functions", "proxies")
EVERYONE = {"nobody", "revoked", "expired", "login", *SCOPES}
HOLDERS = {"login", *SCOPES}
REFUSALS = {"unauthenticated", "scope_denied", "login_required"}
# Who may call what. It is written out here and not read from the contract, so that a slip there shows.
ALLOWED: dict[str, set[str]] = {
    "GetOpenApi": EVERYONE,
    "CreateSession": EVERYONE,
    "GetSession": {"login"},
    "DeleteSession": {"login"},
    "ListSessions": {"login"},
    "RevokeSession": {"login"},
    "BeginSession": EVERYONE,
    "FinishSession": EVERYONE,
    "ChangePassword": {"login"},
    "ListAuditEntries": HOLDERS,
    "ListEvents": HOLDERS,
    "GetMe": HOLDERS,
    "GetAccount": HOLDERS,
    "ListPlans": HOLDERS,
    "ListSkus": HOLDERS,
    "ListRegions": HOLDERS,
    "ListTokens": {"login"},
    "CreateToken": {"login"},
    "GetToken": {"login"},
    "UpdateToken": {"login"},
    "RotateToken": {"login"},
    "DeleteToken": {"login"},
    "ListDatabases": HOLDERS,
    "GetDatabase": HOLDERS,
    "CreateDatabase": {"login", "full", "databases"},
    "UpdateDatabase": {"login", "full", "databases"},
    "DeleteDatabase": {"login", "full", "databases"},
    "GetDatabaseConnection": {"login", "full", "databases"},
    "RotateDatabasePassword": {"login", "full", "databases"},
    "StopDatabase": {"login", "full", "databases"},
    "StartDatabase": {"login", "full", "databases"},
    "RetryDatabase": {"login", "full", "databases"},
    "UndeleteDatabase": {"login", "full", "databases"},
    "ListBackups": HOLDERS,
    "GetBackup": HOLDERS,
    "CreateBackup": {"login", "full", "databases"},
    "DeleteBackup": {"login", "full", "databases"},
    "RestoreBackup": {"login", "full", "databases"},
    "ListFunctions": HOLDERS,
    "GetFunction": HOLDERS,
    "CreateFunction": {"login", "full", "functions"},
    "UpdateFunction": {"login", "full", "functions"},
    "DeleteFunction": {"login", "full", "functions"},
    "ListFunctionVersions": HOLDERS,
    "RollbackFunction": {"login", "full", "functions"},
    "InvokeFunction": {"login", "full", "functions"},
    "ListFunctionLogs": HOLDERS,
    "ListProxies": HOLDERS,
    "GetProxy": HOLDERS,
    "CreateProxy": {"login", "full", "proxies"},
    "UpdateProxy": {"login", "full", "proxies"},
    "DeleteProxy": {"login", "full", "proxies"},
    "RotateProxyPassword": {"login", "full", "proxies"},
    "GetProxyUsage": HOLDERS,
}
# Requests that change nothing: what they name does not exist, or they only validate.
REQUESTS: dict[str, dict[str, Any]] = {
    "CreateDatabase": {"database": {"name": "a", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}},
    "UpdateDatabase": {"database": {"deletion_protection": True}},
    "RestoreBackup": {"database": {"name": "a"}},
    "CreateFunction": {"function": {"name": "a", "runtime": "python3", "source": "x"}},
    "UpdateFunction": {"function": {"auth": "token"}},
    "CreateProxy": {"proxy": {"name": "a"}},
    "UpdateProxy": {"proxy": {"allowed_ips": []}},
    "CreateToken": {"token": {"name": "a"}},
    "UpdateToken": {"token": {"name": "a"}},
    "ChangePassword": {"password": {"current_password": PASSWORD, "new_password": f"{PASSWORD}, but another"}},
    "CreateSession": {"session": {"email": "", "password": ""}},
}
CONTRACT = list(rpcs().values())
PAGE = (Path(__file__).parents[2] / "docs" / "permissions.md").read_text()


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the page's table: what an RPC needs, and which of the columns it is ticked in."""

    route: str
    needs: str
    ticked: set[str]


def read_page() -> dict[str, Row]:
    """Return the table of docs/permissions.md by the RPC's name."""
    head, _, *lines = (
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if line.startswith("|")
    )
    return {
        cells[1]: Row(cells[0], cells[2], {name for name, cell in zip(head[3:], cells[3:], strict=True) if cell == "✓"})
        for cells in lines
    }


DOCUMENTED = read_page()


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


async def ask(door: Door, rpc: Rpc, headers: dict[str, str]) -> Answer:
    """Call an RPC in a way that changes nothing."""
    asked = {"name": "nowhere", "id": "tk_none", "validate_only": True}
    fields = rpc.request.DESCRIPTOR.fields_by_name
    request = {name: value for name, value in asked.items() if name in fields} | REQUESTS.get(rpc.name, {})
    return await door.call(rpc.name, request, **headers)


@pytest.mark.parametrize("rpc", CONTRACT, ids=lambda rpc: rpc.name)
@pytest.mark.usefixtures("functions", "proxy_port")
async def test_each_rpc_lets_in_whom_it_may(rpc: Rpc, callers: dict[str, dict[str, str]], door: Door) -> None:
    """Each RPC has a servicer, answers whom it is for, as the page says, and refuses all others for their reason."""
    let_in = set()
    for kind in sorted(callers):
        answer = await ask(door, rpc, callers[kind])
        if kind in ALLOWED[rpc.name]:
            expected = {"invalid_field"} if rpc.name == "CreateSession" else {"ok", "not_found"}
            assert answer.code in expected, (kind, answer.sentence)
            let_in.add(kind)
        elif kind in {"nobody", "revoked", "expired"}:
            assert answer.code == "unauthenticated", kind
        elif "login" in ALLOWED[rpc.name] and len(ALLOWED[rpc.name]) == 1:
            assert answer.code == "login_required", kind
        else:
            assert answer.code == "scope_denied", kind
            assert f"'{kind}'" in answer.sentence
    said = DOCUMENTED[rpc.name]
    assert said.ticked == let_in & HOLDERS
    assert (said.needs == "nothing") == ("nobody" in let_in)
    assert (said.needs == "a login") == (let_in == {"login"})


async def test_a_permission_lets_in_where_it_is_needed(stack: Stack, native: Native) -> None:
    """A token with one permission, or all of one resource, is let in by just what needs that; `*:*` is like `full`."""
    customer = await stack.customer()
    needed = {row.needs for row in DOCUMENTED.values() if ":" in row.needs}
    assert f"## All permissions\n{chr(10).join(f'- `{each}`' for each in sorted(needed))}\n" in PAGE

    async def let_in(permission: str) -> set[str]:
        token = (await customer.new_token(permissions=[permission]))["token"]
        headers = {"authorization": f"Bearer {token}"}
        answers = await asyncio.gather(*(ask(native, rpc, headers) for rpc in CONTRACT))
        found = {rpc.name for rpc, answer in zip(CONTRACT, answers, strict=True) if answer.code not in REFUSALS}
        for rpc, answer in zip(CONTRACT, answers, strict=True):
            if answer.code == "scope_denied":
                assert DOCUMENTED[rpc.name].needs in answer.sentence
                assert f"the permissions {permission}" in answer.sentence
        return found

    anybody = {name for name, row in DOCUMENTED.items() if row.needs in {"nothing", "any credential"}}
    for permission in needed:
        assert await let_in(permission) == anybody | {n for n, row in DOCUMENTED.items() if row.needs == permission}
    for resource in {permission.partition(":")[0] for permission in needed}:
        of_it = {name for name, row in DOCUMENTED.items() if row.needs.startswith(f"{resource}:")}
        assert await let_in(f"{resource}:*") == anybody | of_it
    assert await let_in("*:*") == {name for name, row in DOCUMENTED.items() if "full" in row.ticked}


def test_the_page_has_every_operation() -> None:
    """docs/permissions.md has a row for each RPC, with its route."""
    assert {name: row.route for name, row in DOCUMENTED.items()} == {
        rpc.name: f"{rpc.verb} {rpc.route}" for rpc in CONTRACT
    }


def test_each_write_can_be_validated() -> None:
    """Each RPC that may change something takes `validate_only`; only the way back from a provider's login cannot."""
    lacking = {
        rpc.name for rpc in CONTRACT if rpc.writes and "validate_only" not in rpc.request.DESCRIPTOR.fields_by_name
    }
    assert lacking == {"FinishSession"}


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
