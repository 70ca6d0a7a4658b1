"""`validate_only`: the whole way of a write, and nothing of it stays."""

from typing import Any

import pytest
from sqlalchemy import select

from controlplane.rpc.contract import rpcs
from controlplane.tables import METADATA
from tests.doors import Answer, Door
from tests.stack import Customer, Stack

NEW = {"name": "new", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}


@pytest.fixture(scope="module")
async def owner(stack: Stack) -> Customer:
    """A customer with everything that there is to change: a database, a backup and tokens up to the quota."""
    customer = await stack.customer(plan="small")
    await customer.create_database("kept")
    made = await customer.call("POST", "/api/portal/databases/kept/backups")
    await customer.until("completed", f"/api/portal/databases/kept/backups/{made.json()['id']}")
    return customer


async def everything(stack: Stack) -> dict[str, list[Any]]:
    """Return every row of every table."""
    found = {}
    for name, table in METADATA.tables.items():
        found[name] = sorted(map(repr, await stack.server.store.fetch(select(table))))
    return found


async def validate(door: Door, owner: Customer, rpc: str, request: dict[str, Any]) -> Answer:
    """Send a write that only validates."""
    login = {"cookie": owner.cookie, "sec_fetch_site": "same-origin"}
    return await door.call(rpc, {**request, "validate_only": True}, idempotency_key="validated", **login)


async def test_each_write_can_be_tried(stack: Stack, owner: Customer, door: Door) -> None:
    """Each write that can be validated answers as if it were done; no row changes and no secret comes."""
    token = (await owner.by_login("GET", "/api/portal/tokens")).json()[0]["id"]
    backup = (await owner.call("GET", "/api/portal/databases/kept/backups")).json()[0]["id"]
    requests: dict[str, dict[str, Any]] = {
        "CreateDatabase": {"database": NEW},
        "UpdateDatabase": {"name": "kept", "database": {"sku": "db-s-1vcpu-2gb", "tags": {"a": "b"}}},
        "DeleteDatabase": {"name": "kept"},
        "DeleteBackup": {"name": "kept", "id": backup},
        "CreateToken": {"token": {"name": "tried"}},
        "RotateToken": {"id": token},
        "DeleteToken": {"id": token},
    }
    tried = {rpc.name for rpc in rpcs().values() if "validate_only" in rpc.request.DESCRIPTOR.fields_by_name}
    assert set(requests) | {"CreateBackup"} == tried
    before = await everything(stack)
    for rpc, request in requests.items():
        answer = await validate(door, owner, rpc, request)
        assert answer.code == "ok", (rpc, answer.sentence)
        assert "token" not in answer.result, rpc
        assert "idempotent-replayed" not in answer.headers
        if rpc in {"DeleteDatabase", "DeleteBackup"}:
            assert answer.result["status"] == "deleting"
    assert await everything(stack) == before
    assert (await owner.call("GET", "/api/portal/account")).status_code == 200


async def test_a_trial_goes_the_whole_way(owner: Customer, door: Door) -> None:
    """What would be refused in earnest is refused in a trial: rules, conflicts and quotas."""
    expected: list[tuple[str, str, dict[str, Any]]] = [
        ("invalid_field", "CreateDatabase", {"database": {**NEW, "sku": "none"}}),
        ("already_exists", "CreateDatabase", {"database": {**NEW, "name": "kept"}}),
        ("conflict", "CreateDatabase", {"database": {**NEW, "region": "elsewhere"}}),
        ("quota_exceeded", "CreateBackup", {"name": "kept"}),
        ("not_found", "DeleteDatabase", {"name": "nowhere"}),
        ("not_found", "RotateToken", {"id": "tk_none"}),
    ]
    for code, rpc, request in expected:
        assert (await validate(door, owner, rpc, request)).code == code, rpc
