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

    `scope` is the name of its permissions, `custom` if they have none. `networks` are where the credential may be used
    from, everywhere when empty; `rate_limit` is in requests per 60 seconds; `expires_at` is when the credential ends,
    if it does. `has_ended` says that it was revoked, or its account disabled; `is_previous` that it is the secret from
    before the last rotation.
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
    has_ended: bool = False
    is_previous: bool = False

    def holds(self, now: datetime) -> bool:
        """Tell whether the credential can be used now."""
        return not self.has_ended and (self.expires_at is None or now < self.expires_at)
