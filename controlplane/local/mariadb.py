"""The embedded MariaDB: the MySQL cluster of a local run, where the machine has MariaDB's server."""

import asyncio
import contextlib
import fcntl
import os
import pwd
import shutil
import signal
import socket
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from pathlib import Path
from urllib.parse import quote

import structlog

from controlplane.local.child import Child
from controlplane.operator_error import OperatorError

_START_TIMEOUT = 60.0  # after a crash it first replays its log
_STOP_TIMEOUT = 20.0
_POLL = 0.02

_SYSTEM_FOLDERS = "/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin"  # a user's PATH is often without sbin
_LOG_SIZE = "--innodb-log-file-size=64M"  # in both commands, or the first start would make the log anew

_CONFIG = {
    "bind-address": "127.0.0.1",
    "skip-name-resolve": "1",
    "max-connections": "200",
    "character-set-server": "utf8mb4",
    "innodb-buffer-pool-size": "64M",
    "innodb-temp-data-file-path": "ibtmp1:12M:autoextend:max:1G",
    "performance-schema": "0",
    # Only InnoDB gives a dump that is of one moment.
    "enforce-storage-engine": "InnoDB",
    # Or a tenant could give a table a DATA DIRECTORY: any folder that is the server's to write to.
    "symbolic-links": "0",
    "local-infile": "0",
    "event-scheduler": "disabled",
    # What one session may ask for: no account has a limit of its own on memory.
    "maximum-sort-buffer-size": "16M",
    "maximum-join-buffer-size": "16M",
    "maximum-read-buffer-size": "4M",
    "maximum-read-rnd-buffer-size": "4M",
    "maximum-bulk-insert-buffer-size": "16M",
    "maximum-tmp-memory-table-size": "64M",
    "maximum-max-heap-table-size": "64M",
    "maximum-group-concat-max-len": "16M",
    "log-warnings": "1",
}


class EmbeddedMariaDBError(OperatorError):
    """The embedded MariaDB does not run; the sentence tells the operator why and what to do."""


class EmbeddedMariaDB:
    """A MariaDB server of our own, whose data is in `data_dir`/mariadb, and whose log is `run_dir`/mariadb.log.

    As root it runs as the owner of its data, at first `mysql` or else `nobody`. `run_dir` takes its Unix socket, by
    which the operating system's user that we are comes in as the admin, without a password. Tenants come by the port.
    """

    def __init__(self, *, data_dir: Path, run_dir: Path, port: int) -> None:
        self._data_dir = data_dir.absolute()
        self._data = self._data_dir / "mariadb"
        self._run_dir = run_dir.absolute()
        self._socket = self._run_dir / "mariadb" / "socket"
        self._log_file = self._run_dir / "mariadb.log"
        self._port = port
        self._log = structlog.get_logger("mariadb")
        self._child: Child | None = None
        self._lock = -1

    @staticmethod
    def is_installed() -> bool:
        """Whether this machine has what it takes."""
        return all(_find(name) for name in ("mariadbd", "mariadb-install-db", "my_print_defaults"))

    @property
    def admin_url(self) -> str:
        """The admin's URL; it has no password, and works only for the user who started the server."""
        return f"mysql://{_user_name(os.geteuid())}@/?socket={quote(str(self._socket))}"

    async def start(self) -> None:
        """Start the server and return once it answers; make its data folder if there is none.

        From then on it is started again whenever it ends. One that outlived its control plane is stopped first.
        Raises EmbeddedMariaDBError.
        """
        self._take_lock()
        try:
            await self._stop_leftover()
            self._check_port()
            owner = self._owner()
            as_owner = await self._as_owner(owner)
            self._make_folders(owner)
            if not self._data.is_dir():
                await self._install(owner, as_owner)
            await self._launch(as_owner)
        except BaseException:
            await self.stop()
            raise
        self._log.info("the embedded MariaDB runs", port=self._port)

    async def stop(self) -> None:
        """End all sessions and stop the server, in order if it can; nothing happens if it is stopped."""
        if self._child is not None:
            await self._child.stop()
            self._child = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take_lock(self) -> None:
        """Make sure that the server which we may find running is nobody else's. The kernel unlocks when we die."""
        self._data_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        lock = os.open(self._data_dir / "mariadb.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise EmbeddedMariaDBError(
                f"Another control plane uses {self._data_dir}: stop it, or choose another HTX_DATA_DIR."
            ) from None
        self._lock = lock

    async def _stop_leftover(self) -> None:
        """Stop a server of this data folder that a killed control plane left behind: it may still be shutting down."""
        try:
            pid = int((self._data / "pid").read_text())
        except (OSError, ValueError):
            return
        for order, patience in ((signal.SIGTERM, _STOP_TIMEOUT), (signal.SIGKILL, 5.0)):
            if not self._is_server(pid):
                return
            self._log.warning("stopping a MariaDB that outlived its control plane", pid=pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, order)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    while self._is_server(pid):  # noqa: ASYNC110 - it is no child of ours, so nobody tells us
                        await asyncio.sleep(_POLL)
        if self._is_server(pid):
            raise EmbeddedMariaDBError(f"The MariaDB with pid {pid} does not stop: end it, then start again.")

    def _is_server(self, pid: int) -> bool:
        """Return whether this process was started on our data folder; its number may be another program's by now."""
        try:
            return os.fsencode(f"--datadir={self._data}") in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False

    def _check_port(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self._port))
            except OSError as error:
                raise EmbeddedMariaDBError(
                    f"Port {self._port} cannot be used ({error.strerror}): set HTX_MARIADB_PORT to a free one."
                ) from error

    def _owner(self) -> pwd.struct_passwd:
        """Return whom the server runs as."""
        found = self._data.stat().st_uid if self._data.exists() else None
        if os.geteuid() != 0:
            if found not in {None, os.geteuid()}:
                raise EmbeddedMariaDBError(
                    f"{self._data} belongs to another user (uid {found}): start as root or as that user, "
                    "or choose another HTX_DATA_DIR."
                )
            return pwd.getpwuid(os.geteuid())
        if found:
            return pwd.getpwuid(found)
        with contextlib.suppress(KeyError):
            return pwd.getpwnam("mysql")
        return pwd.getpwnam("nobody")

    async def _as_owner(self, owner: pwd.struct_passwd) -> list[str]:
        """Return what to write before a command so that it runs as the owner, and dies when we do."""
        if owner.pw_uid == os.geteuid():
            return []  # for the server, `Child` sees to its death
        if shutil.which("setpriv") is None:
            raise EmbeddedMariaDBError("MariaDB refuses to run as root: install setpriv (util-linux).")
        # The order to die is lost with the old user, so that of `Child` is not enough.
        prefix = ["setpriv", "--no-new-privs", "--pdeathsig", "TERM", "--clear-groups", "--inh-caps", "-all"]
        prefix += ["--reuid", str(owner.pw_uid), "--regid", str(owner.pw_gid)]
        for folder in (*reversed(self._data_dir.parents), self._data_dir):
            status, _ = await _run(*prefix, "test", "-x", str(folder))
            if status != 0:
                raise EmbeddedMariaDBError(
                    f"The user {owner.pw_name}, who runs MariaDB because root may not, cannot enter {folder}: "
                    f"run `chmod o+x {folder}`, or choose another HTX_DATA_DIR."
                )
        return prefix

    def _make_folders(self, owner: pwd.struct_passwd) -> None:
        """Make what the server needs outside its data, closed to all other users of the machine."""
        self._run_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._socket.parent.mkdir(mode=0o700, exist_ok=True)
        self._log_file.touch(0o600)
        os.truncate(self._log_file, 0)  # what a start says is what one looks for
        for path in (self._socket.parent, self._log_file):
            os.chown(path, owner.pw_uid, -1)

    async def _install(self, owner: pwd.struct_passwd, as_owner: list[str]) -> None:
        """Make the data folder aside and rename it, so that a half one is never taken for it."""
        aside = self._data.with_name("mariadb.new")
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(mode=0o700)
        os.chown(aside, owner.pw_uid, -1)
        status, output = await _run(
            *as_owner,
            *(_program("mariadb-install-db"), "--no-defaults", f"--datadir={aside}", _LOG_SIZE, "--skip-name-resolve"),
            # Neither the database `test`, which is everybody's, nor the user without a name.
            *("--skip-test-db", "--auth-root-authentication-method=socket"),
            f"--auth-root-socket-user={_user_name(os.geteuid())}",
            # A second instead of five; it is synced below, as a whole.
            *("--debug-no-sync", "--sync-frm=0"),
        )
        if status == 0:
            status, output = await _run("sync", "-f", str(aside))
        if status != 0:
            raise EmbeddedMariaDBError(f"The data folder of MariaDB could not be made: {output}")
        aside.rename(self._data)
        await _run("sync", "-f", str(self._data))

    async def _launch(self, as_owner: list[str]) -> None:
        config = {
            **_CONFIG,
            "datadir": self._data,
            "port": self._port,
            "socket": self._socket,
            "pid-file": self._data / "pid",
            "log-error": self._log_file,
        }
        options = (f"--{name}={value}" for name, value in config.items())
        child = Child("MariaDB", [*as_owner, _program("mariadbd"), "--no-defaults", _LOG_SIZE, *options])
        self._child = child
        self._socket.unlink(missing_ok=True)
        await child.start()
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                while not await self._greets():
                    if not child.is_running:
                        raise EmbeddedMariaDBError(f"MariaDB did not start: {self._last_words()}")
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            raise EmbeddedMariaDBError(f"MariaDB was not ready after {_START_TIMEOUT:.0f} s.") from None
        child.keep_alive()

    async def _greets(self) -> bool:
        """Return whether the server speaks first, as it does to whoever connects once it is ready."""
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._socket))
        except OSError:
            return False
        greeting = await reader.read(1)
        writer.close()
        return bool(greeting)

    def _last_words(self) -> str:
        lines = self._log_file.read_text(errors="replace").splitlines()
        return next((line for line in lines if "[ERROR]" in line), f"see {self._log_file}")


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_FOLDERS}")


def _program(name: str) -> str:
    path = _find(name)
    if path is None:
        raise EmbeddedMariaDBError(
            f"There is no {name}: install MariaDB's server (Debian: mariadb-server-core mariadb-client-core)."
        )
    return path


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        raise EmbeddedMariaDBError(
            f"MariaDB cannot be used by uid {uid}, which has no name: add it to /etc/passwd."
        ) from None


async def _run(*command: str) -> tuple[int, str]:
    """Run a program to its end; return the exit status and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        env={"PATH": f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_FOLDERS}", "LC_ALL": "C.UTF-8"},
        cwd="/",
        start_new_session=True,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, output.decode(errors="replace").strip()
