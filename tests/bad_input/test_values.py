"""Values that no field takes, at both doors: names, sizes, tags, rates."""

from typing import Any

import pytest

from tests.doors import RPCS, Door
from tests.stack import Customer, Stack

NEW = {"name": "good", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}


@pytest.mark.parametrize(
    ("changed", "field", "words"),
    [
        ({"name": "a" * 64}, "name", "pattern"),
        ({"name": "a" * 10_000}, "name", "pattern"),
        ({"name": ""}, "name", "required"),
        ({"name": "Upper"}, "name", "pattern"),
        ({"name": "1st"}, "name", "pattern"),
        ({"name": "-a"}, "name", "pattern"),
        ({"name": "a-"}, "name", "pattern"),
        ({"name": "a_b"}, "name", "pattern"),
        ({"name": "a b"}, "name", "pattern"),
        ({"name": "a\n"}, "name", "pattern"),
        ({"name": "a.b"}, "name", "pattern"),
        ({"name": "../a"}, "name", "pattern"),
        ({"name": "a'; DROP TABLE databases; --"}, "name", "pattern"),
        ({"name": "данные"}, "name", "pattern"),
        ({"name": "数据库"}, "name", "pattern"),
        ({"name": "\u0430nalytics"}, "name", "pattern"),
        ({"name": "a\u0301"}, "name", "pattern"),
        ({"name": "db🐘"}, "name", "pattern"),
        ({"name": "a\u202eb"}, "name", "pattern"),
        ({"engine": "oracle"}, "engine", "postgresql"),
        ({"engine": "PostgreSQL"}, "engine", "postgresql"),
        ({"engine": ""}, "engine", "required"),
        ({"sku": "ch-s-1vcpu-2gb"}, "sku", "is a size for clickhouse, not for postgresql"),
        ({"engine": "clickhouse"}, "sku", "is a size for postgresql, mysql, mongodb, not for clickhouse"),
        ({"sku": "db-xl-none"}, "sku", "/api/portal/skus"),
        ({"sku": "x" * 65}, "sku", "64"),
        ({"region": "atlantis"}, "region", "/api/portal/regions"),
        ({"region": ""}, "region", "1"),
        ({"tags": {"": "v"}}, "tags.", "pattern"),
        ({"tags": {"k": "v" * 256}}, "tags.k", "255"),
        ({"tags": {f"k{number}": "v" for number in range(51)}}, "tags", "50"),
    ],
)
async def test_a_wrong_value_is_said_of_its_field(
    bearer: dict[str, str], door: Door, changed: dict[str, Any], field: str, words: str
) -> None:
    """Wrong names, engines, sizes, regions and tags are refused with their field and what is wrong with it."""
    answer = await door.call("CreateDatabase", {"database": {**NEW, **changed}}, **bearer)
    assert answer.code == "invalid_field"
    fields = {path.removeprefix("database."): error for path, error in answer.fields.items()}
    assert list(fields) == [field]
    assert words in fields[field]


@pytest.mark.parametrize("missing", ["name", "engine", "sku"])
async def test_what_is_required_cannot_go_missing(
    bearer: dict[str, str], somebody: Customer, door: Door, missing: str
) -> None:
    """A body without a required field, or with its name misspelt, is refused by that field's name."""
    body = {name: value for name, value in NEW.items() if name != missing}
    answer = await door.call("CreateDatabase", {"database": body}, **bearer)
    assert (answer.code, [path.rpartition(".")[2] for path in answer.fields]) == ("invalid_field", [missing])
    empties: list[dict[str, Any]] = [{}, {"database": {}}]
    for empty in empties:
        answer = await door.call("CreateDatabase", empty, **bearer)
        assert answer.code in {"invalid_field", "invalid_request"}
    misspelt = await somebody.call("POST", "/api/portal/databases", json={**body, f"{missing}x": "a"})
    assert misspelt.status_code == 400


async def test_an_engine_without_a_cluster_is_refused(bearer: dict[str, str], door: Door) -> None:
    """An engine or a region that has no cluster yet is a conflict that says where to look."""
    for changed in ({"engine": "mysql"}, {"region": "elsewhere"}):
        answer = await door.call("CreateDatabase", {"database": {**NEW, **changed}}, **bearer)
        assert (answer.code, "/api/portal/regions" in answer.sentence) == ("conflict", True)


@pytest.mark.parametrize(
    ("rpc", "request_"),
    [
        ("CreateToken", {"token": {"name": "a\0b"}}),
        ("CreateDatabase", {"database": {**NEW, "tags": {"k": "a\0b"}}}),
        ("UpdateDatabase", {"name": "a", "database": {"tags": {"k": "a\0b"}}}),
        ("CreateSession", {"session": {"email": "a\0b@example.com", "password": "a"}}),
        ("CreateSession", {"session": {"email": "a@example.com", "password": "a\0b"}}),
    ],
)
async def test_no_text_contains_nul(somebody: Customer, door: Door, rpc: str, request_: dict[str, Any]) -> None:
    """A text with U+0000, which not every storage can keep, is refused by all of them."""
    answer = await door.call(rpc, request_, cookie=somebody.cookie, sec_fetch_site="same-origin")
    assert (answer.code, "U+0000" in answer.sentence) == ("invalid_request", True)


@pytest.mark.parametrize("rpc", [name for name, rpc in RPCS.items() if "{name}" in rpc.route])
async def test_a_strange_name_is_only_not_found(bearer: dict[str, str], door: Door, rpc: str) -> None:
    """Names in other scripts or with quotes are looked for and not found; empty and endless ones are refused."""
    more: dict[str, Any] = {"id": "bk_1"} if "{id}" in RPCS[rpc].route else {}
    bodies: dict[str, dict[str, Any]] = {
        "UpdateDatabase": {"database": {}},
        "RestoreBackup": {"database": {"name": "copy"}},
        "UpdateFunction": {"function": {}},
        "UpdateProxy": {"proxy": {}},
    }
    more |= bodies.get(rpc, {})
    for name in ("данные", "🐘", "a'b", "a%20b"):
        answer = await door.call(rpc, {"name": name, **more}, **bearer)
        assert answer.code == "not_found", name
    answer = await door.call(rpc, {"name": "a" * 256, **more}, **bearer)
    assert (answer.code, list(answer.fields)) == ("invalid_field", ["name"])


@pytest.mark.parametrize("value", [17, True, ["a"], {"a": "b"}, {"a": ["b", {"c": None}]}, "v" * 256])
async def test_a_tag_is_a_text(bearer: dict[str, str], door: Door, value: Any) -> None:
    """A tag that is set to anything but a short text, or null to remove it, is refused by the field's name."""
    change = {"name": "a", "database": {"tags": {"k": value}}}
    answer = await door.call("UpdateDatabase", change, **bearer)
    assert (answer.code, next(iter(answer.fields)).removeprefix("database.")) == ("invalid_field", "tags")


async def test_the_largest_rate_is_bounded(stack: Stack, door: Door) -> None:
    """A rate limit as large as its field takes counts as the plan's."""
    customer = await stack.customer()
    token = {"token": {"name": "a", "rate_limit_per_minute": 4294967295}}
    made = await door.call("CreateToken", token, cookie=customer.cookie, sec_fetch_site="same-origin")
    assert (made.code, made.result["rate_limit_per_minute"]) == ("ok", 1_000_000)
