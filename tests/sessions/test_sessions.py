"""What an account sees of its logins, and how it ends them."""

import pytest

from tests.clock import MovableClock
from tests.doors import Door, Native
from tests.stack import PASSWORD, Customer, Stack

LIST = "/api/portal/sessions"
OURS = {"sec_fetch_site": "same-origin"}


async def new_login(stack: Stack, customer: Customer, **headers: str) -> tuple[str, str]:
    """Log in once more; return the login's id and its cookie."""
    who = {"email": customer.email, "password": PASSWORD}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    answer = await stack.rest.post("/api/portal/session", json=who, headers=raw)
    stack.rest.cookies.clear()
    assert answer.status_code == 200, answer.text
    return answer.json()["id"], answer.headers["set-cookie"].partition(";")[0]


async def test_logins_are_listed(stack: Stack, customer: Customer, door: Door) -> None:
    """Each login is listed with its program and its address, oldest first, and the one that asks is marked."""
    phone, _ = await new_login(stack, customer, **{"user-agent": "Phone/1.0 (ä) " + "x" * 300})
    listed = (await door.call("ListSessions", None, cookie=customer.cookie)).result
    mine = (await door.call("GetSession", None, cookie=customer.cookie)).result
    assert [(login["id"], login["current"]) for login in listed] == [(mine["id"], True), (phone, False)]
    assert listed[0] == mine
    assert listed[1]["user_agent"].startswith("Phone/1.0 (")
    assert len(listed[1]["user_agent"]) == 200
    assert {login["last_used_ip"] for login in listed} == {"127.0.0.1"}
    assert {login["email"] for login in listed} == {customer.email}


async def test_a_list_of_logins_has_pages(stack: Stack, customer: Customer, door: Door) -> None:
    """The next page goes on where the one before ended."""
    ids = [(await new_login(stack, customer))[0] for _ in range(2)]
    first = await door.call("ListSessions", {"page_size": 1}, cookie=customer.cookie)
    assert [login["current"] for login in first.result] == [True]
    if door.name == "rest":
        rest = await stack.rest.get(first.headers["link"].partition(">")[0][1:], headers={"cookie": customer.cookie})
        assert [login["id"] for login in rest.json()] == ids[:1]
    everything = await door.call("ListSessions", {"page_size": 3}, cookie=customer.cookie)
    assert ([login["id"] for login in everything.result[1:]], "link" in everything.headers) == (ids, False)


async def test_a_login_is_ended_from_another(stack: Stack, customer: Customer, door: Door) -> None:
    """A login that was ended is refused at once, once only, and the one that ended it goes on."""
    lost, cookie = await new_login(stack, customer)
    mine = {"cookie": customer.cookie, **OURS}
    tried = await door.call("RevokeSession", {"id": lost, "validate_only": True}, **mine)
    assert (tried.code, "set-cookie" in tried.headers) == ("ok", False)
    assert (await door.call("GetSession", None, cookie=cookie)).code == "ok"
    ended = await door.call("RevokeSession", {"id": lost}, **mine)
    assert (ended.result["id"], ended.result["current"], "set-cookie" in ended.headers) == (lost, False, False)
    assert (await door.call("GetSession", None, cookie=cookie)).code == "unauthenticated"
    assert (await door.call("RevokeSession", {"id": lost}, **mine)).code == "not_found"
    assert len((await door.call("ListSessions", None, **mine)).result) == 1


async def test_a_login_ends_itself(customer: Customer, door: Door) -> None:
    """The login that asks may be the one that is ended; the browser forgets its cookie then."""
    mine = {"cookie": customer.cookie, **OURS}
    own = (await door.call("GetSession", None, **mine)).result["id"]
    ended = await door.call("RevokeSession", {"id": own}, **mine)
    assert ended.headers["set-cookie"].startswith("__Host-htx_session=; Max-Age=0; ")
    assert (await door.call("GetSession", None, **mine)).code == "unauthenticated"


async def test_others_logins_are_nobodys_business(stack: Stack, customer: Customer, door: Door) -> None:
    """Another account's login is not listed, and looks as if it were not there; a token ends none."""
    other = await stack.customer()
    theirs = (await other.by_login("GET", "/api/portal/session")).json()["id"]
    mine = {"cookie": customer.cookie, **OURS}
    assert theirs not in {login["id"] for login in (await door.call("ListSessions", None, **mine)).result}
    refused = await door.call("RevokeSession", {"id": theirs}, **mine)
    unknown = await door.call("RevokeSession", {"id": "se_none"}, **mine)
    assert (refused.code, refused.sentence.replace(theirs, "se_none")) == ("not_found", unknown.sentence)
    assert (await other.by_login("GET", "/api/portal/session")).status_code == 200
    by_token = {"authorization": f"Bearer {other.token}"}
    assert (await door.call("RevokeSession", {"id": theirs}, **by_token)).code == "login_required"
    assert (await door.call("ListSessions", None, **by_token)).code == "login_required"


async def test_logins_that_are_over_are_gone(timed: tuple[Stack, MovableClock]) -> None:
    """A login that has ended by itself is not listed and cannot be ended."""
    stack, clock = timed
    customer = await stack.customer()
    old, _ = await new_login(stack, customer)
    clock.let_pass(hours=1)
    assert len((await customer.by_login("GET", LIST)).json()) == 2
    await stack.server.uses.flush()
    clock.let_pass(hours=1)
    assert [login["current"] for login in (await customer.by_login("GET", LIST)).json()] == [True]
    assert (await customer.by_login("DELETE", f"{LIST}/{old}")).status_code == 404


async def test_each_login_is_a_new_one(stack: Stack, customer: Customer) -> None:
    """A login takes over neither the id nor the cookie that the browser had before."""
    before = (await customer.by_login("GET", "/api/portal/session")).json()["id"]
    fixed = "__Host-htx_session=chosen-by-somebody-else"
    logins = [await new_login(stack, customer, cookie=cookie) for cookie in (customer.cookie, fixed)]
    assert len({before, *(login for login, _ in logins)}) == 3
    assert len({customer.cookie, fixed, *(cookie for _, cookie in logins)}) == 4


async def test_a_check_makes_no_login(stack: Stack, customer: Customer, door: Door) -> None:
    """With `validate_only` nobody is logged in or out, and no cookie goes out."""
    who = {"session": {"email": customer.email, "password": PASSWORD}, "validate_only": True}
    mine = {"cookie": customer.cookie, **OURS}
    for rpc, request in (("CreateSession", who), ("DeleteSession", {"validate_only": True})):
        answer = await door.call(rpc, request, **mine)
        assert (answer.code, "set-cookie" in answer.headers) == ("ok", False)
        stack.rest.cookies.clear()
    assert len((await door.call("ListSessions", None, **mine)).result) == 1


async def test_the_oldest_of_too_many_logins_ends(stack: Stack) -> None:
    """An account has at most 50 logins: one more ends the oldest of them."""
    customer = await stack.customer()
    second, cookie = await new_login(stack, customer)
    for _ in range(48):
        _, latest = await new_login(stack, customer)
    assert (await customer.by_login("GET", "/api/portal/session")).status_code == 200
    _, latest = await new_login(stack, customer)
    assert (await customer.by_login("GET", "/api/portal/session")).status_code == 401
    listed = (await stack.rest.get(LIST, headers={"cookie": latest})).json()
    assert (len(listed), listed[0]["id"], listed[-1]["current"]) == (50, second, True)
    assert (await stack.rest.get("/api/portal/session", headers={"cookie": cookie})).status_code == 200


@pytest.mark.parametrize("rpc", ["BeginSession", "FinishSession"])
async def test_without_a_login_of_the_provider_there_is_none(rpc: str, door: Door) -> None:
    """Where no issuer is set, there is no login by OpenID Connect, and the answer says how else."""
    answer = await door.call(rpc)
    assert (answer.code, "set-cookie" in answer.headers) == ("not_found", False)
    assert "/api/portal/session" in answer.sentence


async def test_a_native_caller_is_known_by_its_program(customer: Customer, native: Native) -> None:
    """A native caller's login has the name of its gRPC library."""
    made = await native.call("CreateSession", {"session": {"email": customer.email, "password": PASSWORD}})
    assert made.result["user_agent"].startswith("grpc-")
