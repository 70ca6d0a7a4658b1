"""`Idempotency-Key`: a POST that is sent twice is done once, and answered twice."""

import asyncio
import base64

import httpx
from sqlmodel import col, select

from controlplane.databases.model import Database
from controlplane.rpc.idempotency import IdempotencyKey
from controlplane.tokens.model import Token
from tests.clock import MovableClock
from tests.doors import Door, read_response
from tests.stack import Customer, Stack

DATABASES, TOKENS = "/api/portal/databases", "/api/portal/tokens"
NEW = {"name": "once", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}


async def create(customer: Customer, key: str, **changed: str) -> httpx.Response:
    """Order a database with a key."""
    return await customer.call("POST", DATABASES, json={**NEW, **changed}, headers={"idempotency-key": key})


async def test_the_same_request_is_done_once(customer: Customer, door: Door) -> None:
    """The second answer is the first one again, marked as such, whatever has become of the resource."""
    headers = {"authorization": f"Bearer {customer.token}", "idempotency_key": "order-1"}
    first = await door.call("CreateDatabase", {"database": NEW}, **headers)
    await customer.until("ready", f"{DATABASES}/once")
    again = await door.call("CreateDatabase", {"database": NEW}, **headers)
    assert (first.code, again.code) == ("ok", "ok")
    assert again.result == first.result
    assert ("idempotent-replayed" in first.headers, again.headers["idempotent-replayed"]) == (False, "true")
    assert again.headers["etag"] == first.headers["etag"]
    assert len((await customer.call("GET", DATABASES)).json()) == 1


async def test_parallel_repetitions_are_one(customer: Customer) -> None:
    """Ten at once make one database: nine of the answers are replays of the tenth."""
    answers = await asyncio.gather(*(create(customer, "at-once") for _ in range(10)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 9
    rows = await customer.stack.server.store.fetch(
        select(Database).where(col(Database.account_id) == customer.account_id)
    )
    assert len(rows) == 1


async def test_another_request_with_the_key_is_refused(customer: Customer, door: Door) -> None:
    """A key stands for one request: another body under it is refused, and is done under a key of its own."""
    headers = {"authorization": f"Bearer {customer.token}"}
    other = {"database": {**NEW, "name": "other"}}
    assert (await door.call("CreateDatabase", {"database": NEW}, idempotency_key="k", **headers)).code == "ok"
    assert (await door.call("CreateDatabase", other, idempotency_key="k", **headers)).code == "idempotency_mismatch"
    assert (await door.call("CreateDatabase", other, idempotency_key="l", **headers)).code == "ok"


async def test_a_key_belongs_to_an_account_and_a_method(stack: Stack) -> None:
    """Another account's request with the same key and body is another request, and so is another method's."""
    one, two = await stack.customer(), await stack.customer()
    made = [(await create(each, "shared")).json()["id"] for each in (one, two)]
    assert made[0] != made[1]
    token = await one.by_login("POST", TOKENS, json={"name": "a"}, headers={"idempotency-key": "shared"})
    assert (token.status_code, "idempotent-replayed" in token.headers) == (201, False)


async def test_a_failed_request_leaves_its_key_free(customer: Customer) -> None:
    """What was refused is not remembered: the same key does the request once nothing is in its way."""
    assert (await create(customer, "first")).status_code == 201
    assert (await create(customer, "second")).status_code == 409
    assert (await create(customer, "second", name="Bad")).status_code == 400
    retried = await create(customer, "second", name="free")
    assert (retried.status_code, "idempotent-replayed" in retried.headers) == (201, False)


async def test_a_validation_leaves_its_key_free(customer: Customer) -> None:
    """A request that was only validated is done when it comes in earnest."""
    headers = {"idempotency-key": "tried"}
    tried = await customer.call("POST", f"{DATABASES}?validate_only=true", json=NEW, headers=headers)
    done = await create(customer, "tried")
    assert (tried.status_code, done.status_code, "idempotent-replayed" in done.headers) == (201, 201, False)


async def test_a_key_lasts_for_a_day(timed: tuple[Stack, MovableClock]) -> None:
    """A key is remembered for 24 hours, and free from then on."""
    stack, clock = timed
    customer = await stack.customer()

    async def send(name: str) -> httpx.Response:
        return await create(customer, "daily", name=name)

    first = await send("day-one")
    clock.let_pass(hours=23, minutes=59)
    assert (await send("day-one")).text == first.text
    assert (await send("day-two")).status_code == 422
    clock.let_pass(minutes=1)
    second = await send("day-two")
    assert (second.status_code, "idempotent-replayed" in second.headers) == (201, False)


async def test_a_replayed_token_is_the_whole_one_and_kept_encrypted(customer: Customer) -> None:
    """Whoever lost the answer to a create of a token gets it again; what is kept of it tells nothing."""
    headers = {"idempotency-key": "token"}
    first, again = [await customer.by_login("POST", TOKENS, json={"name": "ci"}, headers=headers) for _ in range(2)]
    secret = first.json()["token"]
    assert again.json() == first.json()
    assert (await customer.call("GET", "/api/portal/account", token=secret)).status_code == 200
    store = customer.stack.server.store
    mine = col(IdempotencyKey.account_id) == customer.account_id
    (kept,) = await store.fetch(select(IdempotencyKey).where(mine))
    assert len(kept.answer) > 100
    sealed = base64.b64decode(kept.answer.partition(":")[2])
    for told in (secret, first.json()["id"]):
        assert told not in kept.answer
        assert told.encode() not in sealed
    tokens = await store.fetch(select(Token).where(col(Token.account_id) == customer.account_id))
    assert len(tokens) == 2


async def test_a_key_has_a_longest_length(customer: Customer) -> None:
    """A key of 255 characters is taken, a longer one refused by its name; none but a POST looks at it."""
    assert (await create(customer, "k" * 255)).status_code == 201
    refused = read_response(await create(customer, "k" * 256))
    assert (refused.code, list(refused.fields)) == ("invalid_field", ["Idempotency-Key"])
    read = await customer.call("GET", DATABASES, headers={"idempotency-key": "k" * 256})
    assert read.status_code == 200


async def test_a_rotation_is_done_once(customer: Customer) -> None:
    """A rotation that is sent twice with a key rotates once, so the secret that came first goes on working."""
    made = await customer.new_token()
    path, headers = f"{TOKENS}/{made['id']}/rotate", {"idempotency-key": "rotate"}
    secrets = [(await customer.by_login("POST", path, headers=headers)).json()["token"] for _ in range(2)]
    assert secrets[0] == secrets[1] != made["token"]
    assert (await customer.call("GET", "/api/portal/account", token=secrets[0])).status_code == 200
