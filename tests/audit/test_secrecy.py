"""What neither a record nor a feed ever says."""

import structlog
from sqlmodel import col, select

from controlplane.audit.model import AuditEntry
from controlplane.events.model import Event
from tests.audit.conftest import record_of
from tests.doors import Native
from tests.stack import PASSWORD, Customer, Stack

TOKENS, SESSION = "/api/portal/tokens", "/api/portal/session"


async def test_no_secret_is_in_a_record_or_a_feed(stack: Stack, customer: Customer, native: Native) -> None:
    """Tokens, cookies and passwords that were made, used, refused or put in the wrong place are in neither."""
    unknown, wrong = "htx_000000000000000000000000000000WRONG2", "a wrong but telling password"
    with structlog.testing.capture_logs() as lines:
        made = await customer.new_token()
        rotated = (await customer.by_login("POST", f"{TOKENS}/{made['id']}/rotate")).json()
        await customer.create_database("secretive")
        connection = (await customer.call("GET", "/api/portal/databases/secretive/connection")).json()
        # Where they do not hold, or do not belong.
        await customer.call("GET", "/api/portal/account", token=made["token"])
        await native.call("DeleteDatabase", {"name": "secretive"}, authorization=f"Bearer {unknown}")
        await customer.by_login("DELETE", f"{TOKENS}/{rotated['token']}")
        await customer.by_login("DELETE", f"{TOKENS}/of {made['token']}")
        await native.call("DeleteToken", {"id": f"{'x' * 120}{made['token']}"}, cookie=customer.cookie)
        await customer.call("DELETE", f"/api/portal/databases/{customer.token}")
        await stack.rest.post(SESSION, json={"email": customer.email, "password": wrong})
        passwords = {"current_password": PASSWORD, "new_password": "another telling password"}
        changed = await customer.by_login("PUT", "/api/portal/account/password", json=passwords)
        assert changed.status_code == 200, changed.text
        stack.rest.cookies.clear()
        entries = await record_of(customer)
    events = (await customer.call("GET", "/api/portal/events")).json()
    assert len(entries) > 8
    assert {"token.rotate", "database.ready", "password.change"} <= {event["type"] for event in events}
    rows = await stack.server.store.fetch(select(AuditEntry))
    rows = [*rows, *await stack.server.store.fetch(select(Event).where(col(Event.account_id) == customer.account_id))]
    told = f"{entries} {events} {lines} {rows}"
    assert f"{rotated['token'][:8]}…" in told
    secrets = {
        "password": PASSWORD,
        "new password": passwords["new_password"],
        "wrong password": wrong,
        "token": customer.token,
        "first secret": made["token"],
        "second secret": rotated["token"],
        "unknown token": unknown,
        "cookie": customer.cookie.partition("=")[2],
        "new cookie": changed.headers["set-cookie"].partition(";")[0].partition("=")[2],
        "database password": connection["password"],
    }
    for name, secret in secrets.items():
        assert len(secret) > 10, name
        assert secret not in told, name
        assert secret[4:30] not in told, name
