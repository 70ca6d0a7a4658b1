"""What can go wrong with a request, one class per reason; `rpc/status.py` turns them into answers.

The sentence is for the caller: it says what went wrong and what to do. What only the operator should know is chained
as the exception's cause and goes to the log.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from grpc import StatusCode


class PortalError(Exception):
    """A request that gets no other answer than why not."""

    status: ClassVar[StatusCode] = StatusCode.INTERNAL
    http: ClassVar[int] = 500
    code: ClassVar[str] = "internal"


@dataclass(frozen=True, slots=True)
class BrokenRule:
    """One field that breaks one rule: its path, and the rule in words."""

    field: str
    error: str


class InvalidRequest(PortalError):
    """The request cannot be read."""

    status = StatusCode.INVALID_ARGUMENT
    http = 400
    code = "invalid_request"


class InvalidField(PortalError):
    """Fields of the request break their rules."""

    status = StatusCode.INVALID_ARGUMENT
    http = 400
    code = "invalid_field"

    def __init__(self, *rules: BrokenRule) -> None:
        super().__init__("; ".join(f"{rule.field}: {rule.error}" if rule.field else rule.error for rule in rules))
        self.rules = rules


class Unauthenticated(PortalError):
    """No credential, or one that does not hold; one sentence for all, so that nobody learns which."""

    status = StatusCode.UNAUTHENTICATED
    http = 401
    code = "unauthenticated"

    def __init__(self) -> None:
        super().__init__(
            "Unauthorized: send a valid API token as 'Authorization: Bearer htx_…', or log in at /api/portal/session."
        )


class BadLogin(PortalError):
    """Somebody who cannot be logged in; of an address and a password, which of them is wrong is not said."""

    status = StatusCode.UNAUTHENTICATED
    http = 401
    code = "unauthenticated"

    def __init__(self, sentence: str = "The email address or the password is wrong.") -> None:
        super().__init__(sentence)


class QuotaExceeded(PortalError):
    """The plan allows no more of this."""

    status = StatusCode.RESOURCE_EXHAUSTED
    http = 402
    code = "quota_exceeded"

    def __init__(self, kind: str, *, limit: int, used: int) -> None:
        super().__init__(
            f"Plan quota reached: {used} of {limit} {kind} in use. Delete one, or ask for a plan with more."
        )
        self.kind, self.limit, self.used = kind, limit, used


class ScopeDenied(PortalError):
    """The token's scope does not permit the call."""

    status = StatusCode.PERMISSION_DENIED
    http = 403
    code = "scope_denied"

    def __init__(self, needed: str, *, scope: str, held: Collection[str] = ()) -> None:
        has = f"the scope '{scope}'" if scope != "custom" else f"the permissions {', '.join(sorted(held))}"
        super().__init__(f"Token scope does not permit this: it needs {needed}, and the token has {has}.")
        self.needed, self.scope = needed, scope


class IpDenied(PortalError):
    """The token may not be used from this address."""

    status = StatusCode.PERMISSION_DENIED
    http = 403
    code = "ip_denied"

    def __init__(self, address: str) -> None:
        super().__init__(f"This token may not be used from {address}, which is not on its list of addresses.")


class LoginRequired(PortalError):
    """A token where only a login will do."""

    status = StatusCode.PERMISSION_DENIED
    http = 403
    code = "login_required"

    def __init__(self) -> None:
        super().__init__("An API token may not do this: log in at /api/portal/session.")


class CrossSite(PortalError):
    """A write with a cookie that did not come from our own page."""

    status = StatusCode.PERMISSION_DENIED
    http = 403
    code = "cross_site"

    def __init__(self) -> None:
        super().__init__(
            "A write with a session cookie must come from this site: send its address as the Origin header."
        )


class NotFound(PortalError):
    """No such resource in this account; another account's looks the same."""

    status = StatusCode.NOT_FOUND
    http = 404
    code = "not_found"

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"There is no {kind} '{name}'.")


class NoProviderLogin(PortalError):
    """The provider has no login of its own, by which one could log in here."""

    status = StatusCode.NOT_FOUND
    http = 404
    code = "not_found"

    def __init__(self) -> None:
        super().__init__(
            "There is no login by OpenID Connect here: log in with an email address and a password at"
            " /api/portal/session."
        )


class AlreadyExists(PortalError):
    """The name is taken."""

    status = StatusCode.ALREADY_EXISTS
    http = 409
    code = "already_exists"

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"There is already a {kind} '{name}': choose another name, or delete that one first.")


class Conflict(PortalError):
    """The resource's state forbids it."""

    status = StatusCode.ABORTED
    http = 409
    code = "conflict"


class Stale(PortalError):
    """`If-Match` does not hold: the resource has changed since it was read."""

    status = StatusCode.FAILED_PRECONDITION
    http = 412
    code = "stale"

    def __init__(self, etag: str) -> None:
        super().__init__(f"The resource has changed: its ETag is {etag} now. Read it again, then repeat the change.")


class TooLarge(PortalError):
    """The request is larger than is accepted."""

    status = StatusCode.INVALID_ARGUMENT
    http = 413
    code = "too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request is too large: at most {limit} bytes are accepted.")


class IdempotencyMismatch(PortalError):
    """The idempotency key was used before, with another request."""

    status = StatusCode.FAILED_PRECONDITION
    http = 422
    code = "idempotency_mismatch"

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used before with another request: use a new key for a new request.")


class RateLimited(PortalError):
    """More requests than the limit allows."""

    status = StatusCode.RESOURCE_EXHAUSTED
    http = 429
    code = "rate_limited"

    def __init__(self, limit: int, *, retry_after: int, of: str = "requests", within: str = "60 seconds") -> None:
        super().__init__(f"Rate limit exceeded: at most {limit} {of} in {within}. Retry in {retry_after} s.")
        self.retry_after = retry_after


class TooManyCalls(RateLimited):
    """The function runs as many calls as it may."""

    code = "too_many_calls"

    def __init__(self, sentence: str, *, retry_after: int) -> None:
        PortalError.__init__(self, sentence)
        self.retry_after = retry_after


class TimedOut(PortalError):
    """The function has not answered in time."""

    status = StatusCode.DEADLINE_EXCEEDED
    http = 504
    code = "timeout"


class Unavailable(PortalError):
    """Something that the request needs does not answer; it may later."""

    status = StatusCode.UNAVAILABLE
    http = 503
    code = "unavailable"

    def __init__(self) -> None:
        super().__init__("The service cannot answer right now. Retry in a moment.")
        self.retry_after = 1
