"""The runtimes that functions can be written for: which are on this machine, and what each needs to see of it.

The files beside this one run inside the sandbox, by the system's own interpreters, and import nothing of ours.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Name = Literal["python3", "nodejs", "wasm"]

_HERE = Path(__file__).parent
_RUNNERS = ("python3.py", "nodejs.mjs", "wasm.py", "probe.py")
_PYTHON = Path("/usr/bin/python3")
_NODE = Path("/usr/bin/node")
_ABOUT_PYTHON = "import json, sysconfig as s; print(json.dumps([s.get_path('stdlib'), s.get_config_var('MULTIARCH')]))"
# Debian's Node.js reads some of its own modules from here.
_NODE_MODULES = Path("/usr/share/nodejs")
_TIME_ZONES = Path("/usr/share/zoneinfo")


@dataclass(frozen=True, slots=True)
class Runtime:
    """One runtime: its command in the sandbox, and what is mounted there, as path of this machine by path within."""

    command: tuple[str, ...]
    mounts: Mapping[str, Path]


def find_runtimes(folder: Path) -> dict[Name, Runtime]:
    """Return what this machine has, and put into `folder` what a tenant's user may not be able to reach elsewhere.

    Python 3 and Node.js are the distribution's: an interpreter in somebody's home would be closed to others.
    """
    runners = folder / "runners"
    runners.mkdir(exist_ok=True)
    runners.chmod(0o755)
    for file in _RUNNERS:
        shutil.copyfile(_HERE / file, runners / file)
        (runners / file).chmod(0o644)
    if not _PYTHON.exists():
        return {}
    library, architecture = json.loads(_ask(str(_PYTHON), "-ISc", _ABOUT_PYTHON))
    system = {
        path: Path(path) for path in (f"/usr/lib/{architecture}", "/usr/lib64", str(_TIME_ZONES)) if Path(path).is_dir()
    }
    system |= {str(path): path for path in Path("/usr/lib").glob("ld-linux*")}  # the loader of other architectures
    system["/runtime"] = runners
    python = {**system, "/usr/bin/python3": _PYTHON.resolve(), library: Path(library)}
    start_python = ("/usr/bin/python3", "-I", "-S", "-B", "-X", "utf8")
    found: dict[Name, Runtime] = {"python3": Runtime((*start_python, "/runtime/python3.py"), python)}
    if node := _find_node():
        modules = {str(_NODE_MODULES): _NODE_MODULES} if _NODE_MODULES.is_dir() else {}
        # Three quarters, so that it collects its garbage before the kernel finds that there is too much of it.
        start_node = ("/usr/bin/node", "--max-old-space-size={three_quarters_mb}", "/runtime/nodejs.mjs")
        found["nodejs"] = Runtime(start_node, {**system, **modules, "/usr/bin/node": node})
    if importlib.util.find_spec("wasmtime"):
        package = _copy_wasmtime(folder)
        found["wasm"] = Runtime((*start_python, "/runtime/wasm.py"), {**python, "/packages/wasmtime": package})
    return found


def _find_node() -> Path | None:
    """Return the Node.js that every user can start, or None."""
    for place in (_NODE, shutil.which("node")):
        if place and (path := Path(place).resolve()).exists() and all(_is_open(each) for each in path.parents):
            return path
    return None


def _is_open(folder: Path) -> bool:
    return bool(folder.stat().st_mode & 0o001)


def _copy_wasmtime(folder: Path) -> Path:
    """Copy the package wasmtime, compiled for the system's Python, once per version; return where it is."""
    place = folder / f"wasmtime-{importlib.metadata.version('wasmtime')}"
    if not place.exists():
        source = importlib.util.find_spec("wasmtime")
        assert source is not None  # noqa: S101 - it was there a moment ago
        assert source.origin is not None  # noqa: S101 - it is a package with an __init__.py
        unfinished = place.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(Path(source.origin).parent, unfinished, ignore=shutil.ignore_patterns("__pycache__"))
        _ask(str(_PYTHON), "-ISm", "compileall", "-q", str(unfinished))
        unfinished.rename(place)
    return place


def _ask(*command: str) -> str:
    environment = {"PATH": os.defpath, "LC_ALL": "C.UTF-8"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
