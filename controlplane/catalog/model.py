"""The catalogue as its TOML file states it, checked."""

import os
import tomllib
from collections.abc import Container
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from controlplane.operator_error import OperatorError

BUILT_IN = Path(__file__).with_name("default.toml")
EMBEDDED = "embedded"

EngineName = Literal["postgresql", "mysql", "mongodb", "clickhouse"]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
_EMBEDDABLE = ("postgresql", "mysql", "clickhouse")
_FAMILY = {"db": ("postgresql", "mysql", "mongodb"), "ch": ("clickhouse",)}


class CatalogError(OperatorError):
    """The catalogue cannot be used; each of `problems` says where and why."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        super().__init__("\n".join(f"{path}: {problem}" for problem in problems))
        self.problems = problems


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Quotas(_Entry):
    """How many of each kind an account may have; none of a kind that is not named."""

    databases: Count = 0
    backups: Count = 0
    functions: Count = 0
    proxies: Count = 0
    tokens: Count = 0


class Plan(_Entry):
    """What an account may have, how often each of its tokens may ask in any 60 seconds, and what it may regret.

    `undelete_days` is for how long a deleted database's last backup is kept. `proxy_connections` and
    `proxy_bytes_per_second` bound each proxy, the latter both ways together; 0 for no limit.
    """

    name: Name
    undelete_days: int = Field(default=7, ge=0, le=365)
    rate_limit_per_minute: int = Field(default=120, ge=1, le=1_000_000)
    proxy_connections: int = Field(default=100, ge=1, le=10_000)
    proxy_bytes_per_second: int = Field(default=12_500_000, ge=0, le=12_500_000_000)
    quotas: Quotas


class Sku(_Entry):
    """A size that can be ordered."""

    name: Name
    engines: tuple[EngineName, ...] = Field(min_length=1)
    vcpus: int = Field(ge=1)
    memory_mb: int = Field(ge=1)
    storage_gb: int = Field(ge=1)
    connections: int = Field(ge=1, le=10_000)

    @model_validator(mode="after")
    def _check_family(self) -> Self:
        family = _FAMILY.get(self.name.partition("-")[0])
        if family is None:
            raise ValueError(f"'{self.name}' must begin with one of {', '.join(f'{prefix}-' for prefix in _FAMILY)}")
        for engine in self.engines:
            if engine not in family:
                raise ValueError(f"'{self.name}' cannot be a size of {engine}: its family is {', '.join(family)}")
        return self


class Region(_Entry):
    """A place where things can be ordered; `title` is what people call it."""

    name: Name
    title: str = Field(min_length=1)


class Cluster(_Entry):
    """A database server that holds customers' databases.

    `admin` is how we reach it: a URL, `env:NAME` or `file:PATH` for a URL kept elsewhere, or `embedded` for a
    server that `controlplane up` starts. `host` and `port` are where customers reach it. `capacity` is how many
    databases it takes. One that is `drained` takes no new ones.
    """

    name: Name
    engine: EngineName
    region: Name
    admin: str = Field(min_length=1, repr=False)
    host: str = ""
    port: int = Field(default=0, ge=0, le=65535)
    capacity: int = Field(default=100, ge=0)
    drained: bool = False

    @model_validator(mode="after")
    def _check_admin(self) -> Self:
        if self.admin == EMBEDDED:
            if self.engine not in _EMBEDDABLE:
                raise ValueError(f"'admin = \"{EMBEDDED}\"' is for {', '.join(_EMBEDDABLE)} only")
        elif not (self.host and self.port):
            raise ValueError("'host' and 'port' must say where customers reach it")
        elif "://" not in self.admin and not self.admin.startswith(("env:", "file:")):
            raise ValueError("'admin' must be a URL, 'env:NAME', 'file:PATH' or 'embedded'")
        return self

    def admin_url(self) -> str:
        """Return the URL by which we reach it.

        Raises CatalogError when the variable or file that should hold it does not.
        """
        kind, _, where = self.admin.partition(":")
        if kind == "env":
            url = os.environ.get(where, "")
        elif kind == "file":
            path = Path(where)
            url = path.read_text().strip() if path.is_file() else ""
        else:
            return self.admin
        if not url:
            raise CatalogError(Path("clusters") / self.name, [f"admin: {self.admin} holds no URL"])
        return url


class ProxyPolicy(_Entry):
    """Where no proxy leads, besides where none ever does: this machine, private networks, metadata services.

    `allowed_networks` are let through although they would be refused: for trials, where everything is on one machine.
    """

    refused_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    allowed_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    refused_ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = (25,)


class Catalog(_Entry):
    """Everything that is for sale."""

    default_plan: Name
    default_region: Name
    plans: tuple[Plan, ...] = Field(min_length=1)
    skus: tuple[Sku, ...] = Field(min_length=1)
    regions: tuple[Region, ...] = Field(min_length=1)
    clusters: tuple[Cluster, ...] = ()
    proxy_policy: ProxyPolicy = ProxyPolicy()

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        for kind, entries in (("plans", self.plans), ("skus", self.skus), ("regions", self.regions)):
            _check_unique(kind, [entry.name for entry in entries])
        _check_unique("clusters", [cluster.name for cluster in self.clusters])
        if self.default_plan not in self._plans:
            raise ValueError(f"default_plan: there is no plan '{self.default_plan}'")
        regions = {region.name for region in self.regions}
        if self.default_region not in regions:
            raise ValueError(f"default_region: there is no region '{self.default_region}'")
        for cluster in self.clusters:
            if cluster.region not in regions:
                raise ValueError(f"clusters.{cluster.name}.region: there is no region '{cluster.region}'")
        return self

    @classmethod
    def load(cls, path: Path | None) -> Self:
        """Read a catalogue, the built-in one for None.

        Raises CatalogError with every problem that it has.
        """
        path = path or BUILT_IN
        try:
            return cls.model_validate(tomllib.loads(path.read_text()))
        except OSError as error:
            raise CatalogError(path, [f"cannot be read: {error.strerror}"]) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise CatalogError(path, [f"is not TOML: {error}"]) from None
        except ValidationError as error:
            raise CatalogError(
                path, [_in_words(problem["loc"], problem["msg"]) for problem in error.errors()]
            ) from None

    def plan(self, name: str) -> Plan:
        """Return the plan of this name; KeyError if there is none."""
        return self._plans[name]

    def find_sku(self, name: str) -> Sku | None:
        """Return the SKU of this name, if there is one."""
        return self._skus.get(name)

    def has_region(self, name: str) -> bool:
        """Tell whether there is a region of this name."""
        return any(region.name == name for region in self.regions)

    def with_clusters(self, names: Container[str]) -> Self:
        """Return the catalogue with these clusters only: those that are really there."""
        there = tuple(cluster for cluster in self.clusters if cluster.name in names)
        return self.model_copy(update={"clusters": there})

    def engines_in(self, region: str) -> list[str]:
        """Return the engines that can be ordered in a region."""
        return sorted({cluster.engine for cluster in self.clusters if cluster.region == region and not cluster.drained})

    def clusters_for(self, *, engine: str, region: str) -> list[Cluster]:
        """Return the clusters of an engine in a region, drained ones too."""
        return [cluster for cluster in self.clusters if cluster.engine == engine and cluster.region == region]

    @cached_property
    def _plans(self) -> dict[str, Plan]:
        return {plan.name: plan for plan in self.plans}

    @cached_property
    def _skus(self) -> dict[str, Sku]:
        return {sku.name: sku for sku in self.skus}


def _check_unique(kind: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{kind}: '{name}' stands there more than once")


def _in_words(location: tuple[int | str, ...], message: str) -> str:
    where = ".".join(str(part) for part in location)
    what = message.removeprefix("Value error, ")
    return f"{where}: {what}" if where else what
