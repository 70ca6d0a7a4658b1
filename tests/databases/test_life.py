"""What a database lives through over REST: new passwords, stops and starts, failures and another try."""

from typing import Any

import asyncpg
import pytest

from tests.backups.rest import DATABASES, back_up, connection_of, delete, events_of, file_of, order_restore
from tests.clock import MovableClock
from tests.databases.test_provisioning import set_cluster
from tests.stack import Customer, Stack

PATH = f"{DATABASES}/analytics"
CLOSED = (asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError, asyncpg.InterfaceError, OSError)


async def order(customer: Customer, verb: str, *, name: str = "analytics", **headers: str) -> dict[str, Any]:
    """Order something of a database; return what the answer shows."""
    answer = await customer.call("POST", f"{DATABASES}/{name}/{verb}", headers=headers)
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def run(uri: str, statement: str) -> Any:
    """Run a statement as the tenant; return the first value of its answer."""
    tenant = await asyncpg.connect(uri)
    try:
        return await tenant.fetchval(statement)
    finally:
        await tenant.close()


async def test_a_new_password_replaces_the_old_one(customer: Customer) -> None:
    """The new password opens the same data; the old one opens nothing any more, and its session has ended."""
    await customer.create_database("analytics")
    old = await connection_of(customer, "analytics")
    session = await asyncpg.connect(old["uri"])
    await session.execute("CREATE TABLE kept AS SELECT 7 AS n")
    answer = await customer.call("POST", f"{PATH}/password")
    new = answer.json()
    assert (answer.status_code, answer.headers["etag"].count(".2")) == (200, 1)
    assert {name for name in new if new[name] != old[name]} == {"password", "uri"}
    assert new["password"] in new["uri"]
    await customer.until("ready", PATH)
    with pytest.raises(CLOSED):
        await session.fetchval("SELECT 1")
    session.terminate()
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(old["uri"])
    assert await run(new["uri"], "SELECT n FROM kept") == 7
    assert await connection_of(customer, "analytics") == new


async def test_a_new_password_is_given_once(customer: Customer) -> None:
    """The same key gets the same password again, and nothing is done twice; without it there is another one."""
    await customer.create_database("analytics")
    first, again = [await order(customer, "password", **{"idempotency-key": "once"}) for _ in range(2)]
    assert again == first
    assert (await customer.until("ready", PATH))["generation"] == 2
    other = await order(customer, "password")
    assert other["password"] != first["password"]
    assert (await customer.until("ready", PATH))["generation"] == 3
    assert await run(other["uri"], "SELECT 1") == 1


async def test_a_stale_order_is_refused(customer: Customer) -> None:
    """Each of these orders heeds `If-Match`; the connection shows the version to send."""
    await customer.create_database("analytics")
    shown = await customer.call("GET", f"{PATH}/connection")
    for verb in ("password", "stop", "start", "retry"):
        refused = await customer.call("POST", f"{PATH}/{verb}", headers={"if-match": '"db_old.1"'})
        assert (refused.status_code, refused.json()["code"]) == (412, "stale")
    assert (await customer.call("GET", PATH)).headers["etag"] == shown.headers["etag"]
    assert (await order(customer, "stop", **{"if-match": shown.headers["etag"]}))["status"] == "stopping"


async def test_a_stopped_database_lets_nobody_in(customer: Customer) -> None:
    """A stop ends all sessions and refuses new ones until the start; the data stays, and so does the password."""
    await customer.create_database("analytics")
    connection = await connection_of(customer, "analytics")
    session = await asyncpg.connect(connection["uri"])
    await session.execute("CREATE TABLE kept AS SELECT 7 AS n")
    assert (await order(customer, "stop"))["status"] == "stopping"
    stopped = await customer.until("stopped", PATH)
    assert (stopped["observed_generation"], "progress" in stopped) == (2, False)
    with pytest.raises(CLOSED):
        await session.fetchval("SELECT 1")
    session.terminate()
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError, match="not permitted to log in"):
        await asyncpg.connect(connection["uri"])
    assert await connection_of(customer, "analytics") == connection
    assert (await order(customer, "start"))["status"] == "starting"
    await customer.until("ready", PATH)
    assert await run(connection["uri"], "SELECT n FROM kept") == 7


async def test_what_is_stopped_stays_so(customer: Customer) -> None:
    """A stopped database can be backed up, resized and given a new password, and lets nobody in all the same."""
    await customer.create_database("analytics", sku="db-s-1vcpu-1gb")
    await order(customer, "stop")
    await customer.until("stopped", PATH)
    assert (await back_up(customer, "analytics"))["status"] == "completed"
    changed = await customer.call("PATCH", PATH, json={"sku": "db-s-1vcpu-2gb"})
    assert (changed.status_code, changed.json()["status"]) == (200, "updating")
    await customer.until("stopped", PATH)
    uri = (await order(customer, "password"))["uri"]
    await customer.until("stopped", PATH)
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError, match="not permitted to log in"):
        await asyncpg.connect(uri)
    await order(customer, "start")
    await customer.until("ready", PATH)
    limit = "SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user"
    assert await run(uri, limit) == 5


async def test_to_stop_or_start_twice_changes_nothing(customer: Customer) -> None:
    """A second stop or start answers with what is already so; one that comes while the other is under way wins."""
    made = await customer.create_database("analytics")
    assert await order(customer, "start") == (await customer.call("GET", PATH)).json()
    assert [(await order(customer, "stop"))["generation"] for _ in range(2)] == [2, 2]
    stopped = await customer.until("stopped", PATH)
    assert (await order(customer, "stop"))["status"] == "stopped"
    assert [(await order(customer, "start"))["generation"] for _ in range(2)] == [3, 3]
    assert (await order(customer, "stop"))["status"] == "stopping"
    assert (await order(customer, "start"))["status"] == "starting"
    ready = await customer.until("ready", PATH)
    assert (ready["generation"], ready["observed_generation"]) == (5, 5)
    assert made["created_at"] == stopped["created_at"] == ready["created_at"]
    assert await run((await connection_of(customer, "analytics"))["uri"], "SELECT 1") == 1


async def test_what_has_failed_says_why_and_can_be_tried_again(stack: Stack, customer: Customer) -> None:
    """A failed database shows the reason and what to do, and once the reason is gone, another try makes it."""
    await customer.create_database("source")
    connection = await connection_of(customer, "source")
    assert await run(connection["uri"], "CREATE TABLE kept AS SELECT 7 AS n") is None
    backup = await back_up(customer, "source")
    manifest = file_of(stack, connection["database"], backup, ".json")
    lost = manifest.rename(manifest.with_suffix(".lost"))
    await order_restore(customer, backup, "analytics")
    failed = await customer.until("failed", PATH)
    reason = "The backup cannot be restored: The backup's file is not there any more."
    assert failed["progress"] == {"waiting_on": "", "attempts": 0, "last_error": reason}
    (event,) = await events_of(customer, "database.failed")
    assert (event["resource_id"], event["detail"]) == (failed["id"], reason)
    for method, verb in (("POST", "password"), ("POST", "stop"), ("POST", "start"), ("GET", "connection")):
        refused = await customer.call(method, f"{PATH}/{verb}")
        assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
        assert refused.json()["error"] == (
            "The database 'analytics' is failed: it takes no connections. Try again with POST …/retry, or delete it."
        )
    assert (await customer.call("POST", f"{PATH}/backups")).status_code == 409
    lost.rename(manifest)
    tried = await order(customer, "retry")
    assert (tried["status"], tried["progress"].get("last_error")) == ("restoring", None)
    await customer.until("ready", PATH)
    assert await run((await connection_of(customer, "analytics"))["uri"], "SELECT n FROM kept") == 7
    refused = await customer.call("POST", f"{PATH}/retry")
    assert refused.status_code == 409
    assert refused.json()["error"] == "The database 'analytics' is ready: there is nothing to try again."


async def test_a_change_that_failed_can_be_tried_again(timed: tuple[Stack, MovableClock]) -> None:
    """A change whose cluster is gone has failed after its hour; once the cluster is back, another try makes it."""
    stack, clock = timed
    customer = await stack.customer()
    made = await customer.create_database("analytics")
    uri = (await connection_of(customer, "analytics"))["uri"]
    await set_cluster(stack, made["id"], "vanished")
    await customer.call("PATCH", PATH, json={"sku": "db-s-1vcpu-1gb"})
    clock.let_pass(minutes=59)
    assert (await customer.call("GET", PATH)).json()["status"] == "updating"
    clock.let_pass(minutes=1, seconds=1)
    failed = await customer.until("failed", PATH)
    assert failed["progress"]["last_error"] == "The provider has taken this cluster out of service."
    assert (failed["generation"], failed["observed_generation"]) == (2, 1)
    await set_cluster(stack, made["id"], "local-postgresql")
    assert (await order(customer, "retry"))["status"] == "updating"
    ready = await customer.until("ready", PATH)
    assert (ready["generation"], ready["observed_generation"]) == (3, 3)
    assert await run(uri, "SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user") == 3
    await delete(customer, "analytics")
