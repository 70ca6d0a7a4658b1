"""What a scope stands for."""

import pytest

from controlplane.access.permissions import SCOPES, includes, narrower_scope, permissions_of, permits, unknown_among

READS = {
    "databases:list",
    "databases:get",
    "functions:list",
    "proxies:list",
    "catalog:list",
    "account:get",
    "audit:list",
    "events:list",
}
DATABASE_WRITES = {f"databases:{action}" for action in ("create", "update", "delete", "backup", "connect")}


@pytest.mark.parametrize("scope", ["full", None])
def test_full_is_everything(scope: str | None) -> None:
    """The full scope, and none at all, permit whatever there is and will be."""
    assert all(permits(permissions_of(scope), needed) for needed in (*READS, *DATABASE_WRITES, "registry:delete"))


@pytest.mark.parametrize("scope", [scope for scope in SCOPES if scope != "full"])
def test_every_scope_reads_and_only_its_own_product_writes(scope: str) -> None:
    """A token reads everything; it writes what its scope is named after, and nothing when that is `read`."""
    held = permissions_of(scope)
    assert all(permits(held, needed) for needed in READS)
    assert {needed for needed in DATABASE_WRITES if permits(held, needed)} == (
        DATABASE_WRITES if scope == "databases" else set()
    )
    assert permits(held, "functions:deploy") == (scope == "functions")
    assert permits(held, "proxies:create") == (scope == "proxies")
    assert not permits(held, "tokens:create")


def test_permissions_match_as_they_are_written() -> None:
    """A permission holds for itself, a star for all actions of one resource, and nothing by its beginning."""
    assert permits({"databases:get"}, "databases:get")
    assert permits({"databases:*"}, "databases:get")
    assert permits({"*:*"}, "databases:get")
    assert not permits({"databases:get"}, "databases:delete")
    assert not permits({"data:*", "databases", "*", "*:get", "databases:g"}, "databases:get")
    assert not permits(set(), "databases:get")


def test_what_permits_nothing_is_unknown() -> None:
    """A permission or a star that no RPC needs anything of is unknown; what needs a login is."""
    known = ["databases:list", "databases:*", "functions:*", "*:*"]
    assert unknown_among([*known, "databases:drop", "volumes:*", "tokens:create", "tokens:*", "*:list"]) == [
        "databases:drop",
        "volumes:*",
        "tokens:create",
        "tokens:*",
        "*:list",
    ]


def test_a_star_includes_what_is_yet_to_come() -> None:
    """All of a resource is more than each of its actions of today, and everything is more than all resources."""
    today = DATABASE_WRITES | READS
    assert includes({"databases:*"}, DATABASE_WRITES)
    assert not includes(today, {"databases:*"})
    assert includes({"*:*"}, {"databases:*", "*:*"})
    assert not includes(permissions_of("databases"), permissions_of("full"))


@pytest.mark.parametrize(
    ("held", "used", "narrower"),
    [
        ("full", {"databases:list"}, "read"),
        ("full", {"databases:delete"}, "databases"),
        ("functions", {"databases:list"}, "read"),
        ("databases", {"databases:get"}, "read"),
        ("databases", {"databases:delete"}, None),
        ("read", {"databases:list"}, None),
    ],
)
def test_the_narrowest_scope_is_found(held: str, used: set[str], narrower: str | None) -> None:
    """Of the scopes that would do, it is the one that permits least, and only if that is less than what is held."""
    assert narrower_scope(permissions_of(held), used) == narrower
