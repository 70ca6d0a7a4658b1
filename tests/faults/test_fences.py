"""What a driver does for whom another server has overtaken meanwhile: nothing, and it asks once it has the lock."""

import secrets
from dataclasses import asdict, replace

import pytest

from controlplane.api.v1.databases_pb2 import DatabaseConnection
from controlplane.databases.engines.engine import Busy, Target
from tests.clusters import Cluster

_ENGINES = ("postgresql", "mysql", "mongodb", "clickhouse")
_WITH_LOCKS = _ENGINES[:3]


class _OvertakenError(Exception):
    """Another server goes on with it."""


async def _refuse() -> None:
    raise _OvertakenError


@pytest.fixture
def cluster(request: pytest.FixtureRequest, all_clusters: list[Cluster]) -> Cluster:
    """The cluster of an engine."""
    return next(cluster for cluster in all_clusters if cluster.engine == request.param)


@pytest.mark.parametrize("cluster", _ENGINES, indirect=True)
async def test_nothing_is_changed_for_who_was_overtaken(cluster: Cluster) -> None:
    """Whatever he would make, change, stop or drop stays as it is."""
    target, other = _new_target(), _new_target()
    await cluster.driver.apply(target)
    connection = DatabaseConnection(**asdict(cluster.driver.connection(target.name, target.password)))
    await cluster.write(connection, "kept")
    for wanted in (replace(target, password="n3w"), replace(target, connections=2, login=False), other):
        with pytest.raises(_OvertakenError):
            await cluster.driver.apply(wanted, check=_refuse)
    with pytest.raises(_OvertakenError):
        await cluster.driver.drop(target.name, check=_refuse)
    assert await cluster.read(connection) == "kept"
    assert await cluster.driver.apply(target) == ()
    assert await cluster.driver.names(other.name) == set()
    await cluster.driver.drop(target.name)


@pytest.mark.parametrize("cluster", _WITH_LOCKS, indirect=True)
async def test_who_asks_has_the_lock(cluster: Cluster) -> None:
    """While a driver asks whether to go on, whoever else would change the database has to wait."""
    target = _new_target()
    asked = 0

    async def nobody_else_can() -> None:
        nonlocal asked
        asked += 1
        with pytest.raises(Busy):
            await cluster.driver.drop(target.name)

    await cluster.driver.apply(target, check=nobody_else_can)
    await cluster.driver.drop(target.name, check=nobody_else_can)
    assert asked == 2
    assert await cluster.driver.names(target.name) == set()


def _new_target() -> Target:
    return Target(name=f"db_{secrets.token_hex(8)}", password="s3cret", connections=3, memory_mb=512, storage_gb=1)
