"""Permissions as `resource:action`, and the scopes that are names for sets of them."""

from collections.abc import Set as AbstractSet
from functools import cache

from controlplane.rpc.contract import rpcs

PRODUCTS = ("databases", "functions", "proxies")
SCOPES = ("full", "read", *PRODUCTS)
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
    reads = {needed for needed in _all_permissions() if needed.partition(":")[2] in _READING}
    return frozenset(reads | ({f"{scope}:*"} if scope in PRODUCTS else set()))


def permits(held: AbstractSet[str], needed: str) -> bool:
    """Tell whether the permissions held include the one needed."""
    resource = needed.partition(":")[0]
    return needed in held or f"{resource}:*" in held or EVERYTHING in held


def _all_permissions() -> set[str]:
    return {rpc.access.permission for rpc in rpcs().values() if rpc.access.permission}
