"""Guessing passwords: what it costs whoever does it, and that it costs nobody else anything."""

import asyncio
import base64
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from controlplane.access.rate import LocalLimiter, Verdict
from controlplane.access.valkey import ValkeyLimiter
from controlplane.errors import RateLimited, Unavailable
from controlplane.keys import Keys
from controlplane.observe.metrics import new_metrics
from controlplane.sessions.throttle import PER_ACCOUNT, PER_PAIR, WINDOW, LoginThrottle
from tests.clock import ManualClock
from tests.doors import Native, read_response
from tests.stack import PASSWORD, Stack

KEYS = Keys(**{each: {"k1": base64.b64encode(secrets.token_bytes(32)).decode()} for each in ("mac", "seal")})
OWNER, HOME = "owner@example.com", "192.0.2.1"
SESSION = "/api/portal/session"
WRONG = "the wrong password"


class Guesser:
    """Guesses at a throttle, and counts the guesses that were checked."""

    def __init__(self, clock: ManualClock, *, failed_login_limit: int = 1000) -> None:
        self.limiter = Noting(clock)
        self.throttle = LoginThrottle(limiter=self.limiter, keys=KEYS, failed_login_limit=failed_login_limit)
        self.checked = 0

    async def guess(self, address: str, *, email: str = OWNER, right: bool = False) -> bool:
        """Guess; tell whether it was checked."""

        async def check() -> bool:
            self.checked += 1
            await asyncio.sleep(0)
            return right

        try:
            assert await self.throttle.guess(email, address, check) == right
        except RateLimited:
            return False
        return True

    async def wrong(self, address: str, *, email: str = OWNER) -> int:
        """Guess wrong until it is refused; return how often it was not."""
        for count in range(100):
            if not await self.guess(address, email=email):
                return count
        raise AssertionError


class Noting(LocalLimiter):
    """A limiter that keeps the keys it was given."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.keys = set[str]()

    async def hit(
        self, key: str, limit: int, *, window: float = 60, cost: int = 1, fail_closed: bool = False
    ) -> Verdict:
        """Count as ever."""
        assert fail_closed
        self.keys.add(key)
        return await super().hit(key, limit, window=window, cost=cost)


@pytest.fixture
def guesser(clock: ManualClock) -> Guesser:
    """A throttle that has seen nothing."""
    return Guesser(clock)


async def test_one_address_is_wrong_five_times(guesser: Guesser, clock: ManualClock) -> None:
    """The sixth guess is not even checked; once the first is 15 minutes old there is another."""
    for count in range(PER_PAIR):
        assert await guesser.guess("203.0.113.1"), count
        clock.advance(60)
    with pytest.raises(RateLimited) as refused:
        await guesser.throttle.guess(OWNER, "203.0.113.1", _never)
    assert refused.value.retry_after == WINDOW - PER_PAIR * 60
    assert "at most 5 failed logins in 15 minutes" in str(refused.value)
    clock.advance(refused.value.retry_after - 1)
    assert not await guesser.guess("203.0.113.1", right=True)
    clock.advance(1)
    assert await guesser.wrong("203.0.113.1") == 1


async def test_being_right_costs_nothing(guesser: Guesser) -> None:
    """Right passwords do not count, however many there are, and take no failure back."""
    for _ in range(PER_PAIR - 1):
        await guesser.guess(HOME)
    for _ in range(50):
        assert await guesser.guess(HOME, right=True)
    assert await guesser.wrong(HOME) == 1


async def test_nobody_is_locked_out_by_others(guesser: Guesser) -> None:
    """However many addresses guess at an account, its owner gets in from one that has not been wrong."""
    guesses = [await guesser.wrong(f"203.0.113.{number}") for number in range(10)]
    assert guesses == [PER_PAIR] * (PER_ACCOUNT // PER_PAIR) + [1] * 6
    for _ in range(3):
        assert await guesser.guess(HOME, right=True)
    assert await guesser.wrong(HOME) == 1
    assert not await guesser.guess(HOME, right=True)
    assert await guesser.wrong(HOME, email="somebody.else@example.com") == PER_PAIR


async def test_an_attack_is_over_after_15_minutes(guesser: Guesser, clock: ManualClock) -> None:
    """An account that nobody guesses at any more has its five tries from everywhere again."""
    for number in range(10):
        await guesser.wrong(f"203.0.113.{number}")
    clock.advance(WINDOW)
    assert await guesser.wrong("203.0.113.1") == PER_PAIR


async def test_refused_guesses_do_not_count(guesser: Guesser) -> None:
    """One address that goes on and on uses up its own tries and no more of the account's."""
    for _ in range(3 * PER_ACCOUNT):
        await guesser.guess("203.0.113.1")
    assert guesser.checked == PER_PAIR
    assert await guesser.wrong("203.0.113.2") == PER_PAIR


async def test_one_address_at_many_accounts(clock: ManualClock) -> None:
    """An address that tries one password on many accounts is limited in all, also the right one; others are not."""
    guesser = Guesser(clock, failed_login_limit=7)
    tried = [await guesser.guess("203.0.113.1", email=f"{number}@example.com") for number in range(9)]
    assert tried == [True] * 7 + [False] * 2
    assert not await guesser.guess("203.0.113.1", right=True)
    assert await guesser.guess("203.0.113.2", email="8@example.com", right=True)
    clock.advance(WINDOW)
    assert await guesser.wrong("203.0.113.1", email="8@example.com") == PER_PAIR


async def test_an_ipv6_network_is_one_address(guesser: Guesser) -> None:
    """Whoever has a /64 has one address; IPv4 written as IPv6 is IPv4."""
    for address in ("2001:db8::1", "2001:db8::2", "2001:db8:0:0:ffff::", "2001:db8::4", "2001:db8::5"):
        assert await guesser.guess(address)
    assert not await guesser.guess("2001:db8::6")
    assert await guesser.guess("2001:db8:0:1::1")
    assert await guesser.wrong("::ffff:203.0.113.1") == PER_PAIR
    assert not await guesser.guess("203.0.113.1")


async def test_guesses_in_parallel_are_all_counted(guesser: Guesser) -> None:
    """A hundred guesses at once are no more than one after the other."""
    tried = await asyncio.gather(*(guesser.guess("203.0.113.1") for _ in range(100)))
    assert (sum(tried), guesser.checked) == (PER_PAIR, PER_PAIR)


async def test_what_could_not_be_checked_does_not_count(guesser: Guesser) -> None:
    """A guess that got no answer was none."""
    for _ in range(2 * PER_PAIR):
        with pytest.raises(Unavailable):
            await guesser.throttle.guess(OWNER, HOME, _unavailable)
    assert await guesser.wrong(HOME) == PER_PAIR


async def test_the_counts_name_nobody(guesser: Guesser) -> None:
    """Under what is counted nobody can read which accounts are guessed at."""
    await guesser.guess(HOME)
    assert len(guesser.limiter.keys) == 3
    assert not [key for key in guesser.limiter.keys if "owner" in key or "example" in key]


async def test_without_the_counts_there_are_no_logins(clock: ManualClock, tmp_path: Path) -> None:
    """While the servers' shared counts cannot be had, nothing is checked."""
    limiter = ValkeyLimiter(f"unix://{tmp_path}/none.sock", clock=clock, metrics=new_metrics())
    throttle = LoginThrottle(limiter=limiter, keys=KEYS, failed_login_limit=1000)
    with pytest.raises(Unavailable):
        await throttle.guess(OWNER, HOME, _never)
    await limiter.close()


async def _never() -> bool:
    raise AssertionError


async def _unavailable() -> bool:
    raise Unavailable


@pytest.fixture(scope="module")
async def strict(folder: Path, database_url: str, catalog: Path) -> AsyncIterator[Stack]:
    """A stack in which one address can fail 8 logins."""
    kind = "strict-pg" if database_url else "strict-lite"
    async with Stack(folder / kind, database_url=database_url, catalog=catalog, failed_login_limit=8) as running:
        yield running


async def log_in(stack: Stack, email: str, password: str, *, address: str = "127.0.0.1") -> httpx.Response:
    """Try to log in from one of the loopback's addresses."""
    transport = httpx.AsyncHTTPTransport(local_address=address, verify=False)
    async with httpx.AsyncClient(transport=transport, base_url=stack.rest.base_url, timeout=30) as client:
        return await client.post(SESSION, json={"email": email, "password": password})


async def test_the_door_tells_no_account_from_none(strict: Stack) -> None:
    """Guesses at an account and at none are answered in the same statuses and bytes, up to the refusal and after it."""
    customer = await strict.customer()

    async def guess(email: str, address: str) -> list[tuple[int, str, list[str]]]:
        answers = [await log_in(strict, email, WRONG, address=address) for _ in range(7)]
        errors = [read_response(answer) for answer in answers]
        assert all(0 < int(error.headers["retry-after"]) <= WINDOW for error in errors[PER_PAIR:])
        return [
            (
                answer.status_code,
                answer.text.replace(error.request_id, "").partition(" Retry in ")[0],
                sorted(answer.headers),
            )
            for answer, error in zip(answers, errors, strict=True)
        ]

    known, unknown = await guess(customer.email, "127.0.0.9"), await guess("nobody@example.com", "127.0.0.10")
    assert [status for status, _, _ in known] == [401] * PER_PAIR + [429] * 2
    assert known == unknown


async def test_the_owner_gets_in_from_elsewhere(strict: Stack) -> None:
    """Where the guesses come from the right password is refused too; from another address it is not."""
    customer = await strict.customer()
    guesses = await asyncio.gather(*(log_in(strict, customer.email, WRONG, address="127.0.0.8") for _ in range(12)))
    assert sorted(answer.status_code for answer in guesses) == [401] * PER_PAIR + [429] * 7
    assert (await log_in(strict, customer.email.upper(), PASSWORD, address="127.0.0.8")).status_code == 429
    for _ in range(PER_PAIR + 1):
        assert (await log_in(strict, customer.email, PASSWORD, address="127.0.0.7")).status_code == 200


async def test_one_address_fails_as_many_logins_as_it_may(strict: Stack) -> None:
    """An address that has failed as often as the setting allows fails no more, whatever account it tries."""
    customers = [await strict.customer() for _ in range(3)]
    tries = [each.email for each in customers for _ in range(3)]
    statuses = [(await log_in(strict, email, WRONG, address="127.0.0.6")).status_code for email in tries]
    assert statuses == [401] * 8 + [429]
    fourth = (await strict.customer()).email
    assert (await log_in(strict, fourth, PASSWORD, address="127.0.0.6")).status_code == 429
    assert (await log_in(strict, fourth, PASSWORD, address="127.0.0.5")).status_code == 200


async def test_a_flood_of_logins_is_bounded(stack: Stack) -> None:
    """Of 200 logins at once most are told to come back before any work is done, and the others' requests go on."""
    customer, door = await stack.customer(), Native(stack.channel)
    token = f"Bearer {customer.token}"
    wanted = [{"session": {"email": f"{number}@flood.example", "password": WRONG}} for number in range(200)]
    flood = [asyncio.create_task(door.call("CreateSession", each)) for each in wanted]
    served = 0
    while not all(login.done() for login in flood):
        assert (await door.call("ListDatabases", None, authorization=token)).code == "ok"
        served += 1
    answers = [await login for login in flood]
    assert {answer.code for answer in answers} == {"unauthenticated", "unavailable"}
    turned_away = [answer for answer in answers if answer.code == "unavailable"]
    assert len(turned_away) > 100
    assert {answer.headers["retry-after"] for answer in turned_away} == {"1"}
    assert served > 10
    assert (await log_in(stack, customer.email, PASSWORD)).status_code == 200
