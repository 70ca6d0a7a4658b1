"""Reads whose answer may be remembered until something is committed."""

from collections.abc import Callable
from typing import Any, TypeVar

MethodT = TypeVar("MethodT", bound=Callable[..., Any])


def remembered(method: MethodT) -> MethodT:
    """Mark a servicer's read: its answer follows from the account, the request and the database, and nothing else.

    So neither from the credential nor from the clock, nor from what a cluster says. The interceptor then gives the same
    bytes again for as long as nothing was committed; where the store cannot tell (PostgreSQL), it asks every time.
    """
    method.remembered = True  # type: ignore[attr-defined]
    return method


def is_remembered(method: Callable[..., Any]) -> bool:
    """Tell whether a servicer's method is so marked."""
    return getattr(method, "remembered", False)
