"""What an operator does with hosts: take one into service, list them, and take one out again."""

import re
from collections.abc import Sequence

from sqlalchemy import delete, update
from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from controlplane.access.secrets import new_host_secret
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.hosts.kinds import PROXIES
from controlplane.hosts.model import Host
from controlplane.ids import new_id
from controlplane.keys import Keys
from controlplane.operator_error import OperatorError
from controlplane.proxies.model import Proxy
from controlplane.sql import Store

_NAME = re.compile("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")
_LAST_PORT = 65535


class HostError(OperatorError):
    """A host cannot be taken into service or out of it; the message says why."""


async def add_host(
    store: Store,
    catalog: Catalog,
    clock: Clock,
    keys: Keys,
    *,
    kind: str,
    name: str,
    region: str,
    address: str = "",
    capacity: int = 1000,
) -> tuple[Host, str]:
    """Take a host into service; return it and its secret, which is kept nowhere.

    `address` is where customers reach a host of proxies, as host:port; a host of functions tells its own. Raises
    HostError for what cannot be.
    """
    if _NAME.fullmatch(name) is None:
        raise HostError(f"'{name}' is no name for a host: use up to 63 lower-case letters, digits and hyphens.")
    if not catalog.has_region(region):
        raise HostError(f"There is no region '{region}': the catalogue has {_listed(catalog)}.")
    if kind == PROXIES:
        match = _ADDRESS.fullmatch(address)
        if match is None or not 0 < int(match[2]) <= _LAST_PORT:
            raise HostError("Say where customers reach it: --address HOST:PORT, such as proxy1.example.com:1080.")
    elif address:
        raise HostError("A host of functions says itself where it is reached: leave --address out.")
    secret = new_host_secret()
    host = Host(
        id=new_id("ho"),
        kind=kind,
        name=name,
        region=region,
        address=address,
        capacity=capacity,
        secret_digest=keys.digest(secret),
        created_at=clock.now(),
    )
    async with store.session() as session:
        session.add(host)
        try:
            await session.commit()
        except IntegrityError:
            raise HostError(f"There is a host '{name}' already.") from None
    return host, secret


async def list_hosts(store: Store) -> Sequence[Host]:
    """Return all hosts, by kind and name."""
    return await store.fetch(select(Host).order_by(col(Host.kind), col(Host.name)))


async def remove_host(store: Store, clock: Clock, *, name: str, force: bool) -> Host:
    """Take a host out of service. By force also one that carries proxies: they have failed then, and can be deleted.

    Raises HostError if there is none of this name, or it carries some.
    """
    async with store.session() as session:
        host = (await session.scalars(select(Host).where(col(Host.name) == name))).one_or_none()
        if host is None:
            raise HostError(f"There is no host '{name}'.")
        if host.used and not force:
            raise HostError(f"{name} carries {host.used} proxies, which would fail: say --force if they are to.")
        await session.execute(delete(Host).where(col(Host.id) == host.id))
        carried = update(Proxy).where(col(Proxy.host_id) == host.id)
        await session.execute(carried.values(next_attempt_at=clock.now()))
        await session.commit()
    return host


def _listed(catalog: Catalog) -> str:
    return ", ".join(region.name for region in catalog.regions)
