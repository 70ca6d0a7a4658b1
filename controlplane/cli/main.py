"""`controlplane`: all of its commands, and how it ends when one cannot do its work."""

import sys
from importlib import import_module

import click

from controlplane import __version__
from controlplane.operator_error import OperatorError

_NAMES = (
    "account",
    "audit",
    "catalog",
    "doctor",
    "edge",
    "functions-host",
    "host",
    "migrate",
    "proxy-host",
    "serve",
    "settings",
    "up",
)


def main() -> None:
    """Run the command; what an operator can mend is one sentence and exit status 1, not a traceback."""
    try:
        commands(prog_name="controlplane")
    except (OperatorError, OSError) as error:
        sys.exit(f"controlplane: {error}")
    except Exception as error:
        from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415 - the hosts do without

        if not isinstance(error, SQLAlchemyError):
            raise
        sys.exit(f"controlplane: the database cannot be used: {error.args[0] if error.args else error}")


class _Commands(click.Group):
    """Loads a command when it is asked for: a host has no use for what the server is made of, which is 60 MB."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - the signature is the library's
        return list(_NAMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return the command, which has the name of its module."""
        if cmd_name not in _NAMES:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(import_module(f"controlplane.cli.{name}"), name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="controlplane")
def commands() -> None:
    """The control plane of HTX Cloud, for its operator.

    Settings come from HTX_* variables, or from the TOML file that HTX_CONFIG names; `controlplane settings` lists them.
    """
