"""The settings, listed for the operator, and read for every other command."""

import os
from typing import Any

import click
from pydantic import ValidationError

from controlplane.operator_error import OperatorError
from controlplane.settings import Settings

_SECRET_SETTINGS = {"backup_secret_key", "database_url", "oidc_client_secret", "valkey_url"}


@click.command()
def settings() -> None:
    """List every setting, its value and what it is for."""
    current = read_settings()
    for name, field in Settings.model_fields.items():
        value = getattr(current, name)
        shown = "(set)" if name in _SECRET_SETTINGS and value else "" if value is None else value
        click.echo(f"{click.style(f'HTX_{name.upper()}', bold=True)}={shown}\n    {field.description}")
    click.echo(f"{click.style('HTX_CONFIG', bold=True)}={os.environ.get('HTX_CONFIG', '')}")
    click.echo("    A TOML file with any of these, in lower case and without the prefix; a variable wins over it.")


def read_settings() -> Settings:
    """Return the settings.

    Raises OperatorError, in words, for those that cannot be used.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise OperatorError("; ".join(_in_words(problem) for problem in error.errors())) from None
    except ValueError as error:
        raise OperatorError(str(error)) from None


def read_host_secret(settings: Settings, kind: str) -> str:
    """Return the secret of this machine's host of a kind.

    Raises OperatorError without one.
    """
    file = settings.secret_file(kind)
    if not file.is_file():
        raise OperatorError(
            f"{file} is not there: make a secret with `controlplane host add NAME --kind {kind}`, write it to a file, "
            "and point HTX_HOST_SECRET_FILE there."
        )
    return file.read_text().strip()


def _in_words(problem: Any) -> str:
    name = "_".join(str(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"HTX_{name.upper()}: {message}" if name else message
