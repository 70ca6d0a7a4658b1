"""A real browser through a proxy: Firefox, whose extensions can give it the username and the password of one."""

import asyncio
import json
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.firefox import firefox
from tests.stack import Customer, eventually

PAGE = b"<!doctype html><title>Inside</title><script>document.title = 'Seen by ' + location.host</script>"
MANIFEST = {
    "manifest_version": 2,
    "name": "proxy",
    "version": "1",
    "browser_specific_settings": {"gecko": {"id": "proxy@example.com"}},
    "permissions": ["proxy", "<all_urls>"],
    "background": {"scripts": ["background.js"]},
}


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
