"""`controlplane`: all of its commands, and how it ends when one cannot do its work."""

import sys

import click
from sqlalchemy.exc import SQLAlchemyError

from controlplane import __version__
from controlplane.accounts.admin import AccountError
from controlplane.catalog.model import CatalogError
from controlplane.cli.accounts import account
from controlplane.cli.audit import audit
from controlplane.cli.catalog import catalog
from controlplane.cli.doctor import doctor
from controlplane.cli.hosts import host
from controlplane.cli.programs import edge, functions_host, proxy_host, serve, up
from controlplane.cli.settings import settings
from controlplane.cli.store import migrate
from controlplane.hosts.admin import HostError
from controlplane.hosts.link import LinkError
from controlplane.house import StartError
from controlplane.keys import KeyFileError
from controlplane.local.postgres import EmbeddedPostgresError


def main() -> None:
    """Run the command; what an operator can mend is one sentence and exit status 1, not a traceback."""
    try:
        commands(prog_name="controlplane")
    except (
        AccountError,
        CatalogError,
        EmbeddedPostgresError,
        HostError,
        KeyFileError,
        LinkError,
        StartError,
        OSError,
    ) as error:
        sys.exit(f"controlplane: {error}")
    except SQLAlchemyError as error:
        sys.exit(f"controlplane: the database cannot be used: {error.args[0] if error.args else error}")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="controlplane")
def commands() -> None:
    """The control plane of HTX Cloud, for its operator.

    Settings come from HTX_* variables, or from the TOML file that HTX_CONFIG names; `controlplane settings` lists them.
    """


for _command in (up, serve, functions_host, proxy_host, edge, migrate, doctor, settings, account, host, audit, catalog):
    commands.add_command(_command)
