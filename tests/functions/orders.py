"""Orders of functions over REST."""

import io
import zipfile
from base64 import b64encode
from typing import Any

from tests.functions.played import REGION
from tests.stack import Customer

FUNCTIONS = "/api/portal/functions"
SOURCE = "def handler(event, context):\n    return event\n"
ORDER = {"name": "thumbnails", "runtime": "python3", "source": SOURCE, "region": REGION}


async def create(customer: Customer, name: str = "thumbnails", **wanted: Any) -> dict[str, Any]:
    """Order a function; return it as the answer shows it. What is None is left out."""
    order = {key: value for key, value in {**ORDER, "name": name, **wanted}.items() if value is not None}
    answer = await customer.call("POST", FUNCTIONS, json=order)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def ready(customer: Customer, name: str = "thumbnails", **wanted: Any) -> dict[str, Any]:
    """Order a function and wait until it is ready."""
    await create(customer, name, **wanted)
    return await customer.until("ready", f"{FUNCTIONS}/{name}")


async def patch(customer: Customer, name: str = "thumbnails", **change: Any) -> dict[str, Any]:
    """Change a function; return it as the answer shows it."""
    answer = await customer.call("PATCH", f"{FUNCTIONS}/{name}", json=change)
    assert answer.status_code == 200, answer.text
    changed: dict[str, Any] = answer.json()
    return changed


async def deploy(customer: Customer, name: str = "thumbnails", **change: Any) -> dict[str, Any]:
    """Change a function and wait until it is ready again."""
    await patch(customer, name, **change)
    return await customer.until("ready", f"{FUNCTIONS}/{name}")


async def versions_of(customer: Customer, name: str = "thumbnails") -> list[dict[str, Any]]:
    """Return the versions of a function."""
    answer = await customer.call("GET", f"{FUNCTIONS}/{name}/versions")
    assert answer.status_code == 200, answer.text
    versions: list[dict[str, Any]] = answer.json()
    return versions


def zipped(**files: str) -> str:
    """Return an archive of files in base64; `__` in a name stands for a dot."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "."), text)
    return b64encode(buffer.getvalue()).decode()
