"""All tables, for the migrations: a table is known once its module is imported."""

from sqlmodel import SQLModel

from controlplane.access import quota as _quota  # noqa: F401
from controlplane.accounts import model as _accounts  # noqa: F401
from controlplane.audit import model as _audit  # noqa: F401
from controlplane.backups import model as _backups  # noqa: F401
from controlplane.databases import model as _databases  # noqa: F401
from controlplane.databases import names as _names  # noqa: F401
from controlplane.databases import sweep as _sweep  # noqa: F401
from controlplane.events import model as _events  # noqa: F401
from controlplane.functions import logs as _function_logs  # noqa: F401
from controlplane.functions import model as _functions  # noqa: F401
from controlplane.hosts import model as _hosts  # noqa: F401
from controlplane.proxies import model as _proxies  # noqa: F401
from controlplane.rpc import idempotency as _idempotency  # noqa: F401
from controlplane.sessions import model as _sessions  # noqa: F401
from controlplane.tokens import model as _tokens  # noqa: F401

METADATA = SQLModel.metadata
