"""`validate_only`: the whole way of a write, and nothing of it stays."""

from typing import Any

import pytest
from sqlalchemy import select

from controlplane.rpc.contract import rpcs
from controlplane.tables import METADATA
from tests.backups.rest import DATABASES, back_up, connection_of, delete, file_of, order_restore
from tests.doors import Answer, Door
from tests.stack import PASSWORD, Customer, Stack

FUNCTION = {"runtime": "python3", "source": "def handler(event, context):\n    return event\n"}
NEW = {"name": "new", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}
# When a credential was used or a host was heard of, and what a look at a database finds, a few seconds after its order.
WRITTEN_BY_ITSELF = {
    *("last_used_at", "last_used_ip", "last_seen_at"),
    *("lease_token", "lease_until", "next_attempt_at", "observed_at", "size_bytes", "connections"),
}


pytestmark = pytest.mark.usefixtures("functions", "proxy_port")


@pytest.fixture(scope="module")
async def owner(stack: Stack) -> Customer:
    """A customer with everything that there is to change.

    A function, a proxy, a database, a backup, one of each that was stopped, deleted or has failed, a token and two
    logins.
    """
    customer = await stack.customer()
    await customer.create("/api/portal/functions", name="kept", **FUNCTION)
    await customer.call("PATCH", "/api/portal/functions/kept", json={"timeout_ms": 1000})
    await customer.until("ready", "/api/portal/functions/kept")
    await customer.create("/api/portal/proxies", name="kept")
    for name in ("deleted", "stopped", "kept"):
        await customer.create_database(name)
    await back_up(customer, "deleted")
    await delete(customer, "deleted")
    await customer.call("POST", f"{DATABASES}/stopped/stop")
    await customer.until("stopped", f"{DATABASES}/stopped")
    lost = await back_up(customer, "kept")
    object_name = (await connection_of(customer, "kept"))["database"]
    file_of(stack, object_name, lost, ".json").unlink()
    await order_restore(customer, lost, "failed")
    await customer.until("failed", f"{DATABASES}/failed")
    await customer.log_in()
    return customer


@pytest.fixture(scope="module")
async def poor(stack: Stack) -> Customer:
    """A customer whose plan allows no more backups."""
    customer = await stack.customer(plan="small")
    await customer.create_database("kept")
    await back_up(customer, "kept")
    return customer


async def everything(owner: Customer) -> dict[str, list[Any]]:
    """Return every row of the account and of no account, without what is written by itself."""
    found = {}
    for name, table in METADATA.tables.items():
        if name not in {"token_uses", "token_permissions"}:
            columns = [column for column in table.columns if column.name not in WRITTEN_BY_ITSELF]
            rows = select(*columns)
            if "account_id" in table.columns:
                rows = rows.where(table.columns["account_id"] == owner.account_id)
            found[name] = sorted(map(repr, await owner.stack.server.store.fetch(rows)))
    return found


async def validate(door: Door, owner: Customer, rpc: str, request: dict[str, Any]) -> Answer:
    """Send a write that only validates."""
    login = {"cookie": owner.cookie, "sec_fetch_site": "same-origin"}
    return await door.call(rpc, {**request, "validate_only": True}, idempotency_key="validated", **login)


async def test_each_write_can_be_tried(stack: Stack, owner: Customer, door: Door) -> None:
    """Each write that can be validated answers as if it were done; no row changes and no secret comes."""
    token = (await owner.by_login("GET", "/api/portal/tokens")).json()[0]["id"]
    backup = (await owner.call("GET", "/api/portal/databases/kept/backups")).json()[0]["id"]
    logins = (await owner.by_login("GET", "/api/portal/sessions")).json()
    other = next(login["id"] for login in logins if not login["current"])
    requests: dict[str, dict[str, Any]] = {
        "CreateDatabase": {"database": NEW},
        "UpdateDatabase": {"name": "kept", "database": {"sku": "db-s-1vcpu-2gb", "tags": {"a": "b"}}},
        "DeleteDatabase": {"name": "kept"},
        "RotateDatabasePassword": {"name": "kept"},
        "StopDatabase": {"name": "kept"},
        "StartDatabase": {"name": "stopped"},
        "RetryDatabase": {"name": "failed"},
        "UndeleteDatabase": {"name": "deleted"},
        "CreateBackup": {"name": "kept"},
        "DeleteBackup": {"name": "kept", "id": backup},
        "RestoreBackup": {"name": "kept", "id": backup, "database": {"name": "copy"}},
        "CreateFunction": {"function": {"name": "new", **FUNCTION}},
        "UpdateFunction": {"name": "kept", "function": {"timeout_ms": 2000, "env": {"A": "b"}}},
        "DeleteFunction": {"name": "kept"},
        "RollbackFunction": {"name": "kept"},
        "CreateProxy": {"proxy": {"name": "new"}},
        "UpdateProxy": {"name": "kept", "proxy": {"allowed_ips": ["203.0.113.7"]}},
        "DeleteProxy": {"name": "kept"},
        "RotateProxyPassword": {"name": "kept"},
        "CreateToken": {"token": {"name": "tried"}},
        "UpdateToken": {"id": token, "token": {"name": "tried", "allowed_ips": ["203.0.113.7"]}},
        "RotateToken": {"id": token, "rotation": {"grace_seconds": 60}},
        "DeleteToken": {"id": token},
        "CreateSession": {"session": {"email": owner.email, "password": PASSWORD}},
        "DeleteSession": {},
        "RevokeSession": {"id": other},
        "ChangePassword": {
            "password": {"current_password": PASSWORD, "new_password": "another horse, battery, staple"}
        },
    }
    tried = {rpc.name for rpc in rpcs().values() if "validate_only" in rpc.request.DESCRIPTOR.fields_by_name}
    assert set(requests) == tried
    await stack.server.audit.flush()  # what other tests were refused
    before = await everything(owner)
    for rpc, request in requests.items():
        answer = await validate(door, owner, rpc, request)
        assert answer.code == "ok", (rpc, answer.sentence)
        assert not answer.result.get("token"), rpc
        assert not answer.result.get("password"), rpc
        assert not {"idempotent-replayed", "set-cookie"} & set(answer.headers), rpc
        if rpc in {"DeleteDatabase", "DeleteBackup"}:
            assert answer.result["status"] == "deleting"
    assert await everything(owner) == before
    assert (await owner.call("GET", "/api/portal/account")).status_code == 200
    assert (await owner.by_login("GET", "/api/portal/session")).status_code == 200


async def test_a_trial_goes_the_whole_way(owner: Customer, poor: Customer, door: Door) -> None:
    """What would be refused in earnest is refused in a trial: rules, conflicts and quotas."""
    assert (await validate(door, poor, "CreateBackup", {"name": "kept"})).code == "quota_exceeded"
    backup = (await owner.call("GET", "/api/portal/databases/kept/backups")).json()[0]["id"]
    expected: list[tuple[str, str, dict[str, Any]]] = [
        ("invalid_field", "CreateDatabase", {"database": {**NEW, "sku": "none"}}),
        ("already_exists", "CreateDatabase", {"database": {**NEW, "name": "kept"}}),
        ("conflict", "CreateDatabase", {"database": {**NEW, "region": "elsewhere"}}),
        ("already_exists", "RestoreBackup", {"name": "kept", "id": backup, "database": {"name": "kept"}}),
        ("conflict", "StopDatabase", {"name": "failed"}),
        ("conflict", "RotateDatabasePassword", {"name": "failed"}),
        ("conflict", "RetryDatabase", {"name": "kept"}),
        ("not_found", "UndeleteDatabase", {"name": "kept"}),
        ("not_found", "DeleteDatabase", {"name": "nowhere"}),
        ("already_exists", "CreateFunction", {"function": {"name": "kept", **FUNCTION}}),
        ("conflict", "CreateFunction", {"function": {"name": "new", "region": "elsewhere", **FUNCTION}}),
        ("not_found", "RollbackFunction", {"name": "nowhere"}),
        ("already_exists", "CreateProxy", {"proxy": {"name": "kept"}}),
        ("invalid_field", "UpdateProxy", {"name": "kept", "proxy": {"allowed_ips": ["everywhere"]}}),
        ("not_found", "RotateToken", {"id": "tk_none"}),
        ("not_found", "UpdateToken", {"id": "tk_none", "token": {"name": "a"}}),
        ("invalid_field", "UpdateToken", {"id": "tk_none", "token": {"name": ""}}),
        ("not_found", "RevokeSession", {"id": "se_none"}),
        ("unauthenticated", "CreateSession", {"session": {"email": owner.email, "password": "wrong"}}),
        ("invalid_field", "ChangePassword", {"password": {"current_password": "wrong", "new_password": PASSWORD}}),
    ]
    for code, rpc, request in expected:
        assert (await validate(door, owner, rpc, request)).code == code, rpc
