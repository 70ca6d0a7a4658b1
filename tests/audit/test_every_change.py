"""Every write of the contract: done once, it is one entry in the record and one event in the feed, and never more."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from controlplane.clock import SystemClock
from tests.audit.conftest import record_of
from tests.backups.rest import DATABASES, back_up, connection_of, delete, file_of, order_restore
from tests.doors import RPCS, Answer, Door, Native, Rest
from tests.sessions.issuer import CLIENT_ID, SmallIssuer, running
from tests.stack import PASSWORD, Customer, Stack

WRITES = sorted(name for name, rpc in RPCS.items() if rpc.writes)
OIDC = "/api/portal/session/oidc"
FUNCTION = {"runtime": "python3", "source": "def handler(event, context):\n    return event\n"}


@dataclass(frozen=True)
class Caller:
    """Who sends a write: as the record calls him, and the headers that he brings."""

    actor: str
    credential: str | None
    headers: dict[str, str]


@dataclass(frozen=True)
class Change:
    """A write that succeeds: who sends it, what is sent, its target's name, if any, and id, if no answer shows it."""

    caller: Caller
    request: dict[str, Any]
    name: str | None = None
    target: str | None = None


async def by_token(customer: Customer) -> Caller:
    """Return a caller with a token of his own."""
    made = await customer.new_token()
    return Caller("token", made["id"], {"authorization": f"Bearer {made['token']}"})


async def by_login(customer: Customer) -> Caller:
    """Return a caller with a login of his own."""
    await customer.log_in()
    shown = await customer.by_login("GET", "/api/portal/session")
    return Caller("login", shown.json()["id"], {"cookie": customer.cookie, "sec_fetch_site": "same-origin"})


async def create_database(customer: Customer) -> Change:
    """Order a database."""
    wanted = {"name": "made", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}
    return Change(await by_token(customer), {"database": wanted}, "made")


async def update_database(customer: Customer) -> Change:
    """Label a database."""
    await customer.create_database("made")
    return Change(await by_token(customer), {"name": "made", "database": {"tags": {"a": "b"}}}, "made")


async def delete_database(customer: Customer) -> Change:
    """Delete a database."""
    await customer.create_database("made")
    return Change(await by_token(customer), {"name": "made"}, "made")


async def new_password(customer: Customer) -> Change:
    """Give a database a new password."""
    made = await customer.create_database("made")
    return Change(await by_token(customer), {"name": "made"}, "made", made["id"])


async def stop_database(customer: Customer) -> Change:
    """Stop a database."""
    await customer.create_database("made")
    return Change(await by_token(customer), {"name": "made"}, "made")


async def start_database(customer: Customer) -> Change:
    """Start a database."""
    await customer.create_database("made")
    await customer.call("POST", f"{DATABASES}/made/stop")
    await customer.until("stopped", f"{DATABASES}/made")
    return Change(await by_token(customer), {"name": "made"}, "made")


async def retry_database(customer: Customer) -> Change:
    """Try a database again that was to be made of a backup whose files were lost."""
    await customer.create_database("source")
    backup = await back_up(customer, "source")
    name = (await connection_of(customer, "source"))["database"]
    file_of(customer.stack, name, backup, ".json").unlink()
    await order_restore(customer, backup, "made")
    await customer.until("failed", f"{DATABASES}/made")
    return Change(await by_token(customer), {"name": "made"}, "made")


async def undelete_database(customer: Customer) -> Change:
    """Bring a deleted database back."""
    await customer.create_database("made")
    await back_up(customer, "made")
    await delete(customer, "made")
    return Change(await by_token(customer), {"name": "made"}, "made")


async def restore_backup(customer: Customer) -> Change:
    """Restore a backup."""
    await customer.create_database("source")
    backup = await back_up(customer, "source")
    request = {"name": "source", "id": backup["id"], "database": {"name": "made"}}
    return Change(await by_token(customer), request, "made")


async def create_backup(customer: Customer) -> Change:
    """Back a database up."""
    await customer.create_database("made")
    return Change(await by_token(customer), {"name": "made"}, "made")


async def delete_backup(customer: Customer) -> Change:
    """Delete a backup."""
    await customer.create_database("made")
    backup = await back_up(customer, "made")
    return Change(await by_token(customer), {"name": "made", "id": backup["id"]}, "made")


async def create_function(customer: Customer) -> Change:
    """Order a function."""
    return Change(await by_token(customer), {"function": {"name": "made", **FUNCTION}}, "made")


async def update_function(customer: Customer) -> Change:
    """Let everybody call a function."""
    await customer.create("/api/portal/functions", name="made", **FUNCTION)
    return Change(await by_token(customer), {"name": "made", "function": {"auth": "public"}}, "made")


async def delete_function(customer: Customer) -> Change:
    """Delete a function."""
    await customer.create("/api/portal/functions", name="made", **FUNCTION)
    return Change(await by_token(customer), {"name": "made"}, "made")


async def roll_a_function_back(customer: Customer) -> Change:
    """Go back to the first version of a function."""
    await customer.create("/api/portal/functions", name="made", **FUNCTION)
    await customer.call("PATCH", "/api/portal/functions/made", json={"timeout_ms": 1000})
    await customer.until("ready", "/api/portal/functions/made")
    return Change(await by_token(customer), {"name": "made"}, "made")


async def create_proxy(customer: Customer) -> Change:
    """Order a proxy."""
    return Change(await by_token(customer), {"proxy": {"name": "made"}}, "made")


async def update_proxy(customer: Customer) -> Change:
    """Let another address use a proxy."""
    await customer.create("/api/portal/proxies", name="made")
    return Change(await by_token(customer), {"name": "made", "proxy": {"allowed_ips": ["203.0.113.7"]}}, "made")


async def touch_proxy(customer: Customer) -> Change:
    """Delete a proxy, or give it a new password."""
    await customer.create("/api/portal/proxies", name="made")
    return Change(await by_token(customer), {"name": "made"}, "made")


async def create_token(customer: Customer) -> Change:
    """Make a token."""
    return Change(await by_login(customer), {"token": {"name": "made"}}, "made")


async def change_token(customer: Customer) -> Change:
    """Rename a token."""
    made = await customer.new_token()
    return Change(await by_login(customer), {"id": made["id"], "token": {"name": "renamed"}}, "renamed")


async def touch_token(customer: Customer) -> Change:
    """Rotate or revoke a token."""
    made = await customer.new_token(name="made")
    return Change(await by_login(customer), {"id": made["id"]}, "made")


async def log_in(customer: Customer) -> Change:
    """Log in."""
    stranger = Caller("login", None, {})
    return Change(stranger, {"session": {"email": customer.email, "password": PASSWORD}})


async def log_out(customer: Customer) -> Change:
    """Log out."""
    return Change(await by_login(customer), {})


async def end_a_login(customer: Customer) -> Change:
    """End another login."""
    other = await by_login(customer)
    return Change(await by_login(customer), {"id": other.credential})


async def change_password(customer: Customer) -> Change:
    """Change the password."""
    passwords = {"current_password": PASSWORD, "new_password": "another correct horse"}
    return Change(await by_login(customer), {"password": passwords})


# A new write needs a line here. FinishSession, which begins elsewhere, has a test of its own.
SCENARIOS: dict[str, Callable[[Customer], Awaitable[Change]]] = {
    "CreateDatabase": create_database,
    "UpdateDatabase": update_database,
    "DeleteDatabase": delete_database,
    "CreateBackup": create_backup,
    "DeleteBackup": delete_backup,
    "RestoreBackup": restore_backup,
    "RotateDatabasePassword": new_password,
    "StopDatabase": stop_database,
    "StartDatabase": start_database,
    "RetryDatabase": retry_database,
    "UndeleteDatabase": undelete_database,
    "CreateFunction": create_function,
    "UpdateFunction": update_function,
    "DeleteFunction": delete_function,
    "RollbackFunction": roll_a_function_back,
    "CreateProxy": create_proxy,
    "UpdateProxy": update_proxy,
    "DeleteProxy": touch_proxy,
    "RotateProxyPassword": touch_proxy,
    "CreateToken": create_token,
    "UpdateToken": change_token,
    "RotateToken": touch_token,
    "DeleteToken": touch_token,
    "CreateSession": log_in,
    "DeleteSession": log_out,
    "RevokeSession": end_a_login,
    "ChangePassword": change_password,
}


class Told:
    """What the record and the feed of an account say beyond what they said before."""

    def __init__(self, customer: Customer) -> None:
        self._customer = customer
        self._entries = self._events = 0

    async def news(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the entries since the last time, and those events that a request has caused."""
        entries = (await record_of(self._customer))[self._entries :]
        events = (await self._customer.call("GET", f"/api/portal/events?after={self._events}")).json()
        self._entries += len(entries)
        self._events += len(events)
        return entries, [event for event in events if "request_id" in event]


@pytest.mark.usefixtures("functions", "proxy_port")
@pytest.mark.parametrize("name", [name for name in WRITES if name != "FinishSession"])
async def test_a_change_is_told_once(customer: Customer, door: Door, name: str) -> None:
    """A change that is tried, done and repeated by its key is one entry and one event, with all that was so."""
    rpc, change, told = RPCS[name], await SCENARIOS[name](customer), Told(customer)
    await told.news()
    headers = change.caller.headers
    if "validate_only" in rpc.request.DESCRIPTOR.fields_by_name:
        tried = await door.call(name, {**change.request, "validate_only": True}, **headers)
        assert (tried.code, await told.news()) == ("ok", ([], [])), tried.sentence
    done = await door.call(name, change.request, idempotency_key="once", **headers)
    assert done.code == "ok", done.sentence
    check_told(
        *await told.news(),
        action=rpc.action,
        caller=change.caller,
        request_id=done.headers["x-request-id"],
        resource={"id": change.target or done.result["id"], "name": change.name},
        shown=done,
    )
    if rpc.verb == "POST" and not rpc.access.public:
        given = done.headers.get("set-cookie", "").partition(";")[0]
        again = await door.call(
            name, change.request, idempotency_key="once", **(headers | ({"cookie": given} if given else {}))
        )
        assert (again.code, again.headers.get("idempotent-replayed")) == ("ok", "true"), again.sentence
        assert await told.news() == ([], [])


def check_told(
    entries: list[dict[str, Any]],
    events: list[dict[str, Any]],
    *,
    action: str,
    caller: Caller,
    request_id: str,
    resource: dict[str, Any],
    shown: Answer | None = None,
) -> None:
    """Fail unless there are one entry and one event, and both say what was done."""
    ((entry,), (event,)) = entries, events
    assert entry.pop("created_at")
    assert entry.pop("sequence") > 0
    assert entry == _without_none(
        action=action,
        outcome="ok",
        actor=caller.actor,
        credential=caller.credential or resource["id"],  # a login is its own credential
        ip="127.0.0.1",
        request_id=request_id,
        target=resource["id"],
        target_name=resource["name"],
        count=1,
    )
    answer = shown.result if shown else {}
    assert event.pop("created_at")
    assert event.pop("sequence") > 0
    assert event == _without_none(
        type=action,
        resource_id=resource["id"],
        resource_name=answer.get("name"),
        status=answer.get("status"),
        request_id=request_id,
    )


def _without_none(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def test_every_write_has_a_scenario() -> None:
    """Each write of the contract is done by a test above or below."""
    assert {*SCENARIOS, "FinishSession"} == set(WRITES)


@pytest.fixture(scope="module")
async def provider(folder: Path, database_url: str, catalog: Path) -> AsyncIterator[tuple[Stack, SmallIssuer]]:
    """A stack with a login of the provider's own, and its issuer."""
    clock = SystemClock()
    with running(clock) as issuer:
        settings = {
            "oidc_issuer": issuer.url,
            "oidc_client_id": CLIENT_ID,
            "oidc_client_secret": issuer.client_secret,
            "public_url": "https://portal.example/",
        }
        own = folder / f"audited-{'pg' if database_url else 'lite'}"
        async with Stack(own, database_url=database_url, catalog=catalog, clock=clock, **settings) as stack:
            yield stack, issuer


async def test_a_login_at_the_provider_is_told_once(provider: tuple[Stack, SmallIssuer]) -> None:
    """A login by OpenID Connect is one entry and one event about the login that it made; begun, it is none."""
    stack, issuer = provider
    customer = await stack.customer()
    issuer.person = {"sub": customer.account_id, "email": customer.email, "email_verified": True}
    for door in (Rest(stack.rest), Native(stack.channel)):
        told = Told(customer)
        await told.news()
        begun = await stack.rest.get(OIDC)
        cookie = begun.headers["set-cookie"].partition(";")[0]
        parameters = issuer.log_in(begun.headers["location"])
        assert await told.news() == ([], [])
        if isinstance(door, Rest):
            finished = await stack.rest.get(f"{OIDC}/callback", params=parameters, headers={"cookie": cookie})
            assert finished.status_code == 303, finished.text
            headers = dict(finished.headers)
        else:
            answer = await door.call("FinishSession", parameters, cookie=cookie)
            assert answer.code == "ok", answer.sentence
            headers = dict(answer.headers)
        sessions = (await customer.by_login("GET", "/api/portal/sessions")).json()
        check_told(
            *await told.news(),
            action="session.finish",
            caller=Caller("login", None, {}),
            request_id=headers["x-request-id"],
            resource={"id": sessions[-1]["id"], "name": None},
        )
        stack.rest.cookies.clear()
