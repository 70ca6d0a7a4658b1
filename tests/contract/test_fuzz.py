"""The OpenAPI document against the real thing, by schemathesis: no 5xx, no status or answer that is not documented."""

import asyncio
import json
import sys
from pathlib import Path

from controlplane.rpc.contract import rpcs
from tests.stack import Stack

EXAMPLES = 12  # of each operation, besides those that are worked out from its rules
SECONDS = 240
# Not held against it: that what fits the document is taken (whether a size fits an engine no schema can say), that what
# does not is refused (null stands for absent in JSON; tests/bad_input has the rest), and wrong methods (tests/edge).
LEFT_OUT = "positive_data_acceptance,negative_data_rejection,unsupported_method"
BY_LOGIN = {rpc.name for rpc in rpcs().values() if rpc.access.login}
ENDS_THE_LOGIN = {"DeleteSession"}


async def fuzz(stack: Stack, folder: Path, *, names: set[str], auth: dict[str, dict[str, str]]) -> str:
    """Run schemathesis over the operations of these names; return what it says, which is empty when all is well."""
    program = Path(sys.executable).with_name("schemathesis")
    config = folder / "schemathesis.toml"
    lines = [f"[auth.openapi.{scheme}]\n{key} = {json.dumps(value)}" for scheme, (key, value) in _pairs(auth)]
    config.write_text("\n".join([*lines, "[generation]", "with-security-parameters = false"]))
    address = f"http://127.0.0.1:{stack.settings.http_port}"
    options = [f"--include-operation-id={name}" for name in sorted(names)]
    options += ["--phases=examples,coverage,fuzzing", f"--max-examples={EXAMPLES}", "--seed=1", "--continue-on-failure"]
    options += [f"--exclude-checks={LEFT_OUT}", "--request-timeout=20", "--warnings=off", "--no-color"]
    options += ["-H", f"Origin: {address}", "--workers=1"]
    process = await asyncio.create_subprocess_exec(
        *(str(program), "--config-file", str(config), "run", f"{address}/api/openapi", *options),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    text = output.decode()
    assert f"Selected: {len(names)}/" in text, text
    return "" if process.returncode == 0 else text


def _pairs(auth: dict[str, dict[str, str]]) -> list[tuple[str, tuple[str, str]]]:
    return [(scheme, pair) for scheme, keys in auth.items() for pair in keys.items()]


async def test_what_a_token_may_do(stack: Stack, tmp_path: Path) -> None:
    """Every operation for tokens, by one that may do anything."""
    customer = await stack.customer()
    names = {rpc.name for rpc in rpcs().values() if not (rpc.access.login or rpc.access.public or rpc.waits)}
    problems = await fuzz(stack, tmp_path, names=names, auth={"bearerAuth": {"bearer": customer.token}})
    assert problems == "", problems


async def test_what_a_login_may_do(stack: Stack, tmp_path: Path) -> None:
    """Every operation for logins only, but the one that ends the login."""
    customer = await stack.customer()
    cookie = customer.cookie.partition("=")[2]
    problems = await fuzz(stack, tmp_path, names=BY_LOGIN - ENDS_THE_LOGIN, auth={"sessionCookie": {"api_key": cookie}})
    assert problems == "", problems


async def test_what_anybody_may_do(stack: Stack, tmp_path: Path) -> None:
    """Every operation that takes no credential."""
    problems = await fuzz(stack, tmp_path, names={rpc.name for rpc in rpcs().values() if rpc.access.public}, auth={})
    assert problems == "", problems
