"""Which embedded engines a machine can run, and what becomes of the clusters of those that it cannot."""

import shutil
import sys
from pathlib import Path

import pytest
import structlog

from controlplane.catalog.model import Catalog
from controlplane.databases.clusters import open_clusters
from controlplane.local.engines import runnable_engines
from controlplane.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings with a data folder of the test's own."""
    return Settings.model_construct(data_dir=tmp_path, postgres_port=1, mariadb_port=2, clickhouse_port=3)


def test_what_is_installed_is_opened(settings: Settings) -> None:
    """Where everything is installed each embedded cluster has a driver, which sends customers to the engine's port."""
    catalog = Catalog.load(None)
    assert runnable_engines(catalog) == ["postgresql", "mysql", "clickhouse"]
    with structlog.testing.capture_logs() as lines:
        drivers = open_clusters(catalog, settings)
    assert lines == []
    ports = {name: driver.connection("db_a", "x").port for name, driver in drivers.items()}
    assert ports == {"local-postgresql": 1, "local-mysql": 2, "local-clickhouse": 3}


def test_what_is_not_installed_is_left_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a program its cluster has no driver, and one line of the log names the cluster and what to install."""
    monkeypatch.setitem(sys.modules, "chdb", None)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    catalog = Catalog.load(None)
    assert runnable_engines(catalog) == ["postgresql"]
    with structlog.testing.capture_logs() as lines:
        drivers = open_clusters(catalog, settings)
    assert list(drivers) == ["local-postgresql"]
    assert {line["cluster"]: line["lacks"].partition(": ")[2] for line in lines} == {
        "local-mysql": "apt-get install mariadb-server-core mariadb-client-core",
        "local-clickhouse": "pip install 'htx-controlplane[clickhouse]'",
    }
