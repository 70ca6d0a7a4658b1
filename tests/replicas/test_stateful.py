"""Whatever customers do in whatever order, at either replica and door: they get what a model of a few lines says."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlmodel import col, select, update

from controlplane.accounts.model import Account
from controlplane.audit.model import AuditEntry
from controlplane.events.model import Event
from controlplane.tokens.expiry import end_what_is_over
from tests.doors import Answer
from tests.replicas.conftest import Replicas
from tests.replicas.model import REACHES, Model, Request, Token
from tests.stack import Customer

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]

STEP = 200.0  # seconds that pass at a time. Nothing that lasts ends near a step, so that real time does not matter
GRACE = 300
LONG_ENOUGH = 2000  # whatever has an end has ended then, but for the login
DOORS = some.integers(0, 3)
PLACES = some.integers(0, 9)  # in a list, from its end
KEYS = some.sampled_from([None, "a", "b"])
TIMES = some.sampled_from([None, None, 300.0, 700.0, 1100.0])  # since the account was opened
NAMES = some.sampled_from(["one", "two", "three", "four"])
ELSEWHERE = ["203.0.113.7"]


async def test_the_model_knows_every_answer(replicas: Replicas) -> None:
    """Tokens, quotas and idempotency do in any order what the model says, and both replicas keep one true record."""
    loop = asyncio.get_running_loop()

    def run(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    class LifeHere(Life):
        def __init__(self) -> None:
            super().__init__(replicas, run)

    await asyncio.to_thread(
        run_state_machine_as_test,
        LifeHere,
        settings=settings(
            max_examples=16,
            stateful_step_count=30,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    await replicas.check_records()


class Life(RuleBasedStateMachine):
    """The life of one account. It runs in a thread of its own; `run` has the servers' loop do something."""

    def __init__(self, replicas: Replicas, run: Run[Any]) -> None:
        super().__init__()
        self.replicas = replicas
        self.run = run
        self.customer: Customer = run(replicas.first.customer(plan="small"))
        self.began = replicas.clock.now()
        (listed,) = self.by_login(0, Request("ListTokens")).result
        first = Token(listed["id"], REACHES["full"], self.customer.token, expires_at=None)
        self.model = Model([first], changes=["session.create", "token.create"])
        # Every secret that there ever was, and whose it is.
        self.secrets = [(first, first.secret)]
        self.checks = 0

    @rule(door=DOORS, key=KEYS, reach=some.sampled_from(sorted(REACHES)), expires_at=TIMES)
    def create_token(self, door: int, key: str | None, reach: str, expires_at: float | None) -> None:
        """Make a token, with or without a key."""
        token: dict[str, Any] = {"name": "ci", **({"permissions": [reach]} if ":" in reach else {"scope": reach})}
        if expires_at is not None:
            token["expires_at"] = self.time(expires_at)
        request = Request("CreateToken", {"token": token}, key)
        due = self.model.manage()
        if due == "ok":
            due = self.model.repeats(request) or self.model.create_token(expires_at)
        made = self.check(due, self.by_login(door, request), request)
        if made:
            self.model.tokens.append(Token(made["id"], REACHES[reach], made["token"], expires_at))
            self.model.changes.append("token.create")
            self.secrets.append((self.model.tokens[-1], made["token"]))

    @rule(door=DOORS, place=PLACES, key=KEYS, grace=some.sampled_from([0, GRACE]))
    def rotate_token(self, door: int, place: int, key: str | None, grace: int) -> None:
        """Rotate a token, with or without a grace, with or without a key."""
        token = self.token(place)
        request = Request("RotateToken", {"id": token.id, "rotation": {"grace_seconds": grace}}, key)
        due = self.model.manage()
        if due == "ok":
            due = self.model.repeats(request) or self.model.rotate(token)
        made = self.check(due, self.by_login(door, request), request)
        if made:
            token.previous, token.previous_until = token.secret, self.model.now + grace
            token.secret = made["token"]
            self.model.changes.append("token.rotate")
            self.secrets.append((token, token.secret))

    @rule(door=DOORS, place=PLACES)
    def revoke_token(self, door: int, place: int) -> None:
        """Revoke a token, be it for the first time or once more."""
        token = self.token(place)
        due = self.model.manage()
        if due == "ok":
            due = self.model.revoke(token)
            self.model.changes.append("token.delete")
        self.check(due, self.by_login(door, Request("DeleteToken", {"id": token.id})))

    @rule(door=DOORS, place=PLACES, elsewhere=some.booleans())
    def move_token(self, door: int, place: int, *, elsewhere: bool) -> None:
        """Allow a token to be used elsewhere only, or from anywhere."""
        token = self.token(place)
        due = self.model.manage()
        if due == "ok":
            due = self.model.move(token, elsewhere=elsewhere)
        self.update(due, door, token, {"allowed_ips": ELSEWHERE if elsewhere else []})

    @rule(door=DOORS, place=PLACES, expires_at=TIMES)
    def prolong_token(self, door: int, place: int, expires_at: float | None) -> None:
        """Change when a token expires."""
        token = self.token(place)
        due = self.model.manage()
        if due == "ok":
            due = self.model.prolong(token, expires_at)
        self.update(due, door, token, {"expires_at": None if expires_at is None else self.time(expires_at)})

    @rule(door=DOORS, place=PLACES)
    def use_token(self, door: int, place: int) -> None:
        """Use a secret, one of the newest, for a read, a write, and what only a login may."""
        token, secret = self.secrets[-1 - place % len(self.secrets)]
        use = self.model.use
        due = use(token, secret, "list")
        self.check(due, self.by_secret(door, secret, Request("ListDatabases")))
        answer = self.by_secret(door, secret, Request("ListTokens"))
        self.check("login_required" if due in {"ok", "scope_denied"} else due, answer)
        due = use(token, secret, "delete")
        answer = self.by_secret(door, secret, Request("DeleteDatabase", {"name": "nothing"}))
        self.check("not_found" if due == "ok" else due, answer)

    @rule(door=DOORS, place=PLACES, key=KEYS, name=NAMES)
    def create_database(self, door: int, place: int, key: str | None, name: str) -> None:
        """Order a database with one of the newest tokens, with or without a key."""
        token = self.token(place)
        new = {"name": name, "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}
        request = Request("CreateDatabase", {"database": new}, key)
        due = self.model.use(token, token.secret, "create")
        if due == "ok":
            due = self.model.repeats(request) or self.model.create_database(name)
        if self.check(due, self.by_secret(door, token.secret, request), request):
            self.model.changes.append("database.create")

    @precondition(lambda self: self.model.answered)
    @rule(door=DOORS, place=PLACES)
    def send_again(self, door: int, place: int) -> None:
        """Send a request once more that was answered and has a key."""
        answered = list(self.model.answered.values())
        request, _ = answered[-1 - place % len(answered)]
        due = self.model.manage()
        self.check("replay" if due == "ok" else due, self.by_login(door, request), request)

    @precondition(lambda self: self.model.now < LONG_ENOUGH)
    @rule()
    def let_pass(self) -> None:
        """Let time pass; what has ended is refused before the servers have cleaned up, and after."""
        self.model.let_pass(STEP)
        until = self.began + timedelta(seconds=self.model.now)
        self.replicas.clock.let_pass(seconds=(until - self.replicas.clock.now()).total_seconds())
        for token, secret in self.secrets[-3:]:
            self.check(self.model.use(token, secret, "list"), self.by_secret(0, secret, Request("ListDatabases")))
        self.run(end_what_is_over(self.replicas.last.server.store, self.replicas.clock))

    @rule(door=DOORS, place=PLACES)
    def disable_for_a_while(self, door: int, place: int) -> None:
        """Disable the account, try a few things, and enable it again."""
        self.set_disabled(is_disabled=True)
        self.shows_what_the_model_says()
        self.use_token(door, place)
        self.revoke_token(door, place)
        self.create_token(door, "a", "full", None)
        self.set_disabled(is_disabled=False)

    @invariant()
    def shows_what_the_model_says(self) -> None:
        """Whichever door is asked shows the quotas and the tokens as they are."""
        self.checks += 1
        account, tokens = (self.by_login(self.checks % 4, Request(rpc)) for rpc in ("GetAccount", "ListTokens"))
        assert account.code == tokens.code == self.model.manage()
        if account.code == "ok":
            assert {kind: account.result["quotas"][kind]["used"] for kind in self.model.used} == self.model.used
            statuses = {token.id: token.status(self.model.now) for token in self.model.tokens}
            assert {token["id"]: token["status"] for token in tokens.result} == statuses

    def teardown(self) -> None:
        """Fail unless each change is in the record and in the feed once, in its order, and nothing else is."""
        store, account_id = self.replicas.last.server.store, self.customer.account_id
        kept = select(AuditEntry.action).where(col(AuditEntry.account_id) == account_id)
        kept = kept.where(col(AuditEntry.outcome) == "ok").order_by(col(AuditEntry.sequence))
        assert [row.action for row in self.run(store.fetch(kept))] == self.model.changes
        told = select(Event.type).where(col(Event.account_id) == account_id).order_by(col(Event.sequence))
        # What the reconciler has made of the orders comes when it comes.
        events = [row.type for row in self.run(store.fetch(told)) if row.type != "database.ready"]
        assert events == self.model.changes

    def token(self, place: int) -> Token:
        """Return one of the newest tokens."""
        return self.model.tokens[-1 - place % len(self.model.tokens)]

    def time(self, seconds: float) -> str:
        """Return a time as the API takes it."""
        return (self.began + timedelta(seconds=seconds)).isoformat()

    def update(self, due: str, door: int, token: Token, change: dict[str, Any]) -> None:
        """Change a token."""
        self.check(due, self.by_login(door, Request("UpdateToken", {"id": token.id, "token": change})))
        if due == "ok":
            self.model.changes.append("token.update")

    def check(self, due: str, answer: Answer, request: Request | None = None) -> dict[str, Any] | None:
        """Fail unless the answer is the one that is due; return what has been made, None if nothing has.

        A request that makes something is remembered with its answer.
        """
        if due == "replay":
            assert request is not None
            before = self.model.answered[request.name][1]
            assert (answer.code, answer.headers.get("idempotent-replayed")) == ("ok", "true")
            assert (answer.result["id"], answer.result.get("token")) == (before["id"], before.get("token"))
            return None
        assert (answer.code, "idempotent-replayed" in answer.headers) == (due, False)
        if due != "ok" or request is None:
            return None
        if request.key is not None:
            self.model.answered[request.name] = (request, answer.result)
        made: dict[str, Any] = answer.result
        return made

    def by_login(self, door: int, request: Request) -> Answer:
        """Call with the customer's login."""
        return self.call(door, request, cookie=self.customer.cookie, sec_fetch_site="same-origin")

    def by_secret(self, door: int, secret: str, request: Request) -> Answer:
        """Call with a token's secret."""
        return self.call(door, request, authorization=f"Bearer {secret}")

    def call(self, door: int, request: Request, **headers: str) -> Answer:
        """Call through a door."""
        if request.key is not None:
            headers["idempotency_key"] = request.key
        answer: Answer = self.run(self.replicas.doors[door].call(request.rpc, request.message, **headers))
        return answer

    def set_disabled(self, *, is_disabled: bool) -> None:
        """Disable or enable the account, in the database itself."""
        self.model.is_disabled = is_disabled

        async def change() -> None:
            mine = col(Account.id) == self.customer.account_id
            at = self.replicas.clock.now() if is_disabled else None
            async with self.replicas.last.server.store.session() as session:
                await session.execute(update(Account).where(mine).values(disabled_at=at))
                await session.commit()

        self.run(change())
