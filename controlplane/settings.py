"""The settings, read once at the start: from `HTX_*` variables, else from the file that `HTX_CONFIG` names."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

# The longest path that the kernel takes for a Unix socket is 107 bytes; this is what we append to the data folder.
_LONGEST_SOCKET = "run/postgres/.s.PGSQL.65535.lock"
_SOCKET_PATH_LIMIT = 107
_FUNCTIONS_UIDS = 10_000
_STORAGES = ("sqlite+aiosqlite:///", "postgresql+asyncpg://")

# The edge asks each server so often whether it is ready, and waits so long for the answer (seconds).
HEALTH_CHECK_EVERY = 1
HEALTH_CHECK_PATIENCE = 2


def _default_data_dir() -> Path:
    """Return /var/lib/htx for root, as the FHS has it, else the XDG data folder of the user."""
    if os.geteuid() == 0:
        return Path("/var/lib/htx")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "htx"


class Settings(BaseSettings):
    """What an operator can decide about an installation. `controlplane settings` lists it."""

    model_config = SettingsConfigDict(env_prefix="HTX_", env_ignore_empty=True, frozen=True, extra="ignore")

    data_dir: Path = Field(default_factory=_default_data_dir, description="Folder of everything that is kept.")
    database_url: str = Field(
        default="",
        description="The control plane's own database: sqlite+aiosqlite:///PATH or postgresql+asyncpg://…; "
        "a SQLite file in the data folder when empty.",
    )
    catalog: Path | None = Field(default=None, description="The catalogue (TOML); the built-in one when empty.")
    key_file: Path | None = Field(
        default=None,
        description="The server's keys; when empty, a file in the data folder that is made at first start.",
    )

    backup_url: str = Field(
        default="",
        description="Where backups are kept: file:///FOLDER or s3://BUCKET/PREFIX?endpoint=URL&region=NAME; "
        "a folder in the data folder when empty.",
    )
    backup_access_key: str = Field(default="", description="The access key of the bucket.")
    backup_secret_key: str = Field(default="", description="The secret key of the bucket.")
    verify_after: int = Field(
        default=900, ge=0, description="Seconds after which a new backup is restored aside, to see whether it can be."
    )
    orphan_grace: int = Field(
        default=86_400, ge=0, description="Seconds for which what no row owns is left alone, once it was seen."
    )
    look_every: int = Field(
        default=300, ge=1, description="Seconds between two looks at whether a database still is as ordered."
    )
    valkey_url: str = Field(
        default="",
        description="A Valkey or Redis that several servers count limits in together: valkey://, valkeys://, unix://; "
        "each server counts for itself when empty.",
    )
    anonymous_rate_limit: int = Field(
        default=60, ge=1, description="Requests without a valid credential that one address may send in 60 seconds."
    )
    failed_login_limit: int = Field(
        default=30, ge=1, description="Logins that one address may fail in 15 minutes, for whatever accounts."
    )
    oidc_issuer: str = Field(default="", description="The provider's own login (OpenID Connect), by its issuer URL.")
    oidc_client_id: str = Field(default="", description="What we are called there.")
    oidc_client_secret: str = Field(default="", description="The secret that we show there.")
    public_url: str = Field(
        default="", description="The portal's own address, such as https://portal.example.com; OIDC needs it."
    )

    http_host: str = Field(default="127.0.0.1", description="Address of the public HTTP port.")
    http_port: int = Field(default=8080, ge=1, le=65535, description="The public HTTP port.")
    https_port: int = Field(default=8443, ge=1, le=65535, description="The public HTTPS port, with a certificate.")
    tls_cert: Path | None = Field(default=None, description="Certificate chain (PEM); turns HTTPS on.")
    tls_key: Path | None = Field(default=None, description="The certificate's private key (PEM).")
    trusted_hops: int = Field(
        default=0, ge=0, le=10, description="How many proxies in front of the edge append to X-Forwarded-For."
    )
    max_body_bytes: int = Field(default=65536, ge=1024, description="The largest request body that is accepted.")
    upstream_timeout: int = Field(default=15, ge=1, description="Seconds before the edge answers 504.")

    socket: Path | None = Field(
        default=None,
        description="The Unix socket on which the server takes the edge's requests; one in the data folder when empty.",
    )
    servers: str = Field(
        default="",
        description="The sockets of all servers behind the edge, with commas between; this server's alone when empty.",
    )
    grpc_host: str = Field(default="127.0.0.1", description="Address of the internal gRPC port.")
    grpc_port: int = Field(default=50051, ge=1, le=65535, description="The internal gRPC port.")
    metrics_port: int = Field(default=9464, ge=1, le=65535, description="Prometheus metrics of the server (loopback).")
    edge_metrics_port: int = Field(default=9901, ge=1, le=65535, description="Prometheus metrics of Envoy (loopback).")
    postgres_port: int = Field(default=15432, ge=1, le=65535, description="Port of the embedded PostgreSQL.")
    mariadb_port: int = Field(default=13306, ge=1, le=65535, description="Port of the embedded MariaDB.")
    clickhouse_port: int = Field(default=18123, ge=1, le=65535, description="Port of the embedded ClickHouse (HTTP).")

    host_server: str = Field(
        default="",
        description="Where a host of functions or proxies reaches the control plane's gRPC: host:port, or "
        "https://host:port; this machine's port when empty.",
    )
    host_secret_file: Path | None = Field(
        default=None, description="The file with the secret that `controlplane host add` has printed for a host."
    )
    proxy_host: str = Field(default="127.0.0.1", description="Addresses on which a host of proxies listens, by commas.")
    proxy_port: int = Field(default=1080, ge=1, le=65535, description="The port of a host of proxies (SOCKS5).")
    proxy_metrics_port: int = Field(
        default=9466, ge=1, le=65535, description="Prometheus metrics of a host of proxies (loopback)."
    )
    functions_listen: str = Field(
        default="", description="Where a host of functions listens: unix:PATH or host:port; a socket when empty."
    )
    functions_metrics_port: int = Field(
        default=9465, ge=1, le=65535, description="Prometheus metrics of a host of functions (loopback)."
    )
    functions_uid: int = Field(
        default=200_000, ge=1000, description="The first of 10,000 user ids that belong to nobody, for functions."
    )
    function_hosts: str = Field(
        default="",
        description="Where the edge reaches the hosts of functions, with commas between; this machine's when empty.",
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level logged.")
    log_format: Literal["auto", "human", "json"] = Field(
        default="auto", description="Log lines for people or programs; auto: people on a terminal."
    )

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("HTX_TLS_CERT and HTX_TLS_KEY go together: set both, or neither")
        if self.oidc_issuer and not (self.oidc_client_id and self.public_url):
            raise ValueError("HTX_OIDC_ISSUER needs HTX_OIDC_CLIENT_ID and HTX_PUBLIC_URL too")
        if self.database_url and not self.database_url.startswith(_STORAGES):
            raise ValueError(f"HTX_DATABASE_URL must begin with {' or '.join(_STORAGES)}")
        if len(os.fsencode(self.data_dir.absolute() / _LONGEST_SOCKET)) > _SOCKET_PATH_LIMIT:
            raise ValueError(f"HTX_DATA_DIR: {self.data_dir} is too long a path for the Unix sockets inside it")
        for path in (self.server_socket, *self.server_sockets):
            if not path.is_absolute() or len(os.fsencode(path)) > _SOCKET_PATH_LIMIT:
                wanted = f"absolute paths of at most {_SOCKET_PATH_LIMIT} bytes"
                raise ValueError(f"HTX_SOCKET and HTX_SERVERS take {wanted}, not '{path}'")
        if len({address.startswith("unix:") for address in self.function_host_addresses}) > 1:
            raise ValueError("HTX_FUNCTION_HOSTS takes sockets (unix:PATH) or HOST:PORT, not both")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let a variable win over the file, and the file over the default."""
        file = os.environ.get("HTX_CONFIG")
        if not file:
            return init_settings, env_settings
        if not Path(file).is_file():
            raise ValueError(f"HTX_CONFIG: there is no file {file}")
        try:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=file)
        except ValueError as error:
            raise ValueError(f"HTX_CONFIG: {file} is not TOML: {error}") from None

    @property
    def keys_path(self) -> Path:
        """The file of the server's keys."""
        return self.key_file or self.data_dir / "keys.json"

    @property
    def backup_storage_url(self) -> str:
        """The URL of the storage of backups."""
        return self.backup_url or (self.data_dir.absolute() / "backups").as_uri()

    @property
    def run_dir(self) -> Path:
        """The folder of sockets and of what a start writes anew."""
        return self.data_dir.absolute() / "run"

    @property
    def server_socket(self) -> Path:
        """The Unix socket on which the server takes the edge's requests."""
        return self.socket or self.run_dir / "server.sock"

    @property
    def server_sockets(self) -> list[Path]:
        """The Unix sockets of all servers behind the edge."""
        return [Path(path.strip()) for path in self.servers.split(",")] if self.servers else [self.server_socket]

    @property
    def control_plane(self) -> str:
        """Where a host reaches the control plane's gRPC."""
        return self.host_server or f"{self.grpc_host}:{self.grpc_port}"

    @property
    def functions_address(self) -> str:
        """Where a host of functions listens, as unix:PATH or host:port."""
        return self.functions_listen or f"unix:{self.run_dir / 'functions.sock'}"

    @property
    def function_host_addresses(self) -> list[str]:
        """Where the edge reaches the hosts of functions, each as unix:PATH or host:port."""
        given = self.function_hosts
        return [address.strip() for address in given.split(",")] if given else [self.functions_address]

    @property
    def functions_dir(self) -> Path:
        """The folder of a host of functions: the code that it runs."""
        return self.data_dir.absolute() / "functions"

    @property
    def functions_uids(self) -> range:
        """The user ids of functions, one for each account that has some running."""
        return range(self.functions_uid, self.functions_uid + _FUNCTIONS_UIDS)

    def secret_file(self, kind: str) -> Path:
        """The file with the secret of a host of this kind."""
        return self.host_secret_file or self.data_dir / "hosts" / f"{kind}.secret"

    @property
    def storage_url(self) -> str:
        """The SQLAlchemy URL of the control plane's own database."""
        return self.database_url or f"sqlite+aiosqlite:///{self.data_dir.absolute() / 'controlplane.db'}"
