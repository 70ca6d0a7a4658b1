"""A real browser through a proxy: Firefox, whose extensions can give it the username and the password of one."""

import asyncio
import json
import os
import shutil
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.stack import Customer, eventually, free_port

PAGE = b"<!doctype html><title>Inside</title><script>document.title = 'Seen by ' + location.host</script>"
MANIFEST = {
    "manifest_version": 2,
    "name": "proxy",
    "version": "1",
    "browser_specific_settings": {"gecko": {"id": "proxy@example.com"}},
    "permissions": ["proxy", "<all_urls>"],
    "background": {"scripts": ["background.js"]},
}


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


def extension(file: Path, proxy: dict[str, Any]) -> Path:
    """Write an extension that sends everything through a proxy, names unresolved."""
    way = {
        "type": "socks",
        "host": proxy["host"],
        "port": proxy["port"],
        "username": proxy["username"],
        "password": proxy["password"],
        "proxyDNS": True,
    }
    script = f"browser.proxy.onRequest.addListener(() => ({json.dumps(way)}), {{urls: ['<all_urls>']}});"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("manifest.json", json.dumps(MANIFEST))
        archive.writestr("background.js", script)
    return file


@asynccontextmanager
async def site() -> AsyncIterator[tuple[int, list[bytes]]]:
    """A site with one page; its port, and the addresses that asked for it."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0])
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        writer.write(head % len(PAGE) + PAGE)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], asked
    finally:
        server.close()


@pytest.mark.usefixtures("proxy_port")
async def test_a_browser_goes_through(customer: Customer, tmp_path: Path) -> None:
    """A page that only the proxy can reach is shown, its name resolved there, and its bytes are counted."""
    proxy = await customer.create("/api/portal/proxies", name="browser")
    async with site() as (port, asked), firefox(tmp_path / "profile") as browser:
        await browser.do("Addon:Install", path=str(extension(tmp_path / "proxy.xpi", proxy)), temporary=True)
        await browser.do("WebDriver:Navigate", url=f"http://localhost:{port}/page")
        assert (await browser.do("WebDriver:GetTitle"))["value"] == f"Seen by localhost:{port}"
    assert b"GET /page HTTP/1.1" in asked

    async def used() -> Any:
        days = (await customer.call("GET", "/api/portal/proxies/browser/usage")).json()["days"]
        return days and days[-1]["bytes_down"] > len(PAGE)

    assert await eventually(used)
