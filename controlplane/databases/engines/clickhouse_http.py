"""What the ClickHouse driver says over HTTP, and how the server refuses it."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import httpx2

# Lets the server's own timeout come before the network's.
STATEMENT_TIMEOUT = 30


class Refused(Exception):
    """The server answered with an error: its number, the HTTP status and its own words, for the log."""

    def __init__(self, code: str, status: int, words: str) -> None:
        super().__init__(words)
        self.code = code
        self.status = status


class Session:
    """What one user sends, over at most two connections that stay open."""

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self._client = client

    async def run(self, sql: str, *, timeout: int = STATEMENT_TIMEOUT, **parameters: str) -> str:  # noqa: ASYNC109
        """Send a statement and return the whole answer. A `timeout` of 0 s is none."""
        parameters["max_execution_time"] = str(timeout)
        async with self._answer(parameters, sql) as answer:
            return (await answer.aread()).decode()

    async def stream(self, sql: str, **parameters: str) -> AsyncGenerator[bytes, None]:
        """Send a query and yield its answer as it comes; the query ends if nobody reads on."""
        parameters |= {"max_execution_time": "0", "cancel_http_readonly_queries_on_client_close": "1"}
        async with self._answer(parameters, sql) as answer:
            async for chunk in answer.aiter_bytes(1 << 18):
                yield chunk

    async def insert(self, sql: str, rows: AsyncIterator[bytes], **parameters: str) -> None:
        """Send an INSERT whose data comes piece by piece."""
        async with self._answer({"query": sql, **parameters}, rows):
            pass

    @asynccontextmanager
    async def _answer(
        self, parameters: dict[str, str], content: str | AsyncIterator[bytes]
    ) -> AsyncIterator[httpx2.Response]:
        async with self._client.stream("POST", "/", params=parameters, content=content) as answer:
            if answer.status_code != httpx2.codes.OK:
                words = (await answer.aread()).decode(errors="replace")[:2000]
                raise Refused(answer.headers.get("x-clickhouse-exception-code", ""), answer.status_code, words)
            yield answer
