"""Pages of lists."""

import base64

import pytest

from tests.doors import Native, Rest
from tests.stack import Customer, Stack

TOKENS = "/api/portal/tokens"


@pytest.fixture(scope="module")
async def lister(stack: Stack) -> Customer:
    """A customer with five tokens, which are as good a list as any."""
    customer = await stack.customer()
    for number in range(1, 5):
        await customer.new_token(name=f"t-{number}")
    return customer


@pytest.mark.parametrize("size", [1, 2, 3, 4])
async def test_the_links_lead_through_the_list(lister: Customer, size: int) -> None:
    """Following `Link` gives every item once, oldest first, in pages as large as asked; the last has no link."""
    whole = (await lister.by_login("GET", TOKENS)).json()
    assert [token["name"] for token in whole] == ["test", "t-1", "t-2", "t-3", "t-4"]
    assert [token["created_at"] for token in whole] == sorted(token["created_at"] for token in whole)
    path, pages = f"{TOKENS}?page_size={size}", []
    while path:
        answer = await lister.by_login("GET", path)
        pages.append(answer.json())
        following = answer.links.get("next", {"url": ""})["url"]
        assert following.startswith(f"{TOKENS}?page_size={size}&page_token=") or not following
        path = following
    assert [token for page in pages for token in page] == whole
    assert {len(page) for page in pages[:-1]} == {size}


@pytest.mark.parametrize("size", [0, 5, 6, 1000])
async def test_a_page_with_everything_has_no_link(lister: Customer, size: int) -> None:
    """A page size of none, of as many as there are, and of more give all of them."""
    answer = await lister.by_login("GET", TOKENS, params={"page_size": size})
    assert (len(answer.json()), "link" in answer.headers) == (5, False)


async def test_a_native_caller_gets_the_token_in_the_message(lister: Customer, native: Native) -> None:
    """`next_page_token` leads a native caller on, and the page that it leads to is the one of the link."""
    headers = {"cookie": lister.cookie}
    first = await native.call("ListTokens", {"page_size": 3}, **headers)
    linked = (await lister.by_login("GET", f"{TOKENS}?page_size=3")).links["next"]["url"]
    assert "link" not in first.headers
    token = linked.rpartition("=")[2]
    second = await native.call("ListTokens", {"page_size": 3, "page_token": token}, **headers)
    assert [item["name"] for item in first.result + second.result] == ["test", "t-1", "t-2", "t-3", "t-4"]


async def test_an_item_that_is_made_meanwhile_comes_last(customer: Customer) -> None:
    """What is added or taken away between two pages neither repeats nor hides another item."""
    await customer.create_database("paged")
    path = "/api/portal/databases/paged/backups"

    async def back_up() -> str:
        backup_id: str = (await customer.call("POST", path)).json()["id"]
        await customer.until("completed", f"{path}/{backup_id}")
        return backup_id

    made = [await back_up() for _ in range(3)]
    first = await customer.call("GET", f"{path}?page_size=2")
    await customer.call("DELETE", f"{path}/{made[1]}")
    await customer.until("gone", f"{path}/{made[1]}")
    made.append(await back_up())
    second = await customer.call("GET", first.links["next"]["url"])
    assert [item["id"] for item in first.json() + second.json()] == made


@pytest.mark.parametrize("size", [-1, 1001, 2147483647])
async def test_a_page_size_has_bounds(lister: Customer, stack: Stack, native: Native, size: int) -> None:
    """A size below none or above 1000 is refused by its name."""
    for door in (Rest(stack.rest), native):
        answer = await door.call("ListTokens", {"page_size": size}, cookie=lister.cookie)
        assert (answer.code, list(answer.fields)) == ("invalid_field", ["page_size"])


@pytest.mark.parametrize(
    "token",
    [
        "!",
        "not a token",
        "a",
        "ü",
        "a" * 256,
        base64.urlsafe_b64encode(b"\xff\xfe").decode(),
        base64.urlsafe_b64encode(b"tk_1\x002").decode(),
        base64.urlsafe_b64encode(b"' OR 1=1 --").decode(),
        base64.urlsafe_b64encode(b"a").decode() + "====",
    ],
)
async def test_a_page_token_of_somebody_elses_making(
    lister: Customer, stack: Stack, native: Native, token: str
) -> None:
    """What no list has answered with is refused by its name, or leads to a page of the caller's own items."""
    for door in (Rest(stack.rest), native):
        answer = await door.call("ListTokens", {"page_token": token}, cookie=lister.cookie)
        if answer.code == "ok":
            assert {item["name"] for item in answer.result} <= {"test", "t-1", "t-2", "t-3", "t-4"}
        else:
            assert (answer.code, list(answer.fields)) == ("invalid_field", ["page_token"])
