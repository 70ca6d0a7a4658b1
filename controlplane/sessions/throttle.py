"""How often a password may be guessed."""

from collections.abc import Awaitable, Callable

from controlplane.access.allowlist import network_of
from controlplane.access.rate import Limiter, Verdict
from controlplane.errors import RateLimited
from controlplane.keys import Keys

WINDOW = 15 * 60.0  # seconds
PER_PAIR = 5
PER_ACCOUNT = 20


class LoginThrottle:
    """Limits wrong passwords, for an account by the email address that was typed, whether there is one or not.

    In any 15 minutes

    - one network address (of IPv6 a /64) can be wrong 5 times about one account, and `failed_login_limit` times in all;
    - once an account has had 20 wrong passwords, from wherever, an address can be wrong about it only once.

    Addresses do not use up each other's tries, so nobody is locked out of an account by others who guess at it: the
    right password works at once from an address that has not been wrong. That also means that whoever has many
    addresses has one guess for each of them; this slows him down and does not stop him.

    A guess counts from before it is checked until it has proved right, so guesses in parallel are all counted; and
    right ones, if somebody sends more of them at once than he may be wrong. A refused guess is not checked and does not
    count. Servers that share their counts let nobody in while these cannot be had.
    """

    def __init__(self, *, limiter: Limiter, keys: Keys, failed_login_limit: int) -> None:
        self._limiter = limiter
        self._keys = keys
        self._per_address = failed_login_limit

    async def guess(self, email: str, address: str, check: Callable[[], Awaitable[bool]]) -> bool:
        """Return what `check` says of a password that somebody at `address` gave for the account `email`.

        `email` is in lower case. Raises RateLimited without a check; or Unavailable.
        """
        counted, wrong = list[str](), False
        try:
            await self._count(email, address, counted)
            wrong = not await check()
        finally:
            if not wrong:
                for key in counted:
                    await self._limiter.forgive(key)
        return not wrong

    async def _count(self, email: str, address: str, counted: list[str]) -> None:
        """Count a guess as wrong, and note under which keys.

        Raises RateLimited or Unavailable.
        """
        # Keyed: who reads the shared counts learns no addresses of customers.
        account, network = self._keys.digest(f"login {email}"), network_of(address)
        is_attacked = not (await self._hit(f"logins:account:{account}", PER_ACCOUNT, counted)).allowed
        for key, limit in (
            (f"logins:pair:{account}:{network}", 1 if is_attacked else PER_PAIR),
            (f"logins:address:{network}", self._per_address),
        ):
            verdict = await self._hit(key, limit, counted)
            if not verdict.allowed:
                raise RateLimited(limit, retry_after=verdict.reset, of="failed logins", within="15 minutes")

    async def _hit(self, key: str, limit: int, counted: list[str]) -> Verdict:
        verdict = await self._limiter.hit(key, limit, window=WINDOW, fail_closed=True)
        if verdict.allowed:
            counted.append(key)
        return verdict
