"""Looks at what was made: what was changed on the cluster behind our back is put right, and what is lost is told."""

from datetime import datetime
from typing import Any

import asyncpg
import pytest

from controlplane.local.postgres import EmbeddedPostgres
from tests.backups.rest import DATABASES, back_up, connection_of, delete, events_of, names_on, order_restore
from tests.clock import MovableClock
from tests.databases.test_life import CLOSED, order, run
from tests.stack import Customer, Stack, eventually

PATH = f"{DATABASES}/analytics"
LOST = "The database is not on its cluster any more. Restore a backup of it into a new one, and delete it."


async def look(customer: Customer, clock: MovableClock) -> dict[str, Any]:
    """Let so much time go by that the database is looked at, and wait for it; return what is shown then."""
    before = (await customer.call("GET", PATH)).json()["observed_at"]
    clock.let_pass(seconds=customer.stack.settings.look_every + 1)
    customer.stack.server.reconciler.wake()

    async def looked_at() -> dict[str, Any] | None:
        shown: dict[str, Any] = (await customer.call("GET", PATH)).json()
        return shown if shown["status"] == "failed" or shown["observed_at"] > before else None

    shown = await eventually(looked_at)
    assert shown is not None
    return shown


async def meddle(postgres: EmbeddedPostgres, *statements: str, database: str = "postgres") -> None:
    """Run statements as the cluster's own administrator."""
    admin = await asyncpg.connect(postgres.admin_dsn, database=database)
    for statement in statements:
        await admin.execute(statement)
    await admin.close()


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("ALTER ROLE {0} CONNECTION LIMIT 100", "the connection limit"),
        ("ALTER ROLE {0} PASSWORD 'another'", "the password"),
        ("ALTER ROLE {0} NOLOGIN", "whether it can be logged in to"),
        ("ALTER ROLE {0} CREATEROLE CREATEDB", "the user's rights"),
        ("ALTER ROLE {0} VALID UNTIL '2020-01-01'", "the password's end"),
        ("ALTER DATABASE {0} ALLOW_CONNECTIONS false", "who may connect"),
        ("GRANT CONNECT ON DATABASE {0} TO PUBLIC", "who may connect"),
        ("ALTER DATABASE {0} OWNER TO CURRENT_USER", "the owner"),
        ("REASSIGN OWNED BY {0} TO CURRENT_USER; DROP OWNED BY {0}; DROP ROLE {0}", "the user, the owner"),
    ],
)
async def test_what_was_changed_is_put_right(
    timed: tuple[Stack, MovableClock], postgres: EmbeddedPostgres, statement: str, what: str
) -> None:
    """The next look puts it back to what was ordered, and one event says what it was; the customer notices no more."""
    stack, clock = timed
    customer = await stack.customer()
    await customer.create_database("analytics")
    connection = await connection_of(customer, "analytics")
    before = await look(customer, clock)
    await meddle(postgres, statement.format(connection["database"]))
    shown = await look(customer, clock)
    assert {name: shown[name] for name in ("status", "generation", "observed_generation", "updated_at")} == {
        name: before[name] for name in ("status", "generation", "observed_generation", "updated_at")
    }
    await look(customer, clock)
    (event,) = await events_of(customer, "database.repaired")
    assert (event["resource_id"], event["resource_name"]) == (shown["id"], "analytics")
    assert (event["status"], event["detail"]) == ("ready", f"Put right: {what}.")
    state = (
        "SELECT (rolconnlimit, rolcanlogin, rolcreaterole, rolcreatedb, datallowconn,"
        " pg_get_userbyid(datdba) = current_user)::text"
        " FROM pg_roles, pg_database WHERE rolname = current_user AND datname = current_database()"
    )
    assert await run(connection["uri"], state) == "(5,t,f,f,t,t)"
    await delete(customer, "analytics")


async def test_a_foreign_password_lets_nobody_stay(
    timed: tuple[Stack, MovableClock], postgres: EmbeddedPostgres
) -> None:
    """Whoever came in with a password that is not ours is sent away when ours is put back."""
    stack, clock = timed
    customer = await stack.customer()
    await customer.create_database("analytics")
    connection = await connection_of(customer, "analytics")
    await meddle(postgres, f"ALTER ROLE {connection['database']} PASSWORD 'another'")
    stranger = await asyncpg.connect(connection["uri"], password="another")
    await look(customer, clock)
    with pytest.raises(CLOSED):
        await stranger.fetchval("SELECT 1")
    stranger.terminate()
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(connection["uri"], password="another")
    assert await run(connection["uri"], "SELECT 1") == 1
    await delete(customer, "analytics")


async def test_what_is_stopped_is_kept_shut(timed: tuple[Stack, MovableClock], postgres: EmbeddedPostgres) -> None:
    """A stopped database that somebody has opened is shut again, and whoever is inside is sent away."""
    stack, clock = timed
    customer = await stack.customer()
    await customer.create_database("analytics")
    connection = await connection_of(customer, "analytics")
    await order(customer, "stop")
    await customer.until("stopped", PATH)
    await meddle(postgres, f"ALTER ROLE {connection['database']} LOGIN")
    guest = await asyncpg.connect(connection["uri"])
    assert (await look(customer, clock))["status"] == "stopped"
    with pytest.raises(CLOSED):
        await guest.fetchval("SELECT 1")
    guest.terminate()
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        await asyncpg.connect(connection["uri"])
    (event,) = await events_of(customer, "database.repaired")
    assert event["detail"] == "Put right: whether it can be logged in to."
    await delete(customer, "analytics")


async def test_a_lost_database_is_not_replaced_by_an_empty_one(
    timed: tuple[Stack, MovableClock], postgres: EmbeddedPostgres
) -> None:
    """A database that is gone from its cluster has failed, which says what to do; that works, and a retry does not."""
    stack, clock = timed
    customer = await stack.customer()
    await customer.create_database("analytics")
    connection = await connection_of(customer, "analytics")
    await run(connection["uri"], "CREATE TABLE kept AS SELECT 7 AS n")
    backup = await back_up(customer, "analytics")
    name = connection["database"]
    await meddle(postgres, f'DROP DATABASE "{name}" WITH (FORCE)')
    shown = await look(customer, clock)
    assert (shown["status"], shown["progress"]["last_error"]) == ("failed", LOST)
    (event,) = await events_of(customer, "database.failed")
    assert (event["resource_id"], event["status"], event["detail"]) == (shown["id"], "failed", LOST)
    assert (await customer.call("GET", f"{PATH}/connection")).status_code == 409
    await order(customer, "retry")
    assert (await customer.until("failed", PATH))["progress"]["last_error"] == LOST
    assert await names_on(postgres, name) == [name]  # its user
    await order_restore(customer, backup, "instead")
    await customer.until("ready", f"{DATABASES}/instead")
    assert await run((await connection_of(customer, "instead"))["uri"], "SELECT n FROM kept") == 7
    for each in ("analytics", "instead"):
        await delete(customer, each)
    assert await names_on(postgres, name) == []


async def test_size_and_sessions_are_shown_and_follow(timed: tuple[Stack, MovableClock]) -> None:
    """A few seconds after the order its size and sessions are there; each look brings them up to date, and no more."""
    stack, clock = timed
    customer = await stack.customer()
    made = await customer.create_database("analytics")
    assert not {"size_bytes", "connections"} & made.keys()
    etag = (await customer.call("GET", PATH)).headers["etag"]
    uri = (await connection_of(customer, "analytics"))["uri"]
    clock.let_pass(seconds=6)

    async def measured() -> dict[str, Any] | None:
        shown: dict[str, Any] = (await customer.call("GET", PATH)).json()
        return shown if "size_bytes" in shown else None

    first = await eventually(measured)
    assert first is not None
    assert (first["connections"], first["size_bytes"] > 1_000_000) == (0, True)
    sessions = [await asyncpg.connect(uri) for _ in range(2)]
    await sessions[0].execute("CREATE TABLE big AS SELECT sha512(n::text::bytea) FROM generate_series(1, 20000) n")
    second = await look(customer, clock)
    assert (second["connections"], second["size_bytes"] > first["size_bytes"] + 1_000_000) == (2, True)
    seconds = (datetime.fromisoformat(second["observed_at"]) - datetime.fromisoformat(first["observed_at"])).seconds
    assert seconds >= stack.settings.look_every
    for session in sessions:
        await session.close()
    assert (await look(customer, clock))["connections"] == 0
    shown = await customer.call("GET", PATH)
    assert (shown.headers["etag"], shown.json()["updated_at"]) == (etag, made["updated_at"])
    assert await events_of(customer, "database.repaired") == []
    await delete(customer, "analytics")
