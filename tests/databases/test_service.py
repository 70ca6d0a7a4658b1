"""Databases over REST, from the order to the drop."""

from tests.stack import Customer


async def test_the_documented_path(customer: Customer) -> None:
    """The documents' calls create a database, show it, back it up and delete it."""
    assert (await customer.call("GET", "/api/portal/databases")).json() == []
    body = {"name": "analytics", "engine": "postgresql", "sku": "db-s-1vcpu-2gb"}
    made = await customer.call("POST", "/api/portal/databases", json=body)
    assert made.status_code == 201, made.text
    assert made.json()["status"] == "provisioning"
    await customer.until("ready", "/api/portal/databases/analytics")
    listed = (await customer.call("GET", "/api/portal/databases")).json()
    assert [database["name"] for database in listed] == ["analytics"]
    backup = await customer.call("POST", "/api/portal/databases/analytics/backups")
    assert backup.status_code == 201, backup.text
    done = await customer.until("completed", f"/api/portal/databases/analytics/backups/{backup.json()['id']}")
    assert (await customer.call("GET", "/api/portal/databases/analytics/backups")).json() == [done]
    deleted = await customer.call("DELETE", "/api/portal/databases/analytics")
    assert (deleted.status_code, deleted.json()["status"]) == (200, "deleting")
    await customer.until("gone", "/api/portal/databases/analytics")
    assert (await customer.call("GET", "/api/portal/functions")).json() == []
    assert (await customer.call("GET", "/api/portal/proxies")).json() == []
    assert (await customer.call("GET", "/api/openapi")).json()["openapi"] == "3.1.0"
