"""ETags and `If-Match`: a change made on stale knowledge is refused."""

import asyncio

import httpx
import pytest

from tests.doors import Native
from tests.stack import Customer

DATABASES, TOKENS = "/api/portal/databases", "/api/portal/tokens"
NEW = {"name": "tagged", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}


async def change(customer: Customer, match: str | None, **wanted: object) -> httpx.Response:
    """Change the database if it is the version that is named."""
    headers = {} if match is None else {"if-match": match}
    return await customer.call("PATCH", f"{DATABASES}/tagged", json=wanted, headers=headers)


async def test_an_etag_stands_for_one_version(customer: Customer, native: Native) -> None:
    """Create, read and change show it; it stays while nothing is ordered, and is another after each order."""
    made = await customer.call("POST", DATABASES, json=NEW)
    etag = made.headers["etag"]
    assert etag.startswith(f'"{made.json()["id"]}.')
    await customer.until("ready", f"{DATABASES}/tagged")
    read = await customer.call("GET", f"{DATABASES}/tagged")
    by_native = await native.call("GetDatabase", {"name": "tagged"}, authorization=f"Bearer {customer.token}")
    assert read.headers["etag"] == by_native.headers["etag"] == etag
    changed = await change(customer, etag, deletion_protection=True)
    assert (changed.status_code, changed.headers["etag"] == etag) == (200, False)
    stale = await change(customer, etag, deletion_protection=False)
    assert (stale.status_code, changed.headers["etag"] in stale.json()["error"]) == (412, True)
    refused = await native.call(
        "DeleteDatabase", {"name": "tagged"}, authorization=f"Bearer {customer.token}", if_match=etag
    )
    assert refused.code == "stale"
    assert (await change(customer, changed.headers["etag"], deletion_protection=False)).status_code == 200


@pytest.mark.parametrize(
    ("match", "status"),
    [
        (None, 200),
        ("*", 200),
        ("{}", 200),
        ('"other.1", {}', 200),
        ("{},", 200),
        ('"other.1"', 412),
        ("W/{}", 412),
        ("", 412),
        ("tagged", 412),
        ('"db_1.1", "db_2.2"', 412),
    ],
)
async def test_if_match_names_versions(customer: Customer, match: str | None, status: int) -> None:
    """A star stands for any version, a list for each of its versions; a weak one never matches."""
    etag = (await customer.call("POST", DATABASES, json=NEW)).headers["etag"]
    answer = await change(customer, match if match is None else match.format(etag), deletion_protection=True)
    assert answer.status_code == status
    if status == 412:
        kept = await customer.call("GET", f"{DATABASES}/tagged")
        assert (kept.headers["etag"], kept.json()["deletion_protection"]) == (etag, False)


async def test_one_of_several_changes_at_once_wins(customer: Customer) -> None:
    """Of ten changes that were made on the same knowledge, one is done."""
    etag = (await customer.call("POST", DATABASES, json=NEW)).headers["etag"]
    answers = await asyncio.gather(*(change(customer, etag, tags={"n": str(number)}) for number in range(10)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200] + [412] * 9
    done = next(answer for answer in answers if answer.status_code == 200)
    kept = await customer.call("GET", f"{DATABASES}/tagged")
    assert (kept.headers["etag"], kept.json()["tags"]) == (done.headers["etag"], done.json()["tags"])


async def test_tokens_have_etags_too(customer: Customer) -> None:
    """A rotation or a revocation on stale knowledge is refused."""
    made = await customer.new_token()
    path = f"{TOKENS}/{made['id']}"
    etag = (await customer.by_login("GET", path)).headers["etag"]
    match = {"if-match": etag}
    rotated = await customer.by_login("POST", f"{path}/rotate", headers=match)
    assert (rotated.status_code, rotated.headers["etag"] == etag) == (200, False)
    for method, where in (("POST", f"{path}/rotate"), ("DELETE", path)):
        assert (await customer.by_login(method, where, headers=match)).status_code == 412
    assert (await customer.by_login("GET", path)).json()["status"] == "active"
