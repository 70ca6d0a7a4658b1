"""What a proxy can be ordered to become, and what is true once it has, on a real host that carries connections."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Any, ClassVar

from google.protobuf.struct_pb2 import NULL_VALUE, Value
from sqlmodel import select

from controlplane.api.v1 import proxies_pb2
from controlplane.proxies.host.host import ProxyHost
from controlplane.proxies.model import Proxy
from tests.faults.hosted import HostedLife, check_hosted, unless_gone
from tests.faults.installation import Installation
from tests.faults.transitions import Transition
from tests.proxies.socks import lets_in

_ELSEWHERE = "203.0.113.9"
_TO_BE_ARMED = timedelta(seconds=0.5)


@dataclass
class ProxyLife(HostedLife):
    """A proxy, which is tried by connections to the port `target` of this machine.

    `way_in` is the last answer with a password, and `old_way_in` the one before it.
    """

    kind: ClassVar[str] = "proxy"

    target: int = 0
    way_in: proxies_pb2.Proxy = field(default_factory=proxies_pb2.Proxy)
    old_way_in: proxies_pb2.Proxy | None = None
    allowed_ips: list[str] = field(default_factory=list)

    async def call(self, method: str, request: Any) -> Any:
        """Call a method of the service by its name."""
        return await self.ask(self.installation.proxies, method, request)

    async def check(self, *, status: str = "ready", lets_in: bool = True) -> None:
        """Check the proxy's state, and whether its customer gets in here."""
        found = await self.call("GetProxy", proxies_pb2.GetProxyRequest(name=self.name))
        assert (found.status, found.observed_generation) == (status, found.generation), found
        assert (found.id, found.username) == (self.way_in.id, self.way_in.username), found
        assert list(found.allowed_ips) == self.allowed_ips, found
        assert not found.HasField("progress"), found
        await self.check_way_in(self.way_in, lets_in=lets_in)

    async def check_way_in(self, way_in: proxies_pb2.Proxy, *, lets_in: bool) -> None:
        """Check whether somebody gets in this way."""
        assert await _gets_in(way_in, self.target) == lets_in


def check_on(host: ProxyHost) -> Callable[[Installation], Awaitable[None]]:
    """Return the check of an installation with this host."""

    async def check(installation: Installation) -> None:
        await check_hosted(installation)
        held = [each.credential for each in host._credentials._by_username.values()]  # noqa: SLF001 - no door shows it
        assert {each.id: (each.salt, each.password_digest, each.networks, each.expires_at) for each in held} == {
            row.id: (row.salt, row.password_digest, tuple(map(ip_network, row.allowed_ips)), row.expires_at)
            for row in await installation.store.fetch(select(Proxy))
        }

    return check


async def begin(life: ProxyLife) -> None:
    """Let a life begin."""
    await life.undisturbed(_create, _is_created)


async def _create(life: ProxyLife) -> None:
    wanted = proxies_pb2.CreateProxy(name=life.name)
    life.way_in = await life.call("CreateProxy", proxies_pb2.CreateProxyRequest(proxy=wanted))


async def _is_created(life: ProxyLife) -> None:
    await life.check()
    await life.check_told("create ready")


async def _shut(life: ProxyLife) -> None:
    await _allow(life, _ELSEWHERE)


async def _is_shut(life: ProxyLife) -> None:
    life.allowed_ips = [_ELSEWHERE]
    await life.check(lets_in=False)
    await _check_changed(life)


async def _have_open(life: ProxyLife) -> None:
    await life.undisturbed(_open, _is_open)


async def _open(life: ProxyLife) -> None:
    await _allow(life)


async def _is_open(life: ProxyLife) -> None:
    life.allowed_ips = []
    await life.check()
    await _check_changed(life)


async def _allow(life: ProxyLife, *addresses: str) -> None:
    wanted = Value()
    wanted.list_value.SetInParent()  # it may be empty
    wanted.list_value.extend(addresses)
    await _change(life, proxies_pb2.UpdateProxy(allowed_ips=wanted))


async def _change(life: ProxyLife, wanted: proxies_pb2.UpdateProxy) -> None:
    await life.call("UpdateProxy", proxies_pb2.UpdateProxyRequest(name=life.name, proxy=wanted))


async def _check_changed(life: ProxyLife) -> None:
    """Check what the feed tells; to want what is there already is an order like any other."""
    await life.check_told("update ready", again="update ready")


async def _rotate(life: ProxyLife) -> None:
    request = proxies_pb2.RotateProxyPasswordRequest(name=life.name)
    life.old_way_in, life.way_in = life.way_in, await life.call("RotateProxyPassword", request)


async def _has_new_password(life: ProxyLife) -> None:
    assert life.old_way_in is not None
    assert life.old_way_in.password != life.way_in.password
    await life.check_way_in(life.old_way_in, lets_in=False)
    await life.check()
    await life.check_told("proxy_password.rotate ready")


async def _have_little_time(life: ProxyLife) -> None:
    """Let the proxy be ready, and expire soon; later on a machine that is too slow to have it ready by then."""
    for seconds in (1, 2, 4, 8):
        await life.begin_order()
        expires_at = datetime.now(UTC) + timedelta(seconds=seconds)
        await _change(life, proxies_pb2.UpdateProxy(expires_at=Value(string_value=expires_at.isoformat())))
        await life.installation.rest()
        if datetime.now(UTC) < expires_at - _TO_BE_ARMED:
            return
    raise AssertionError("the machine is too slow")


async def _let_it_expire(life: ProxyLife) -> None:
    """Order nothing: wait until the time is over."""
    (row,) = await life.installation.store.fetch(select(Proxy))
    left = row.expires_at - datetime.now(UTC)
    await asyncio.sleep(max(left.total_seconds(), 0))


async def _is_expired(life: ProxyLife) -> None:
    await life.check(status="expired", lets_in=False)
    await life.check_told("expired")


async def _have_no_end(life: ProxyLife) -> None:
    async def order(life: ProxyLife) -> None:
        await _change(life, proxies_pb2.UpdateProxy(expires_at=Value(null_value=NULL_VALUE)))

    await life.undisturbed(order, ProxyLife.check)


async def _delete(life: ProxyLife) -> None:
    await unless_gone(life.call("DeleteProxy", proxies_pb2.DeleteProxyRequest(name=life.name)))


async def _is_deleted(life: ProxyLife) -> None:
    await _is_gone(life)
    await life.check_told("delete deleted")


async def _is_deleted_early(life: ProxyLife) -> None:
    await _is_gone(life)
    await life.check_told("(ready )?delete deleted")


async def _is_gone(life: ProxyLife) -> None:
    assert not await unless_gone(life.call("GetProxy", proxies_pb2.GetProxyRequest(name=life.name)))
    await life.check_way_in(life.way_in, lets_in=False)


async def _have_deleted(life: ProxyLife) -> None:
    await life.undisturbed(_delete, _is_deleted)


async def _gets_in(way_in: proxies_pb2.Proxy, target: int) -> bool:
    shown = {name: getattr(way_in, name) for name in ("host", "port", "username", "password")}
    return await lets_in(shown, target)


TRANSITIONS = (
    Transition(name="create", order=_create, check=_is_created, bring_back=_have_deleted, is_own=True),
    Transition(name="allowlist", order=_shut, check=_is_shut, bring_back=_have_open),
    Transition(name="new password", order=_rotate, check=_has_new_password),
    Transition(
        name="expire", prepare=_have_little_time, order=_let_it_expire, check=_is_expired, bring_back=_have_no_end
    ),
    Transition(name="delete", prepare=begin, order=_delete, check=_is_deleted, is_own=True),
    Transition(name="delete early", prepare=_create, order=_delete, check=_is_deleted_early, is_own=True),
)
