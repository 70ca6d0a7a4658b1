"""How often an address may ask without a valid credential, and that this is nobody else's limit."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from controlplane.access.allowlist import network_of
from controlplane.access.secrets import new_token
from tests.clock import MovableClock
from tests.doors import Door, Native, Rest
from tests.stack import Customer, Stack

LIMIT = 5


@pytest.fixture(scope="module")
async def strict(folder: Path, catalog: Path) -> AsyncIterator[tuple[Stack, Customer, MovableClock]]:
    """A stack that lets an address ask five times in a minute, a customer of it, and its clock."""
    clock = MovableClock()
    async with Stack(folder / "strict", catalog=catalog, clock=clock, anonymous_rate_limit=LIMIT) as stack:
        yield stack, await stack.customer(), clock


@pytest.fixture
def rested(strict: tuple[Stack, Customer, MovableClock]) -> tuple[Stack, Customer]:
    """That stack after a minute in which nobody has asked."""
    stack, customer, clock = strict
    clock.let_pass(seconds=61)
    return stack, customer


@pytest.fixture(params=["rest", "native"])
def gate(request: pytest.FixtureRequest, rested: tuple[Stack, Customer]) -> Door:
    """Each of the two doors of that stack in turn."""
    stack, _ = rested
    return Rest(stack.rest) if request.param == "rest" else Native(stack.channel)


async def strangers(customer: Customer) -> dict[str, tuple[str, dict[str, str], str]]:
    """Return ways to ask without a valid credential: the RPC, the headers, and what the answer is within the limit."""
    revoked, elsewhere = await customer.new_token(), await customer.new_token(allowed_ips=["203.0.113.7"])
    assert (await customer.by_login("DELETE", f"/api/portal/tokens/{revoked['id']}")).status_code == 200
    return {
        "nobody": ("ListDatabases", {}, "unauthenticated"),
        "mistyped": ("ListDatabases", {"authorization": f"Bearer {customer.token[:-1]}"}, "unauthenticated"),
        "unknown": ("ListDatabases", {"authorization": f"Bearer {new_token()}"}, "unauthenticated"),
        "revoked": ("ListDatabases", {"authorization": f"Bearer {revoked['token']}"}, "unauthenticated"),
        "elsewhere": ("ListDatabases", {"authorization": f"Bearer {elsewhere['token']}"}, "ip_denied"),
        "no session": ("ListDatabases", {"cookie": "__Host-htx_session=none"}, "unauthenticated"),
        "public": ("GetOpenApi", {}, "ok"),
        "signed": ("GetOpenApi", {"authorization": f"Bearer {customer.token}"}, "ok"),
    }


@pytest.mark.parametrize(
    "kind", ["nobody", "mistyped", "unknown", "revoked", "elsewhere", "no session", "public", "signed"]
)
async def test_a_stranger_is_slowed_down(rested: tuple[Stack, Customer], gate: Door, kind: str) -> None:
    """The sixth request in a minute without a valid credential is a 429 that says why and when to come again."""
    _, customer = rested
    rpc, headers, code = (await strangers(customer))[kind]
    for _ in range(LIMIT):
        assert (await gate.call(rpc, None, **headers)).code == code
    for _ in range(2):
        refused = await gate.call(rpc, None, **headers)
        assert refused.code == "rate_limited"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        of = "a credential" if rpc == "GetOpenApi" else "a valid credential"
        assert f"at most 5 requests without {of} from one address in 60 seconds" in refused.sentence


async def test_all_strangers_at_an_address_are_one(rested: tuple[Stack, Customer]) -> None:
    """Whatever they bring and through whichever door they come, they are counted together; but public RPCs apart."""
    stack, customer = rested
    ways = await strangers(customer)
    asked_for_nothing = [ways.pop(name) for name in ("public", "signed")]
    del ways["elsewhere"]  # which is another answer
    for kinds in (ways.values(), asked_for_nothing * 2):
        codes = []
        for door in (Rest(stack.rest), Native(stack.channel)):
            for rpc, headers, _ in kinds:
                codes.append((await door.call(rpc, None, **headers)).code)
        assert codes.index("rate_limited") == LIMIT
        assert set(codes[LIMIT:]) == {"rate_limited"}


async def test_who_is_known_goes_on(rested: tuple[Stack, Customer], gate: Door) -> None:
    """Where strangers are refused, valid tokens and logins from the same address are not, nor do they count."""
    _, customer = rested
    login = {"cookie": customer.cookie, "sec_fetch_site": "same-origin"}
    token = {"authorization": f"Bearer {customer.token}"}
    for headers in (token, login) * LIMIT:
        assert (await gate.call("ListDatabases", None, **headers)).code == "ok"
    codes = [(await gate.call("ListDatabases")).code for _ in range(2 * LIMIT)]
    assert codes == ["unauthenticated"] * LIMIT + ["rate_limited"] * LIMIT
    for headers in (token, login):
        assert (await gate.call("ListDatabases", None, **headers)).code == "ok"
        assert (await gate.call("GetDatabase", {"name": "nowhere"}, **headers)).code == "not_found"


async def test_of_many_strangers_at_once_exactly_the_limit_passes(rested: tuple[Stack, Customer], gate: Door) -> None:
    """Of fifty requests at the same time from one address, five are answered, and the others refused for the rate."""
    assert rested
    answers = await asyncio.gather(*(gate.call("GetOpenApi") for _ in range(50)))
    assert Counter(answer.code for answer in answers) == {"ok": LIMIT, "rate_limited": 50 - LIMIT}


async def test_an_address_may_come_again(strict: tuple[Stack, Customer, MovableClock], gate: Door) -> None:
    """What was refused does not count, so after a minute an address has all of its limit again."""
    _, _, clock = strict
    for _ in range(2):
        codes = [(await gate.call("ListDatabases")).code for _ in range(3 * LIMIT)]
        assert codes == ["unauthenticated"] * LIMIT + ["rate_limited"] * 2 * LIMIT
        clock.let_pass(seconds=60)


async def test_another_address_is_not_affected(rested: tuple[Stack, Customer]) -> None:
    """An address that asks too often takes nothing from another, and no header makes it another."""
    stack, _ = rested
    here = Rest(stack.rest)
    for _ in range(LIMIT):
        assert (await here.call("GetOpenApi")).code == "ok"
    forged: dict[str, Any] = dict.fromkeys(
        ("x_forwarded_for", "x_real_ip", "forwarded", "x_htx_client_ip"), "127.0.0.2"
    )
    assert (await here.call("GetOpenApi", None, **forged)).code == "rate_limited"
    transport = httpx.AsyncHTTPTransport(local_address="127.0.0.2")
    async with httpx.AsyncClient(base_url=stack.rest.base_url, transport=transport, timeout=30) as client:
        codes = [(await Rest(client).call("GetOpenApi")).code for _ in range(LIMIT + 1)]
    assert codes == ["ok"] * LIMIT + ["rate_limited"]


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("203.0.113.8", "203.0.113.8"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff:ffff:ffff:ffff", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("2001:0DB8:0001:0002::1", "2001:db8:1:2::/64"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("::1", "::/64"),
        ("", ""),
        ("somewhere", "somewhere"),
    ],
)
def test_whom_an_address_counts_for(address: str, network: str) -> None:
    """An IPv4 address is counted by itself, mapped ones too, and IPv6 by the /64 that a subscriber has to himself."""
    assert network_of(address) == network
