"""Backups in a bucket: what is told of one that is of no use, a server that goes away, and whose settings count."""

import asyncio
import os
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from controlplane.backups.storage import StorageUnavailable, storage_at
from tests.backups.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed
from tests.backups.stored import MEGABYTE, NAME, content, stream
from tests.stack import free_port


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda url: url.replace(str(urlsplit(url.partition("endpoint=")[2]).port), str(free_port())),
            "cannot be reached",
        ),
        (lambda url: url.replace("s3://backups", "s3://no-such-bucket"), "cannot be reached"),
        (lambda url: url, "refuses our keys"),
    ],
    ids=["nobody there", "no bucket", "wrong key"],
)
async def test_a_bucket_that_cannot_be_used_is_told(
    seaweed: Seaweed, change: Callable[[str], str], reason: str
) -> None:
    """A server that is away, a bucket that is none, a wrong key: one sentence each, and no key in it or its causes."""
    secret = "not-the-secret-key" if "refuses" in reason else SECRET_KEY
    url = change(seaweed.url("x"))
    storage = storage_at(url, access_key=ACCESS_KEY, secret_key=secret)
    with pytest.raises(StorageUnavailable, match="cannot be reached") as refused:
        await storage.list()
    assert secret not in "".join(traceback.format_exception(refused.value))
    assert secret not in repr(storage)
    if "no-such" not in url:  # this server makes a bucket for what is written
        with pytest.raises(StorageUnavailable, match=reason) as refused:
            await storage.write(NAME, stream(b"plain"))
        assert secret not in "".join(traceback.format_exception(refused.value))
        with pytest.raises(StorageUnavailable, match=reason):
            await storage.exists(NAME)
        with pytest.raises(StorageUnavailable, match=reason):
            await content(storage)


async def test_a_server_that_goes_away_ends_the_stream(seaweed: Seaweed) -> None:
    """When the server is lost in the middle of an upload the write fails, and nothing reads the dump any more."""
    lost = asyncio.Event()
    there = urlsplit(seaweed.endpoint)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while not lost.is_set() and (some := await reader.read(65536)):
                writer.write(some)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if lost.is_set():
            writer.close()
            return
        back, on = await asyncio.open_connection(there.hostname, there.port)
        await asyncio.gather(forward(reader, on), forward(back, writer))

    async def dump() -> AsyncIterator[bytes]:
        for number in range(200):
            if number == 40:
                lost.set()
            yield os.urandom(MEGABYTE)
            counted.append(number)

    counted: list[int] = []
    url = seaweed.url("x", bucket="lost")
    async with await asyncio.start_server(accept, "127.0.0.1", 0) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        storage = storage_at(url.replace(str(there.port), str(port)), access_key=ACCESS_KEY, secret_key=SECRET_KEY)
        with pytest.raises(StorageUnavailable, match="cannot be reached"):
            await storage.write(NAME, dump())
    assert 40 <= len(counted) < 100
    assert await storage_at(url, access_key=ACCESS_KEY, secret_key=SECRET_KEY).list() == []


async def test_the_variables_of_others_do_not_count(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set for Amazon's own tools neither moves the storage nor takes the place of its keys."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "other",
        "AWS_SECRET_ACCESS_KEY": "other",
        "AWS_SESSION_TOKEN": "other",
        "AWS_ENDPOINT": "http://127.0.0.1:9",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_REGION": "eu-west-1",
        "AWS_BUCKET": "other",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true",
    }.items():
        monkeypatch.setenv(name, value)
    storage = storage_at(seaweed.url("variables"), access_key=ACCESS_KEY, secret_key=SECRET_KEY)
    await storage.write(NAME, stream(b"plain"))
    monkeypatch.undo()
    again = storage_at(seaweed.url("variables"), access_key=ACCESS_KEY, secret_key=SECRET_KEY)
    assert await content(again) == b"plain"


def test_a_bucket_needs_its_keys() -> None:
    """Without both keys the server does not start to guess."""
    with pytest.raises(ValueError, match="HTX_BACKUP_SECRET_KEY"):
        storage_at("s3://bucket/prefix", access_key=ACCESS_KEY)
