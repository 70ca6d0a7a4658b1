"""Whether a revoked token is dead on the very next request while the server is hot and remembers it."""

import sqlite3
import subprocess
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.bench.load import read_run
from tests.bench.peers import Peer, PeerError
from tests.bench.seed import Seed

_HOT = 3  # requests before it is revoked, so that it is surely remembered


@dataclass(frozen=True, slots=True)
class Revocation:
    """How many tokens were revoked, by the API and by another process, beside how many requests of the load."""

    by_api: int
    by_another_process: int
    requests: int


def check_revocation(ours: Peer, seed: Seed, storage: Path) -> Revocation:
    """Revoke tokens under load, each just after it was used, and use each once more.

    Raises PeerError if one still works, LoadError if the load had errors.
    """
    half = len(seed.revocable) // 2
    with (
        subprocess.Popen(ours.load, stdout=subprocess.PIPE, text=True) as load,
        httpx.Client(base_url=ours.url.removesuffix("/api/portal/databases")) as client,
    ):
        try:
            cookie = _log_in(client, seed)
            alive = sum(_works_after(client, secret, cookie, token_id) for secret, token_id in seed.revocable[:half])
            alive += sum(_works_after(client, secret, storage, token_id) for secret, token_id in seed.revocable[half:])
            output, _ = load.communicate()
        finally:
            load.terminate()
    if alive:
        raise PeerError(f"{alive} of {len(seed.revocable)} tokens still worked after they were revoked.")
    return Revocation(half, len(seed.revocable) - half, read_run(output).requests)


def _works_after(client: httpx.Client, secret: str, means: str | Path, token_id: str) -> bool:
    """Use a token, revoke it by a login's cookie or in the database's file, and tell whether it still works."""
    for _ in range(_HOT):
        _use(client, secret).raise_for_status()
    if isinstance(means, Path):
        _revoke_in_file(means, token_id)
    else:
        headers = {"cookie": means, "sec-fetch-site": "same-origin"}
        client.delete(f"/api/portal/tokens/{token_id}", headers=headers).raise_for_status()
    return _use(client, secret).status_code != httpx.codes.UNAUTHORIZED


def _use(client: httpx.Client, secret: str) -> httpx.Response:
    return client.get("/api/portal/databases", headers={"authorization": f"Bearer {secret}"})


def _log_in(client: httpx.Client, seed: Seed) -> str:
    body = {"email": seed.login.email, "password": seed.login.password}
    answer = client.post("/api/portal/session", json=body).raise_for_status()
    client.cookies.clear()
    cookie: str = answer.headers["set-cookie"].partition(";")[0]
    return cookie


def _revoke_in_file(storage: Path, token_id: str) -> None:
    connection = sqlite3.connect(storage, timeout=10, isolation_level=None)
    connection.execute("UPDATE tokens SET revoked_at = datetime('now') WHERE id = ?", (token_id,))
    connection.close()
