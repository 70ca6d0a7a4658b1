"""A credential that has ended has ended everywhere: no request that starts after the answer gets in."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from sqlmodel import col, update

from controlplane.accounts.model import Account
from tests.doors import Door
from tests.replicas.conftest import Replicas
from tests.stack import PASSWORD, Customer, eventually

TOKENS, SESSIONS = "/api/portal/tokens", "/api/portal/sessions"
AT_ONCE = 3  # programs that use the credential, at each door
ENOUGH = 5  # requests of each program, before and after the end


@dataclass(frozen=True, slots=True)
class Scene:
    """A customer with two tokens and two logins. `token` and `login` are those that may end, as the API shows them."""

    servers: Replicas
    customer: Customer
    token: dict[str, Any]
    login: dict[str, Any]

    async def done(self, method: str, path: str, *, cookie: str | None = None, **request: Any) -> None:
        """Call by a login, the customer's own unless another is given."""
        headers = {"cookie": cookie} if cookie else {}
        answer = await self.customer.by_login(method, path, headers=headers, **request)
        assert answer.status_code == 200, answer.text


async def revoke(scene: Scene) -> None:
    """Revoke the token."""
    await scene.done("DELETE", f"{TOKENS}/{scene.token['id']}")


async def rotate(scene: Scene) -> None:
    """Rotate the token without a grace."""
    await scene.done("POST", f"{TOKENS}/{scene.token['id']}/rotate")


async def allow_elsewhere(scene: Scene) -> None:
    """Take the token's permission to be used from here."""
    await scene.done("PATCH", f"{TOKENS}/{scene.token['id']}", json={"allowed_ips": ["203.0.113.7"]})


async def expire(scene: Scene) -> None:
    """Let the token's hour go by."""
    scene.servers.clock.let_pass(hours=1)


async def disable(scene: Scene) -> None:
    """Disable the account, in the database itself."""
    async with scene.servers.first.server.store.session() as session:
        mine = col(Account.id) == scene.customer.account_id
        await session.execute(update(Account).where(mine).values(disabled_at=scene.servers.clock.now()))
        await session.commit()


async def end_login(scene: Scene) -> None:
    """End the login, by the other one."""
    await scene.done("DELETE", f"{SESSIONS}/{scene.login['id']}")


async def log_out(scene: Scene) -> None:
    """Log out, by the login itself."""
    await scene.done("DELETE", "/api/portal/session", cookie=scene.login["cookie"])


async def change_password(scene: Scene) -> None:
    """Change the password, by the other login."""
    passwords = {"current_password": PASSWORD, "new_password": "another horse, another battery"}
    await scene.done("PUT", "/api/portal/account/password", json=passwords)


@pytest.mark.parametrize("end", [revoke, rotate, allow_elsewhere, expire, disable])
async def test_a_token_ends_everywhere_at_once(servers: Replicas, end: Callable[[Scene], Awaitable[None]]) -> None:
    """A token in use at every door is refused at all of them once it has ended, and no other token is."""
    scene = await make_scene(servers)
    code = "ip_denied" if end is allow_elsewhere else "unauthenticated"
    await check_end(scene, end, bearer(scene.token["token"]), code=code)


@pytest.mark.parametrize("end", [end_login, log_out, change_password, disable])
async def test_a_login_ends_everywhere_at_once(servers: Replicas, end: Callable[[Scene], Awaitable[None]]) -> None:
    """A login in use at every door is refused at all of them once it has ended, and no token is."""
    scene = await make_scene(servers)
    await check_end(scene, end, {"cookie": scene.login["cookie"]}, code="unauthenticated")


async def make_scene(servers: Replicas) -> Scene:
    """Return a new customer's scene; everything in it was made at the first replica."""
    customer = await servers.first.customer()
    expires_at = (servers.clock.now() + timedelta(hours=1)).isoformat()
    token = await customer.new_token(expires_at=expires_at)
    second = Customer(servers.first, customer.account_id, customer.email)
    await second.log_in()
    login = (await second.by_login("GET", "/api/portal/session")).json()
    return Scene(servers, customer, token, {**login, "cookie": second.cookie})


async def check_end(
    scene: Scene, end: Callable[[Scene], Awaitable[None]], ending: dict[str, str], *, code: str
) -> None:
    """Use a credential at every door while it ends, beside one that does not; fail if an answer is a wrong one."""
    # Beside a token or login that ends, one of the same account; beside an account, one of another.
    other = (await scene.servers.last.customer()) if end is disable else scene.customer
    users = [Program(door, ending) for door in scene.servers.doors for _ in range(AT_ONCE)]
    others = [Program(door, bearer(other.token)) for door in scene.servers.doors]
    stopped = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for program in (*users, *others):
            group.create_task(program.run(stopped))
        await eventually(lambda: have_enough(users, since=0))
        so_far = {answered for user in users for _, answered in user.answers}
        await end(scene)
        ended = time.monotonic()
        await eventually(lambda: have_enough([*users, *others], since=ended))
        stopped.set()
    later = {answered for user in users for began, answered in user.answers if began > ended}
    throughout = {answered for user in others for _, answered in user.answers}
    assert (so_far, later, throughout) == ({"ok"}, {code}, {"ok"})


@dataclass(slots=True)
class Program:
    """Somebody who asks again and again: when each request began, and how it was answered."""

    door: Door
    headers: dict[str, str]
    answers: list[tuple[float, str]] = field(default_factory=list)

    async def run(self, stopped: asyncio.Event) -> None:
        """Ask until stopped."""
        while not stopped.is_set():
            began = time.monotonic()
            answer = await self.door.call("ListDatabases", **self.headers)
            self.answers.append((began, answer.code))


async def have_enough(programs: list[Program], *, since: float) -> bool:
    """Tell whether each program has enough answers to what it asked since then."""
    return all(sum(began > since for began, _ in program.answers) >= ENOUGH for program in programs)


def bearer(token: str) -> dict[str, str]:
    """Return the header of a token."""
    return {"authorization": f"Bearer {token}"}
