"""A real S3 server for the tests: SeaweedFS, a program inside a wheel."""

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.stack import eventually, free_port

ACCESS_KEY = "tests-access-key"
SECRET_KEY = "tests-secret-key"
_PARTS = ("master", "volume", "filer", "s3")


@dataclass(frozen=True, slots=True)
class Seaweed:
    """A running server: its S3 endpoint, and that of its files, where unfinished uploads show."""

    endpoint: str
    files: str
    secret_key: str = field(default=SECRET_KEY, repr=False)

    def url(self, prefix: str, *, bucket: str = "backups") -> str:
        """Return the URL of a storage; the bucket is made by the first write."""
        return f"s3://{bucket}/{prefix}?endpoint={self.endpoint}"

    async def unfinished_uploads(self) -> list[str]:
        """Return the multipart uploads that are neither completed nor aborted."""
        async with httpx.AsyncClient() as client:
            found = await client.get(f"{self.files}/buckets/backups/.uploads/", headers={"accept": "application/json"})
        if found.status_code == httpx.codes.NOT_FOUND:
            return []
        return [each["FullPath"] for each in found.json()["Entries"] or []]


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Seaweed]:
    """Run the server in an empty folder; after its start it takes some seconds until it takes a file."""
    ports = {part: free_port() for part in _PARTS}
    grpc_ports = {part: free_port() for part in _PARTS}
    command = [
        str(Path(sys.executable).with_name("weed")),
        "server",
        "-ip=127.0.0.1",
        f"-dir={folder}",
        "-filer",
        "-s3",
    ]
    command += [f"-s3.config={_configure(folder)}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    command += ["-volume.max=100", "-master.volumeSizeLimitMB=64", "-master.electionTimeout=1s"]
    command += [f"-{part}.port={port}" for part, port in ports.items()]
    command += [f"-{part}.port.grpc={port}" for part, port in grpc_ports.items()]
    setpriv = shutil.which("setpriv")  # so that the kernel ends it when we are killed
    process = await asyncio.create_subprocess_exec(
        *([setpriv, "--pdeathsig", "KILL"] if setpriv else []), *command, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        server = Seaweed(f"http://127.0.0.1:{ports['s3']}", f"http://127.0.0.1:{ports['filer']}")
        await eventually(lambda: _takes_files(server), seconds=60)
        yield server
    finally:
        process.kill()  # it would take a quarter of a minute to end by itself
        await process.wait()
        _forget(ports, grpc_ports)


def _configure(folder: Path) -> Path:
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [{"name": "tests", "credentials": credentials, "actions": ["Admin"]}]}))
    return config


def _forget(ports: dict[str, int], grpc_ports: dict[str, int]) -> None:
    """Remove its sockets, which it puts where it cannot be told not to."""
    names = [f"{part}-{port}" for part, port in ports.items()]
    names += [f"{part}-grpc-{port}" for part, port in grpc_ports.items()]
    for name in names:
        Path(f"/tmp/seaweedfs-{name}.sock").unlink(missing_ok=True)  # noqa: S108


async def _takes_files(server: Seaweed) -> bool:
    """Whether it can give a file a place; before that it fails each write."""
    async with httpx.AsyncClient() as client:
        try:
            answer = await client.put(f"{server.files}/ready", content=b"x")
        except httpx.TransportError:
            return False
        if not answer.is_success:
            return False
        try:
            return (await client.get(server.endpoint)).status_code == httpx.codes.FORBIDDEN
        except httpx.TransportError:
            return False
