"""The MySQL driver's admin: how he comes in, his secrets, and a cluster that does not answer him."""

import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane.databases.engines.engine import ClusterUnavailable, EngineError
from controlplane.databases.engines.mysql import MySQL
from tests.databases.engines.mysql.cluster import Cluster, Session, dumped, new_target, pieces, run

UNAVAILABLE = r"^The database cluster is not available at the moment; try again later\.$"


@pytest.mark.parametrize("url", ["mysql://admin:s3cret@127.0.0.1:{port}/", "mysql://admin@/?socket={socket}"])
async def test_unreachable(tmp_path: Path, url: str) -> None:
    """A cluster that refuses connections is unavailable, and no word of the sentence tells where it is."""
    with socket.socket() as nobody, socket.socket(socket.AF_UNIX) as unix:
        nobody.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "s"))
        url = url.format(port=nobody.getsockname()[1], socket=tmp_path / "s")
        engine = MySQL(admin_url=url, host="db", port=3306)
        for action in (
            engine.apply(new_target()),
            engine.drop("db_1"),
            engine.observe("db_1"),
            engine.names("db_"),
            engine.contents("db_1"),
            engine.restore("db_1", "x", pieces(b"DELIMITER")),
            dumped(engine, "db_1"),
        ):
            with pytest.raises(ClusterUnavailable, match=UNAVAILABLE):
                await action


async def test_silent() -> None:
    """A cluster that accepts the connection and says nothing is unavailable within seconds."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        engine = MySQL(admin_url=f"mysql://admin@127.0.0.1:{silent.getsockname()[1]}/", host="db", port=3306)
        begin = time.monotonic()
        with pytest.raises(ClusterUnavailable):
            await engine.apply(new_target())
        with pytest.raises(ClusterUnavailable):
            await engine.contents("db_1")
        assert time.monotonic() - begin < 12


async def test_wrong_admin_password(cluster: Cluster) -> None:
    """An admin who is refused is no passing trouble, and neither sentence nor cause has his password."""
    engine = cluster.with_operator(password="wr0ng")
    for action in (engine.apply(new_target()), engine.contents("db_1")):
        with pytest.raises(EngineError) as failure:
            await action
        assert type(failure.value) is EngineError
        assert "Access denied" in str(failure.value.__cause__)
        assert "wr0ng" not in f"{failure.value!r} {failure.value.__cause__!r}"


async def test_no_tls(cluster: Cluster) -> None:
    """Where a certificate is asked for, a server without TLS is never spoken to."""
    url = f"mysql://operator:x@127.0.0.1:{cluster.port}/?ssl-ca=/etc/ssl/certs/ca-certificates.crt"
    with pytest.raises(EngineError) as failure:
        await MySQL(admin_url=url, host="db", port=3306).names("db_")
    assert "SSL is required" in str(failure.value.__cause__)


async def test_statements_hold_no_password(cluster: Cluster, admin: Session, folder: Path) -> None:
    """No password gets into the log of all statements, whatever is done."""
    log = folder / "mysql/mariadb/general.log"
    run(admin, f"SET GLOBAL general_log_file = '{log}'", "SET GLOBAL general_log = 1")
    target = new_target()
    await cluster.engine.apply(target)
    await cluster.engine.apply(replace(target, password="an0ther"))
    await cluster.engine.apply(replace(target, password="an0ther", connections=9))
    data, _ = await dumped(cluster.engine, target.name)
    await cluster.engine.restore(target.name, "an0ther", pieces(data))
    await cluster.engine.drop(target.name)
    run(admin, "SET GLOBAL general_log = 0")
    text = log.read_text(errors="replace")
    assert f"CREATE USER '{target.name}'@'%'" in text
    assert f"ALTER USER '{target.name}'@'%'" in text
    assert target.password not in text
    assert target.password.replace("'", "\\'") not in text
    assert "an0ther" not in text


def test_connection() -> None:
    """The URI is percent-encoded, an IPv6 address gets brackets, and secrets stay out of representations."""
    engine = MySQL(admin_url="mysql://admin@/?socket=/s", host="::1", port=3306)
    connection = engine.connection("db_1", "a/b@c:é")
    assert connection.uri == "mysql://db_1:a%2Fb%40c%3A%C3%A9@[::1]:3306/db_1"
    assert (connection.host, connection.port, connection.database, connection.username) == ("::1", 3306, "db_1", "db_1")
    assert "a/b" not in repr(connection)


@pytest.mark.parametrize("url", ["postgresql://admin@host/", "mysql://host/", "mysql://admin@host/?sslca=x", "x"])
def test_admin_url(url: str) -> None:
    """An admin URL that is none, or has a setting that nobody knows, is refused before the first use."""
    with pytest.raises(ValueError, match="The admin URL must be"):
        MySQL(admin_url=url, host="db", port=3306)
