"""What the steps of databases and of backups share on a cluster: its driver, the target, what an error there means."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from controlplane.backups.storage import StorageUnavailable
from controlplane.catalog.model import Catalog
from controlplane.databases.engines.engine import Busy, ClusterUnavailable, Engine, EngineError, Target
from controlplane.databases.model import Database
from controlplane.reconcile.step import NotYet


def engine_of(database: Database, engines: Mapping[str, Engine]) -> Engine:
    """Return the driver of the database's cluster, or raise NotYet."""
    engine = engines.get(database.cluster_target)
    if engine is None:
        raise NotYet(f"cluster {database.cluster_target}", "The provider has taken this cluster out of service.")
    return engine


def target_of(
    database: Database, catalog: Catalog, *, name: str, password: str, login: bool = True, exists: bool = False
) -> Target:
    """Return a target of the database's size, which may be another database, by its name; or raise NotYet."""
    sku = catalog.find_sku(database.sku)
    if sku is None:
        raise NotYet("the provider", f"The provider no longer has the size {database.sku}: choose another.")
    return Target(
        name=name,
        password=password,
        connections=sku.connections,
        memory_mb=sku.memory_mb,
        storage_gb=sku.storage_gb,
        login=login,
        exists=exists,
    )


@contextmanager
def as_not_yet(database: Database) -> Iterator[None]:
    """Raise what a cluster or the storage of backups raises as NotYet, which is its cause."""
    try:
        yield
    except Busy as error:
        raise NotYet(f"another change of {database.name}", str(error)) from error
    except ClusterUnavailable as error:
        raise NotYet(f"cluster {database.cluster_target}", str(error)) from error
    except StorageUnavailable as error:
        raise NotYet("the storage of backups", str(error)) from error
    except EngineError as error:
        raise NotYet("the provider", str(error)) from error
