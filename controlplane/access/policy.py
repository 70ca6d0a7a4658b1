"""Whether a caller may call an RPC: the rule that stands beside it in the proto, and nothing else."""

from controlplane.access.caller import Caller
from controlplane.access.permissions import permits
from controlplane.errors import LoginRequired, PortalError, ScopeDenied, Unauthenticated
from controlplane.rpc.contract import Rpc


def check_policy(rpc: Rpc, caller: Caller | None) -> None:
    """Raise Unauthenticated, LoginRequired or ScopeDenied unless the RPC's rule lets the caller in."""
    denial = _denial(rpc, caller)
    if denial is not None:
        raise denial


def _denial(rpc: Rpc, caller: Caller | None) -> PortalError | None:
    rule = rpc.access.WhichOneof("rule")
    if rule == "public":
        return None
    if caller is None:
        return Unauthenticated()
    if rule == "authenticated":
        return None
    if rule == "login":
        return None if caller.kind == "session" else LoginRequired()
    if rule == "permission" and permits(caller.permissions, rpc.access.permission):
        return None
    return ScopeDenied(rpc.access.permission, scope=caller.scope, held=caller.permissions)
