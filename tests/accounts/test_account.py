"""What an account is told about itself."""

import re
from datetime import UTC, datetime

import pytest

from tests.doors import Door, Rest
from tests.stack import Stack

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


@pytest.mark.parametrize("path", ["/api/v1/account/me/", "/api/v1/account/me"])
async def test_me_is_as_documented(stack: Stack, path: str) -> None:
    """The account and the token of the request, with exactly the documented fields, with and without a last slash."""
    profile = {"first_name": "John", "last_name": "Doe", "company_name": "Acme Inc."}
    customer = await stack.customer(**profile)
    token = await customer.new_token(name="Production Deploy Key", scope="databases")
    documented = {"content-type": "application/json"}
    answer = await customer.call("GET", path, token=token["token"], headers=documented)
    assert answer.status_code == 200
    me = answer.json()
    today = datetime.now(UTC).date().isoformat()
    assert me["account"] == {"email": customer.email, **profile, "created_at": today}
    shown = me["token"]
    assert TIME.fullmatch(shown.pop("created_at"))
    permissions = shown.pop("permissions")
    last_used_at = shown.pop("last_used_at")
    assert last_used_at is None or TIME.fullmatch(last_used_at)
    assert shown == {"name": "Production Deploy Key", "expires_at": None, "is_expired": False}
    assert {"databases:*", "functions:list"} <= set(permissions)
    assert "functions:*" not in permissions


async def test_what_is_not_set_is_null(stack: Stack) -> None:
    """Names that the account lacks are null and not absent; a token's end is a time."""
    customer = await stack.customer()
    token = await customer.new_token(expires_at="2050-01-02T03:04:05Z", scope="read")
    me = (await customer.call("GET", "/api/v1/account/me/", token=token["token"])).json()
    unset = {name: me["account"][name] for name in ("first_name", "last_name", "company_name")}
    assert unset == {"first_name": None, "last_name": None, "company_name": None}
    assert me["token"]["expires_at"] == "2050-01-02T03:04:05Z"
    by_login = (await customer.by_login("GET", "/api/v1/account/me/")).json()
    assert (by_login["account"], "token" in by_login) == (me["account"], False)


async def test_the_account_shows_its_quotas(stack: Stack, door: Door) -> None:
    """Of each thing that the plan limits, the account shows the limit and what is used of it."""
    customer = await stack.customer(plan="small", first_name="Ann")
    body = {"name": "one", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}
    assert (await customer.call("POST", "/api/portal/databases", json=body)).status_code == 201
    account = (await door.call("GetAccount", None, authorization=f"Bearer {customer.token}")).result
    assert account["quotas"] == {
        "databases": {"limit": 3, "used": 1},
        "backups": {"limit": 1, "used": 0},
        "functions": {"limit": 1, "used": 0},
        "proxies": {"limit": 1, "used": 0},
        "tokens": {"limit": 3, "used": 1},
    }
    assert (account["id"], account["email"]) == (customer.account_id, customer.email)
    assert (account["plan"], account["first_name"], "last_name" in account) == ("small", "Ann", False)


async def test_the_catalogue_is_shown(stack: Stack) -> None:
    """Plans, sizes and regions are those of the catalogue's file; a drained or absent cluster sells nothing."""
    customer, rest = await stack.customer(), Rest(stack.rest)
    asked = {"authorization": f"Bearer {customer.token}"}
    plans = (await rest.call("ListPlans", None, **asked)).result
    assert {plan["name"]: plan["quotas"]["databases"] for plan in plans} == {"roomy": 1000, "small": 3}
    skus = (await rest.call("ListSkus", None, **asked)).result
    assert [sku["name"] for sku in skus] == ["db-s-1vcpu-1gb", "db-s-1vcpu-2gb", "ch-s-1vcpu-2gb"]
    assert (skus[0]["memory_mb"], skus[0]["connections"]) == (1024, 3)
    regions = (await rest.call("ListRegions", None, **asked)).result
    assert {region["name"]: region["engines"] for region in regions} == {"local": ["postgresql"], "elsewhere": []}
