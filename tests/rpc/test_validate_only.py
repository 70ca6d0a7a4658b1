"""`validate_only`: the whole way of a write, and nothing of it stays."""

from typing import Any

import pytest
from sqlalchemy import select

from controlplane.rpc.contract import rpcs
from controlplane.tables import METADATA
from tests.doors import Answer, Door
from tests.stack import PASSWORD, Customer, Stack

NEW = {"name": "new", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}


@pytest.fixture(scope="module")
async def owner(stack: Stack) -> Customer:
    """A customer with everything that there is to change: a database, a backup, a token and two logins."""
    customer = await stack.customer(plan="small")
    await customer.create_database("kept")
    made = await customer.call("POST", "/api/portal/databases/kept/backups")
    await customer.until("completed", f"/api/portal/databases/kept/backups/{made.json()['id']}")
    await customer.log_in()
    return customer


async def everything(stack: Stack) -> dict[str, list[Any]]:
    """Return every row of every table, without the uses of credentials, which are written by themselves."""
    found = {}
    for name, table in METADATA.tables.items():
        if name not in {"token_uses", "token_permissions"}:
            columns = [column for column in table.columns if not column.name.startswith("last_used")]
            found[name] = sorted(map(repr, await stack.server.store.fetch(select(*columns))))
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
        "DeleteBackup": {"name": "kept", "id": backup},
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
    assert set(requests) | {"CreateBackup"} == tried
    await stack.server.audit.flush()  # what other tests were refused
    before = await everything(stack)
    for rpc, request in requests.items():
        answer = await validate(door, owner, rpc, request)
        assert answer.code == "ok", (rpc, answer.sentence)
        assert "token" not in answer.result, rpc
        assert not {"idempotent-replayed", "set-cookie"} & set(answer.headers), rpc
        if rpc in {"DeleteDatabase", "DeleteBackup"}:
            assert answer.result["status"] == "deleting"
    assert await everything(stack) == before
    assert (await owner.call("GET", "/api/portal/account")).status_code == 200
    assert (await owner.by_login("GET", "/api/portal/session")).status_code == 200


async def test_a_trial_goes_the_whole_way(owner: Customer, door: Door) -> None:
    """What would be refused in earnest is refused in a trial: rules, conflicts and quotas."""
    expected: list[tuple[str, str, dict[str, Any]]] = [
        ("invalid_field", "CreateDatabase", {"database": {**NEW, "sku": "none"}}),
        ("already_exists", "CreateDatabase", {"database": {**NEW, "name": "kept"}}),
        ("conflict", "CreateDatabase", {"database": {**NEW, "region": "elsewhere"}}),
        ("quota_exceeded", "CreateBackup", {"name": "kept"}),
        ("not_found", "DeleteDatabase", {"name": "nowhere"}),
        ("not_found", "RotateToken", {"id": "tk_none"}),
        ("not_found", "UpdateToken", {"id": "tk_none", "token": {"name": "a"}}),
        ("invalid_field", "UpdateToken", {"id": "tk_none", "token": {"name": ""}}),
        ("not_found", "RevokeSession", {"id": "se_none"}),
        ("unauthenticated", "CreateSession", {"session": {"email": owner.email, "password": "wrong"}}),
        ("invalid_field", "ChangePassword", {"password": {"current_password": "wrong", "new_password": PASSWORD}}),
    ]
    for code, rpc, request in expected:
        assert (await validate(door, owner, rpc, request)).code == code, rpc
