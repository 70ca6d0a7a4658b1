"""A feed as the API shows it."""

from typing import Any

import httpx

from tests.stack import Customer

EVENTS = "/api/portal/events"


async def ask(customer: Customer, **query: Any) -> httpx.Response:
    """Ask for an account's events, and wait as long as the question says."""
    answer = await customer.call("GET", EVENTS, params=query, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


async def feed_of(customer: Customer, **query: Any) -> list[dict[str, Any]]:
    """Return an account's events."""
    events: list[dict[str, Any]] = (await ask(customer, **query)).json()
    return events
