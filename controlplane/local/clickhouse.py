"""The embedded ClickHouse: the process of its gateway (`chdb/`), where Python has chDB."""

import asyncio
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import structlog

from controlplane.local.child import Child
from controlplane.operator_error import OperatorError

_START_TIMEOUT = 30.0
_POLL = 0.02


class EmbeddedClickHouseError(OperatorError):
    """The embedded ClickHouse does not run; the sentence tells the operator why and what to do."""


class EmbeddedClickHouse:
    """A ClickHouse of our own, whose data is in `data_dir`/clickhouse; see `controlplane.local.chdb`."""

    def __init__(self, *, data_dir: Path, port: int) -> None:
        self._folder = data_dir.absolute() / "clickhouse"
        self._port = port
        self._log = structlog.get_logger("clickhouse")
        self._child: Child | None = None

    @staticmethod
    def is_installed() -> bool:
        """Whether Python has what it takes: the extra `clickhouse`."""
        return all(find_spec(name) for name in ("chdb", "lz4", "uvicorn"))

    @property
    def admin_url(self) -> str:
        """The admin's URL, with the password that is made when it is first asked for."""
        from controlplane.local.chdb.gateway import ADMIN, admin_password  # noqa: PLC0415 - needs the extra

        return f"http://{ADMIN}:{admin_password(self._folder)}@127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Start the gateway and return once it answers; an engine starts with the first query for it.

        From then on it is started again whenever it ends. Raises EmbeddedClickHouseError.
        """
        self._check_port()
        command = [sys.executable, "-m", "controlplane.local.chdb", str(self._folder), str(self._port)]
        self._child = Child("embedded ClickHouse", command)
        try:
            await self._launch(self._child)
        except BaseException:
            await self.stop()
            raise
        self._log.info("the embedded ClickHouse runs", port=self._port)

    async def stop(self) -> None:
        """Stop the gateway and all engines; nothing happens if it is stopped."""
        if self._child is not None:
            await self._child.stop()
            self._child = None

    def _check_port(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self._port))
            except OSError as error:
                raise EmbeddedClickHouseError(
                    f"Port {self._port} cannot be used ({error.strerror}): set HTX_CLICKHOUSE_PORT to a free one."
                ) from None

    async def _launch(self, child: Child) -> None:
        await child.start()
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                while not await self._listens():
                    if not child.is_running:
                        raise EmbeddedClickHouseError("ClickHouse has ended at its start; the lines above say why.")
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            raise EmbeddedClickHouseError(f"ClickHouse was not ready after {_START_TIMEOUT:.0f} s.") from None
        child.keep_alive()

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            return False
        writer.close()
        return True
