"""Who is calling: an account, by a token or by a browser login."""

from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Caller:
    """An account and the credential that it came with.

    `networks` are where the credential may be used from, everywhere when empty; `rate_limit` is in requests per 60
    seconds; `expires_at` is when the credential ends, if it does.
    """

    account_id: str
    plan: str
    kind: Literal["token", "session"]
    credential_id: str
    scope: str
    permissions: frozenset[str]
    networks: tuple[Network, ...]
    rate_limit: int
    expires_at: datetime | None
