"""What a client says and is answered, before it is connected."""

import asyncio
import shutil
import socket
from datetime import UTC, datetime
from ipaddress import ip_network
from typing import Any

import pytest

from controlplane.proxies.host.socks import Limits
from tests.proxies.host.conftest import Names
from tests.proxies.host.proxy import (
    BIND,
    CONNECT,
    NO_ADDRESS_TYPE,
    NO_COMMAND,
    NO_HOST,
    NO_NETWORK,
    NOT_ALLOWED,
    PASSWORD,
    REFUSED,
    SUCCEEDED,
    Target,
    echo,
    login,
    new_credential,
    request,
    running,
)
from tests.stack import eventually, free_port

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"


async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request by HTTP."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(ANSWER)


@pytest.mark.parametrize("proxy_host", ["127.0.0.1", "[::1]"])
@pytest.mark.parametrize(("bound", "host"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("127.0.0.1", "localhost")])
async def test_curl_gets_through(proxy_host: str, bound: str, host: str) -> None:
    """A client that is not ours reaches IPv4, IPv6 and names, by a proxy of either family."""
    curl = shutil.which("curl")
    assert curl, "there is no curl: apt-get install curl"
    async with running() as proxy, Target(hello, bound) as target:
        by = f"px_1:{PASSWORD.decode().replace(' ', '%20')}@{proxy_host}:{proxy.port}"
        program = await asyncio.create_subprocess_exec(
            *(curl, "-q", "-sS", "--noproxy", "", "--max-time", "20", "--socks5-hostname", by),
            f"http://{host}:{target.port}/",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert await program.communicate() == (b"hello", b"")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", b"127.0.0.1", b"::1", b"localhost", b"LOCALHOST"])
async def test_a_host_is_an_address_or_a_name(host: str | bytes) -> None:
    """Both families and names are connected to; a name may also be an address in letters."""
    bound = "::1" if host in ("::1", b"::1") else "127.0.0.1"
    async with running() as proxy, Target(echo, bound) as target, proxy.dial() as client:
        await client.connect(host, target.port)
        assert await client.says(b"ping") == b"ping"


async def test_the_reply_has_the_address_that_the_target_sees() -> None:
    """The address and port in the reply are those from which the connection goes on."""
    seen: list[Any] = []

    async def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(writer.get_extra_info("peername"))

    async with running() as proxy, Target(note) as target, proxy.dial() as client:
        await client.log_in()
        reply, address, port = await client.ask(CONNECT, "127.0.0.1", target.port)
        await client.reader.read()
        assert (reply, seen) == (SUCCEEDED, [(str(address), port)])


async def test_nobody_answers() -> None:
    """A closed port is code 5, and is counted."""
    async with running() as proxy, proxy.dial() as client:
        await client.log_in()
        assert (await client.ask(CONNECT, "127.0.0.1", free_port()))[0] == REFUSED
        assert await client.reader.read() == b""
        assert proxy.refused("target") == 1
        assert proxy.usage().connections == 0


@pytest.mark.parametrize(
    ("host", "port", "reply", "reason"),
    [
        ("10.0.0.1", 80, NOT_ALLOWED, "destination"),
        ("::ffff:10.0.0.1", 80, NOT_ALLOWED, "destination"),
        ("fd00:ec2::254", 80, NOT_ALLOWED, "destination"),
        (b"169.254.169.254", 80, NOT_ALLOWED, "destination"),
        (b"0xa9fea9fe", 80, NOT_ALLOWED, "destination"),
        ("127.0.0.1", 25, NOT_ALLOWED, "port"),
        ("127.0.0.1", 0, NOT_ALLOWED, "port"),
        (b"nowhere.invalid", 80, NO_HOST, "name"),
        (b"", 80, NO_HOST, "name"),
        (b"localhost\0.example.com", 80, NO_HOST, "name"),
        (b"::1%lo", 80, NO_HOST, "name"),
        ("b\u00fccher.example".encode(), 80, NO_HOST, "name"),
        (b"a" * 255, 80, NO_HOST, "name"),
        ("224.0.0.1", 80, NO_NETWORK, "target"),
    ],
)
async def test_where_it_cannot_go_it_says_why(host: str | bytes, port: int, reply: int, reason: str) -> None:
    """What is forbidden is code 2, a name without an address code 4, no route code 3; each is counted by its reason."""
    allowed = [ip_network("127.0.0.0/8"), ip_network("224.0.0.0/4")]
    async with running(allowed=allowed) as proxy, proxy.dial() as client:
        await client.log_in()
        assert (await client.ask(CONNECT, host, port))[0] == reply
        assert await client.reader.read() == b""
        assert proxy.refused(reason) == 1


async def test_a_silent_target_is_given_up() -> None:
    """A target that never answers is code 4 after the deadline."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, socket.socket() as first:
        first.connect(deaf.getsockname())  # fills the queue: the kernel now ignores whoever wants in
        async with running(limits=Limits(connect_seconds=0.2)) as proxy, proxy.dial() as client:
            await client.log_in()
            assert (await client.ask(CONNECT, "127.0.0.1", deaf.getsockname()[1]))[0] == NO_HOST
            assert proxy.refused("timeout") == 1


@pytest.mark.parametrize(
    ("message", "reply"),
    [(request(BIND, "127.0.0.1", 80), NO_COMMAND), (b"\5\1\0\2\0\0\0\0\0\0", NO_ADDRESS_TYPE)],
)
async def test_what_is_not_known_is_said_to_be_so(message: bytes, reply: int) -> None:
    """BIND is code 7, an unknown kind of address code 8."""
    async with running() as proxy, proxy.dial() as client:
        await client.log_in()
        client.writer.write(message)
        assert (await client.reader.read())[:2] == bytes([5, reply])


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"\5\1\0", b"\5\xff"),
        (b"\5\2\0\1", b"\5\xff"),
        (b"\5\0", b"\5\xff"),
        (b"\4\1\0\x50\x7f\0\0\1\0", b""),
        (b"GET / HTTP/1.1\r\n\r\n", b""),
        (b"\5\1\2\5\1\0\1\x7f\0\0\1\0\x50", b"\5\2"),
        (b"\5\1\2" + login("px_1", PASSWORD) + b"\4\1\0\1\x7f\0\0\1\0\x50", b"\5\2\1\0"),
        (b"\5\1", b""),
        (b"", b""),
    ],
    ids=["none", "others", "empty", "socks4", "http", "no-login", "other-version", "half", "nothing"],
)
async def test_only_a_username_and_a_password_will_do(said: bytes, answer: bytes) -> None:
    """Who offers no password is told that no method will do; who speaks something else is told nothing."""
    async with running() as proxy, proxy.dial() as client:
        assert await client.says(said) == answer


@pytest.mark.parametrize(
    ("name", "password", "changes"),
    [
        ("px_1", b"wrong", {}),
        ("px_1", b"", {}),
        ("px_1", PASSWORD + b"\0", {}),
        ("px_2", PASSWORD, {}),
        ("", PASSWORD, {}),
        ("px_1", PASSWORD, {"networks": (ip_network("198.51.100.0/24"), ip_network("::/0"))}),
        ("px_1", PASSWORD, {"expires_at": datetime(2020, 1, 1, tzinfo=UTC)}),
    ],
    ids=["wrong", "empty", "longer", "unknown", "nobody", "address", "expired"],
)
async def test_all_wrong_logins_look_the_same(name: str, password: bytes, changes: dict[str, Any]) -> None:
    """A wrong password, an unknown name, another address and an expired credential get one and the same answer."""
    async with running(limits=Limits(first_delay=0)) as proxy, proxy.dial() as client:
        proxy.credentials.put(new_credential(**changes))
        assert await client.log_in(name, password) == 1
        assert await client.reader.read() == b""
        assert proxy.counted("htx_proxy_failed_logins_total") == 1
        assert proxy.refused("login") == 1


async def test_a_username_that_is_not_utf_8_is_unknown() -> None:
    """Bytes that are no text do not become a name that somebody has."""
    async with running(limits=Limits(first_delay=0)) as proxy, proxy.dial() as client:
        proxy.credentials.put(new_credential("px_\ufffd"))
        client.writer.write(b"\5\1\2\1\4px_\xff" + bytes([len(PASSWORD)]) + PASSWORD)
        assert await client.reader.read() == b"\5\2\1\1"


async def test_an_address_in_the_networks_comes_in() -> None:
    """A credential for some networks lets those in, and not others."""
    async with running(limits=Limits(first_delay=0)) as proxy:
        proxy.credentials.put(new_credential(networks=(ip_network("127.0.0.2/32"),)))
        async with proxy.dial(source="127.0.0.2") as right, proxy.dial(source="127.0.0.3") as wrong:
            assert [await right.log_in(), await wrong.log_in()] == [0, 1]


async def test_a_wrong_login_waits_for_its_answer() -> None:
    """The answer to a wrong login is held back, while a right one from the same address with the same name is not."""
    limits = Limits(first_delay=600, most_delay=600)
    async with running(limits=limits) as proxy, Target(echo) as target, proxy.dial() as wrong:
        wrong.writer.write(b"\5\1\2" + login("px_1", b"wrong"))
        await wrong.reader.readexactly(2)

        async def is_counted() -> bool:
            return proxy.counted("htx_proxy_failed_logins_total") == 1

        await eventually(is_counted)
        for _ in range(10):
            async with proxy.connected(target.port) as right:
                assert await right.says(b"ping") == b"ping"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wrong.reader.read(1), 0.1)


@pytest.mark.parametrize("size", [1, 3, 10_000])
async def test_a_client_may_send_everything_at_once_or_bit_by_bit(size: int) -> None:
    """All that a client says may come in one piece, payload and end included, or byte by byte."""
    async with running() as proxy, Target(echo) as target, proxy.dial() as client:
        said = b"\5\1\2" + login("px_1", PASSWORD) + request(CONNECT, "127.0.0.1", target.port) + b"payload" * 1000
        for start in range(0, 600, size):
            client.writer.write(said[start : min(start + size, 600)])
            await asyncio.sleep(0)
        answer = await client.says(said[600:])
        assert answer[:4] == b"\5\2\1\0"
        assert answer[4:6] == bytes([5, SUCCEEDED])
        assert answer[14:] == b"payload" * 1000


async def test_a_client_may_have_ended_before_it_is_connected(names: Names) -> None:
    """What a client has sent and ended before its target is found arrives, with its end."""
    names["slow.test"] = [["127.0.0.1"]]
    async with running() as proxy, Target(echo) as target, proxy.dial() as client:
        said = b"\5\1\2" + login("px_1", PASSWORD) + request(CONNECT, b"slow.test", target.port) + b"ping"
        answer = asyncio.create_task(client.says(said))

        async def is_open() -> bool:
            return proxy.credentials.open_sessions == 1

        await eventually(is_open)
        names.answer_slow()
        assert (await answer).endswith(b"ping")


async def test_the_longest_names_fit() -> None:
    """A username and a password of 255 bytes, and as many methods, are taken."""
    name, password = "n" * 255, b"p" * 255
    async with running() as proxy, proxy.dial() as client:
        proxy.credentials.put(new_credential(name, password=password))
        client.writer.write(bytes([5, 255]) + bytes([2]) * 255 + login(name, password))
        assert await client.reader.readexactly(4) == b"\5\2\1\0"


async def test_a_client_that_leaves_while_it_is_connected_leaves_nothing() -> None:
    """A client that breaks off before its target has answered is forgotten at once."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, socket.socket() as first:
        first.connect(deaf.getsockname())
        async with running(limits=Limits(connect_seconds=600)) as proxy:
            async with proxy.dial() as client:
                await client.log_in()
                client.writer.write(request(CONNECT, "127.0.0.1", deaf.getsockname()[1]))

                async def is_open() -> bool:
                    return proxy.credentials.open_sessions == 1

                await eventually(is_open)
                client.break_off()
            await proxy.quiet()
