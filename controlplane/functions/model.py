"""The tables of functions, their versions and their code, and which states there are."""

from datetime import datetime, timedelta

from sqlalchemy import JSON, Index, LargeBinary, UniqueConstraint
from sqlmodel import Field, SQLModel

from controlplane.api.v1 import functions_pb2
from controlplane.hosts.model import Hosted
from controlplane.reconcile.due import due_indexes
from controlplane.reconcile.model import DELETING, progress_of
from controlplane.rpc.times import stamp
from controlplane.sql import UtcDateTime

# Each state that is not settled, and how long it may last before the function has failed, or its deletion is late.
BUILDING = "building"  # a version's state as well, as are READY and FAILED
READY = "ready"
UPDATING = "updating"
DEADLINES = {
    BUILDING: timedelta(minutes=10),
    UPDATING: timedelta(minutes=10),
    DELETING: timedelta(hours=1),
}
HOSTS = "a host that runs functions"  # what is waited for
KEPT = 10  # versions, the newest, besides the one that answers


class CallSettings(SQLModel):
    """What a function's calls depend on, besides its code and the values of its variables."""

    entrypoint: str
    memory_mb: int
    timeout_ms: int
    env_names: list[str] = Field(default_factory=list, sa_type=JSON)
    allow_network: bool = False


class Function(Hosted, CallSettings, table=True):
    """A serverless function as it is ordered; its settings are those of `wanted_version`.

    `active_version` is the one that answers. Where they differ, the wanted one is being loaded, or could not be.
    """

    __tablename__ = "functions"
    __table_args__ = (
        UniqueConstraint("account_id", "name"),
        Index("ix_functions_list", "account_id", "id"),
        *due_indexes("functions"),
    )

    name: str
    runtime: str
    region: str
    auth: str
    max_concurrency: int
    wanted_version: int = 0
    active_version: int | None = None
    last_version: int = 0
    created_at: datetime = Field(sa_type=UtcDateTime)
    updated_at: datetime = Field(sa_type=UtcDateTime)

    def order_real(self, *, now: datetime) -> None:
        """Want what the row says to be in force at every host of its region."""
        state = BUILDING if self.active_version is None else UPDATING
        self.order(state, now=now, within=DEADLINES[state], waiting_on=HOSTS)
        self.updated_at = now

    def resume(self, *, now: datetime) -> None:
        """Go on with an order that was given up because no host answered in time; else change nothing."""
        if self.waiting_on is None:
            self.state = UPDATING
            self.waiting_on, self.deadline_at = HOSTS, now + DEADLINES[UPDATING]


class FunctionVersion(CallSettings, table=True):
    """One state of a function's code and settings, which never changes any more but for whether it could be loaded."""

    __tablename__ = "function_versions"
    __table_args__ = (UniqueConstraint("function_id", "number"),)

    id: str = Field(primary_key=True)
    function_id: str = Field(foreign_key="functions.id", ondelete="CASCADE")
    number: int
    state: str = BUILDING
    error: str | None = None
    env_sealed: str = Field(repr=False)
    code_sha256: str
    code_bytes: int
    created_at: datetime = Field(sa_type=UtcDateTime)


class FunctionCode(SQLModel, table=True):
    """Code as it was sent, a zip archive or the source of a single file; once for all versions that have the same."""

    __tablename__ = "function_codes"

    function_id: str = Field(primary_key=True, foreign_key="functions.id", ondelete="CASCADE")
    sha256: str = Field(primary_key=True)
    is_archive: bool
    content: bytes = Field(sa_type=LargeBinary, repr=False)


def to_proto(function: Function) -> functions_pb2.Function:
    """Return the function as the API shows it."""
    return functions_pb2.Function(
        id=function.id,
        name=function.name,
        runtime=function.runtime,
        status=function.state,
        entrypoint=function.entrypoint,
        memory_mb=function.memory_mb,
        timeout_ms=function.timeout_ms,
        env_names=function.env_names,
        allow_network=function.allow_network,
        auth=function.auth,
        max_concurrency=function.max_concurrency,
        path=f"/f/{function.account_id}/{function.name}",
        region=function.region,
        version=function.active_version,
        created_at=stamp(function.created_at),
        updated_at=stamp(function.updated_at),
        generation=function.generation,
        observed_generation=function.observed_generation,
        progress=progress_of(function),
    )


def version_to_proto(version: FunctionVersion, *, active: bool) -> functions_pb2.FunctionVersion:
    """Return the version as the API shows it."""
    return functions_pb2.FunctionVersion(
        version=version.number,
        status=version.state,
        active=active,
        error=version.error,
        entrypoint=version.entrypoint,
        memory_mb=version.memory_mb,
        timeout_ms=version.timeout_ms,
        env_names=version.env_names,
        allow_network=version.allow_network,
        code_sha256=version.code_sha256,
        code_bytes=version.code_bytes,
        created_at=stamp(version.created_at),
    )


def sequence_of(region: str) -> str:
    """Return the name of the sequence that the hosts of a region follow."""
    return f"functions/{region}"


def env_binding(function: Function, version_id: str) -> str:
    """Return what the sealed variables are bound to, so that they open for this version of this account only."""
    return f"{function.account_id}/{version_id}/env"
