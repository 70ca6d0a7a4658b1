"""A real browser: Firefox without a screen, steered by its own protocol."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.stack import eventually, free_port


class Firefox:
    """A running Firefox, steered by its own protocol (Marionette): messages `[type, id, command, parameters]`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._number = 0

    async def read(self) -> Any:
        """Return the next message: its length, a colon, and JSON."""
        size = await self._reader.readuntil(b":")
        return json.loads(await self._reader.readexactly(int(size[:-1])))

    async def do(self, command: str, **parameters: Any) -> Any:
        """Send a command and return its result; fail on an error."""
        self._number += 1
        text = json.dumps([0, self._number, command, parameters]).encode()
        self._writer.write(b"%d:%s" % (len(text), text))
        _, _, error, result = await self.read()
        assert error is None, error
        return result


@asynccontextmanager
async def firefox(profile: Path) -> AsyncIterator[Firefox]:
    """Start Firefox without a screen, and end it."""
    program = shutil.which("firefox-esr") or shutil.which("firefox")
    assert program, "install Firefox: apt-get install firefox-esr"
    port = free_port()
    preferences = {
        "marionette.port": port,
        "network.proxy.allow_hijacking_localhost": True,
        "devtools.jsonview.enabled": False,  # which would show JSON from an origin of its own
        "app.update.enabled": False,
        "datareporting.policy.dataSubmissionEnabled": False,
        "network.captive-portal-service.enabled": False,
        "network.connectivity-service.enabled": False,
        "services.settings.server": "http://127.0.0.1:1/",
    }
    _write(profile, preferences)
    process = await asyncio.create_subprocess_exec(
        *(program, "--headless", "--marionette", "--no-remote", "--profile", str(profile)),
        env={**os.environ, "HOME": str(profile), "MOZ_CRASHREPORTER_DISABLE": "1"},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        connected = await eventually(lambda: _connected(port), seconds=60)
        assert connected is not None
        _, writer = connected
        browser = Firefox(*connected)
        await browser.read()  # it says which protocol it speaks
        await browser.do("WebDriver:NewSession")
        yield browser
        writer.close()
    finally:
        process.terminate()
        await process.wait()


def _write(profile: Path, preferences: dict[str, Any]) -> None:
    lines = (f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in preferences.items())
    profile.mkdir()
    (profile / "user.js").write_text("".join(lines))


async def _connected(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    try:
        return await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    except OSError:
        return None
