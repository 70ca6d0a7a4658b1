"""Who gets on: the credential, where it comes from, how often, and what it permits."""

from controlplane.access.allowlist import is_allowed, network_of
from controlplane.access.caller import Caller
from controlplane.access.credentials import Credentials
from controlplane.access.policy import check_policy
from controlplane.access.rate import Limiter
from controlplane.access.same_site import check_same_site
from controlplane.access.uses import Uses
from controlplane.clock import Clock
from controlplane.errors import IpDenied, RateLimited, Unauthenticated
from controlplane.rpc.call import Call


class Admission:
    """Asks everything that stands between a caller and what he asks for, in its order."""

    def __init__(
        self, *, credentials: Credentials, limiter: Limiter, uses: Uses, clock: Clock, anonymous_rate_limit: int
    ) -> None:
        self._credentials = credentials
        self._limiter = limiter
        self._uses = uses
        self._clock = clock
        self._anonymous_rate_limit = anonymous_rate_limit

    async def admit(self, call: Call, *, account_id: str | None = None) -> None:
        """Let a call go on, and count it; with an account, by a credential of that account only.

        Raises Unauthenticated, IpDenied, RateLimited, ScopeDenied, LoginRequired or CrossSite.
        """
        if call.rpc.access.public:
            await self._count_address(call, "public", of="requests without a credential")
        else:
            try:
                caller = await self.identify(call, account_id=account_id)
            except (Unauthenticated, IpDenied) as error:
                if isinstance(error, IpDenied) and call.presented is not None:
                    await self._count(call, call.presented, cost=0)
                await self._count_address(call, "refused", of="requests without a valid credential")
                raise
            await self._count(call, caller)
            call.maybe_caller = caller
        check_policy(call.rpc, call.maybe_caller)
        check_same_site(call)
        self._uses.used(call)

    async def identify(self, call: Call, *, account_id: str | None = None) -> Caller:
        """Return who is calling.

        Raises Unauthenticated for no credential or one that does not hold, IpDenied for one that must not be used from
        where it is.
        """
        caller = call.presented = await self._credentials.find_caller(call.metadata)
        if caller is None or not caller.holds(self._clock.now()):
            raise Unauthenticated
        if account_id is not None and caller.account_id != account_id:
            raise Unauthenticated
        if caller.networks and not is_allowed(call.client_ip, caller.networks):
            raise IpDenied(call.client_ip)
        return caller

    async def _count(self, call: Call, caller: Caller, *, cost: int = 1) -> None:
        """Count a request of a credential, and tell a token how many it has left.

        Raises RateLimited.
        """
        verdict = await self._limiter.hit(caller.credential_id, caller.rate_limit, cost=cost)
        if caller.kind == "token":
            call.headers += (
                ("ratelimit-limit", str(verdict.limit)),
                ("ratelimit-remaining", str(verdict.remaining)),
                ("ratelimit-reset", str(verdict.reset)),
            )
        if cost and not verdict.allowed:
            raise RateLimited(verdict.limit, retry_after=verdict.reset)

    async def _count_address(self, call: Call, kind: str, *, of: str) -> None:
        """Count a request without a valid credential, by the address that it comes from.

        Valid credentials are not counted here, and refused ones apart from logins, so that a whole office is not locked
        out by one program in it. Raises RateLimited.
        """
        verdict = await self._limiter.hit(f"{kind}:{network_of(call.client_ip)}", self._anonymous_rate_limit)
        if not verdict.allowed:
            raise RateLimited(verdict.limit, retry_after=verdict.reset, of=f"{of} from one address")
