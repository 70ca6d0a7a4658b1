"""What goes wrong at a PostgreSQL cluster, in the terms of the seam."""

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from controlplane.databases.engines.engine import ClusterUnavailable, EngineError

TRY_LATER = (
    OSError,
    asyncpg.PostgresConnectionError,
    # When the connection broke between two statements: "connection is closed", or a state that asyncpg did not expect.
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.OperatorInterventionError,  # starting, shutting down, timed out
    asyncpg.InsufficientResourcesError,  # too many connections, disk full
    asyncpg.LockNotAvailableError,
    asyncpg.ObjectInUseError,
    asyncpg.TransactionRollbackError,
    asyncpg.ReadOnlySQLTransactionError,  # as while another server takes over
    # When a customer drops or alters a table between our finding and our locking it.
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.InvalidSchemaNameError,
)


@contextmanager
def in_our_terms() -> Iterator[None]:
    """Raise what the cluster raises as EngineError or ClusterUnavailable."""
    try:
        yield
    except TRY_LATER as error:
        raise ClusterUnavailable("The database cluster is not available at the moment; try again later.") from error
    except asyncpg.PostgresError as error:
        raise EngineError("The database cluster refused; contact support if this stays so.") from error
