"""Permissions as `resource:action`, and the scopes that are names for sets of them."""

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from functools import cache

from controlplane.rpc.contract import rpcs

PRODUCTS = ("databases", "functions", "proxies")
SCOPES = ("full", "read", *PRODUCTS)
CUSTOM = "custom"  # in place of a scope: permissions that have no name
EVERYTHING = "*:*"
_READING = {"get", "list"}


@cache
def permissions_of(scope: str | None) -> frozenset[str]:
    """Return the permissions that a scope stands for.

    `full`, and a token stored before there were scopes: everything. `read`: whatever gets or lists. A product's scope:
    all of that product, and reading the rest.
    """
    if scope is None or scope == "full":
        return frozenset({EVERYTHING})
    reads = {needed for needed in known_permissions() if needed.partition(":")[2] in _READING}
    return frozenset(reads | ({f"{scope}:*"} if scope in PRODUCTS else set()))


def permits(held: AbstractSet[str], needed: str) -> bool:
    """Tell whether the permissions held include the one needed."""
    resource = needed.partition(":")[0]
    return needed in held or f"{resource}:*" in held or EVERYTHING in held


@cache
def known_permissions() -> frozenset[str]:
    """Return every permission that some RPC needs."""
    return frozenset(rpc.access.permission for rpc in rpcs().values() if rpc.access.permission)


def unknown_among(wanted: Iterable[str]) -> list[str]:
    """Return those of the permissions wanted that would permit nothing, as no RPC needs anything of the kind."""
    return [each for each in wanted if not any(permits({each}, needed) for needed in known_permissions())]


def reach_of(held: AbstractSet[str]) -> frozenset[str]:
    """Return every permission that some RPC needs and that is included in those held."""
    return frozenset(needed for needed in known_permissions() if permits(held, needed))


def includes(held: AbstractSet[str], others: AbstractSet[str]) -> bool:
    """Tell whether the permissions held permit all that the others do, also what no RPC needs yet."""
    return all(permits(held, each) for each in others)


def narrower_scope(held: AbstractSet[str], used: AbstractSet[str]) -> str | None:
    """Return the narrowest scope that includes all that was used, if it permits less than what is held."""
    fitting = [
        scope
        for scope in SCOPES
        if includes(permissions_of(scope), used)
        and includes(held, permissions_of(scope))
        and not includes(permissions_of(scope), held)
    ]
    return min(fitting, key=lambda scope: len(reach_of(permissions_of(scope))), default=None)
