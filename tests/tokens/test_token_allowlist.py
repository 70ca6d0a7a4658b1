"""From where a token may be used: the address that the edge saw, or the socket's, and nothing that a client says."""

import grpc
import pytest

from controlplane.api.v1 import databases_pb2, databases_pb2_grpc
from tests.doors import Door, Native, Rest
from tests.stack import Customer, Stack

ELSEWHERE = "203.0.113.7"
FORGED = (
    "x-forwarded-for",
    "forwarded",
    "x-real-ip",
    "true-client-ip",
    "cf-connecting-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-htx-client-ip",
    "x-htx-host",
    "x-envoy-external-address",
    "x-envoy-internal",
    "x-envoy-original-path",
    "x-envoy-downstream-remote-address",
    "x-original-forwarded-for",
    "via",
)
READS = ("ListDatabases", "GetAccount", "GetMe", "ListPlans", "ListFunctions")


async def test_the_list_holds_everywhere(somebody: Customer, door: Door) -> None:
    """A token is refused from an address that is not on its list, reads and /account/me included."""
    elsewhere = await somebody.new_token(allowed_ips=[ELSEWHERE, "2001:db8::/32"])
    here = await somebody.new_token(allowed_ips=[ELSEWHERE, "127.0.0.0/8"])
    for rpc in READS:
        refused = await door.call(rpc, authorization=f"Bearer {elsewhere['token']}")
        assert (refused.code, "127.0.0.1" in refused.sentence) == ("ip_denied", True)
        assert (await door.call(rpc, authorization=f"Bearer {here['token']}")).code == "ok"
    new = {"database": {"name": "a", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}}
    assert (await door.call("CreateDatabase", new, authorization=f"Bearer {elsewhere['token']}")).code == "ip_denied"
    assert (await somebody.call("GET", "/api/portal/databases")).json() == []


@pytest.mark.parametrize("value", [ELSEWHERE, f"for={ELSEWHERE}", f"{ELSEWHERE}, 127.0.0.1", f"127.0.0.1, {ELSEWHERE}"])
async def test_no_header_changes_the_address(somebody: Customer, stack: Stack, door: Door, value: str) -> None:
    """Headers in which proxies tell a client's address, and our own, are not believed from a client."""
    token = (await somebody.new_token(allowed_ips=[ELSEWHERE]))["token"]
    through_the_edge = grpc.aio.insecure_channel(f"127.0.0.1:{stack.settings.http_port}")
    async with through_the_edge as channel:
        for each in (door, Native(channel)):
            for names in (*([name] for name in FORGED), FORGED):
                headers = dict.fromkeys(names, value)
                answer = await each.call("ListDatabases", None, authorization=f"Bearer {token}", **headers)
                assert answer.code == "ip_denied", names
                assert "127.0.0.1" in answer.sentence


async def test_no_header_changes_the_address_of_a_changed_token(somebody: Customer, door: Door) -> None:
    """Headers are not believed either about a token that was used before its list was changed."""
    made = await somebody.new_token()
    token = {"authorization": f"Bearer {made['token']}"}
    assert (await door.call("ListDatabases", None, **token)).code == "ok"
    change = {"allowed_ips": [ELSEWHERE]}
    assert (await somebody.by_login("PATCH", f"/api/portal/tokens/{made['id']}", json=change)).status_code == 200
    for names in (*([name] for name in FORGED), FORGED):
        answer = await door.call("ListDatabases", None, **token, **dict.fromkeys(names, ELSEWHERE))
        assert answer.code == "ip_denied", names


async def test_a_refusal_for_the_address_tells_the_rate_and_costs_nothing(somebody: Customer, door: Door) -> None:
    """A token that is refused for where it is learns what is left of its limit, of which the refusal takes nothing."""
    made = await somebody.new_token(rate_limit_per_minute=5)
    token = {"authorization": f"Bearer {made['token']}"}
    path = f"/api/portal/tokens/{made['id']}"
    assert (await door.call("ListDatabases", None, **token)).headers["ratelimit-remaining"] == "4"
    assert (await somebody.by_login("PATCH", path, json={"allowed_ips": [ELSEWHERE]})).status_code == 200
    for _ in range(10):
        refused = await door.call("ListDatabases", None, **token)
        limits = {name: refused.headers[f"ratelimit-{name}"] for name in ("limit", "remaining")}
        assert (refused.code, limits) == ("ip_denied", {"limit": "5", "remaining": "4"})
        assert 1 <= int(refused.headers["ratelimit-reset"]) <= 60
    assert (await somebody.by_login("PATCH", path, json={"allowed_ips": []})).status_code == 200
    assert (await door.call("ListDatabases", None, **token)).headers["ratelimit-remaining"] == "3"


async def test_no_header_makes_a_native_caller_a_rest_caller(somebody: Customer, stack: Stack) -> None:
    """What the edge tells the server about a REST caller is not believed from a native one, at neither port."""
    token = ("authorization", f"Bearer {somebody.token}")
    for name in ("one", "two"):
        body = {"name": name, "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}
        assert (await somebody.call("POST", "/api/portal/databases", json=body)).status_code == 201
    for port in (stack.settings.grpc_port, stack.settings.http_port):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = databases_pb2_grpc.DatabaseServiceStub(channel)
            listing = stub.ListDatabases(
                databases_pb2.ListDatabasesRequest(page_size=1),
                metadata=(token, ("x-envoy-original-path", "/api/portal/databases"), ("x-request-id", "mine")),
            )
            assert (await listing).next_page_token
            metadata = dict(await listing.initial_metadata() or ())
            assert "link" not in metadata
            assert metadata["x-request-id"] != "mine"


async def test_a_login_has_no_list(somebody: Customer, stack: Stack) -> None:
    """A browser login is not bound to the addresses of any token."""
    await somebody.new_token(allowed_ips=[ELSEWHERE])
    assert (await Rest(stack.rest).call("ListDatabases", cookie=somebody.cookie)).code == "ok"
