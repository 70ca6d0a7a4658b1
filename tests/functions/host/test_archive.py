"""What an archive may hold, and that nothing of it lands anywhere else."""

import io
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.functions import archive
from controlplane.functions.archive import ArchiveError, check, default_entrypoint, source_file, unpack

MB = 1024 * 1024


def zip_of(*files: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip archive of these files."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as made:
        for name, content in files:
            made.writestr(name, content)
    return out.getvalue()


def of_kind(name: str, mode: int) -> zipfile.ZipInfo:
    """Return an entry that says it is of this kind."""
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    return entry


def with_flag(flag: int) -> Callable[[bytes], bytes]:
    """Return what sets a flag of the first file, in both places where it stands."""

    def change(archive: bytes) -> bytes:
        changed = bytearray(archive)
        changed[6] |= flag
        changed[archive.index(b"PK\x01\x02") + 8] |= flag
        return bytes(changed)

    return change


GOOD = zip_of(("main.py", b"import lib.a\n"), ("lib/a.py", b"A = 1\n"), ("lib/", b""), ("data/ä.txt", b""))


def test_a_good_archive_is_unpacked(tmp_path: Path) -> None:
    """Files and folders come out with their names and bytes, readable by everybody and written by us alone."""
    check(GOOD)
    unpack(GOOD, tmp_path)
    found = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*")}
    assert found.keys() == {"main.py", "lib", "lib/a.py", "data", "data/ä.txt"}
    assert found["lib/a.py"].read_bytes() == b"A = 1\n"
    assert {stat.S_IMODE(path.stat().st_mode) for path in found.values() if path.is_dir()} == {0o755}
    assert {stat.S_IMODE(path.stat().st_mode) for path in found.values() if path.is_file()} == {0o644}


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"", "not a zip file"),
        (b"not a zip", "not a zip file"),
        (GOOD[:-30], "not a zip file"),
        (zip_of(("../a", b"")), "leads out"),
        (zip_of(("a/../../b", b"")), "leads out"),
        (zip_of(("/etc/cron.d/a", b"")), "leads out"),
        (zip_of(("a//b", b"")), "leads out"),
        (zip_of(("./a", b"")), "leads out"),
        (zip_of(("..", b"")), "leads out"),
        (zip_of(("../", b"")), "leads out"),
        (zip_of(("a\\..\\b", b"")), "backslash"),
        (zip_of(("a\nb", b"")), "cannot be shown"),
        (zip_of(("a_b", b"")).replace(b"a_b", b"a\0b"), "cannot be shown"),
        (zip_of(("x" * 256, b"")), "too long"),
        (zip_of(("/".join(["x" * 100] * 11), b"")), "too long"),
        (zip_of((of_kind("a", stat.S_IFLNK | 0o777), b"/etc/passwd")), "neither a file nor a folder"),
        (zip_of((of_kind("a", stat.S_IFCHR | 0o666), b"")), "neither a file nor a folder"),
        (zip_of((of_kind("a", stat.S_IFIFO | 0o666), b"")), "neither a file nor a folder"),
        (zip_of(("a", b""), ("a/b", b"")), "as a file and as a folder"),
        (zip_of(("a", b""), ("a/", b"")), "as a file and as a folder"),
        (with_flag(0x1)(zip_of(("a", b"abc"))), "encrypted"),
        (zip_of(("a", b"abc"), method=zipfile.ZIP_BZIP2), "deflate"),
        (zip_of(("a", b"abc"), method=zipfile.ZIP_LZMA), "deflate"),
        (zip_of(("ab", b"")).replace(b"ab", b"\xff\xfe"), "not UTF-8"),
        (zip_of(("\u00e9", b"")).replace("\u00e9".encode(), b"\xff\xfe"), "not a zip file"),
        (zip_of(*((f"{number}", b"") for number in range(1001))), "more than 1,000 files"),
        (zip_of(*((f"{number}/", b"") for number in range(1001))), "more than 1,000 folders"),
        (zip_of(("/".join(["x"] * 500) + "/a", b""), ("y/" * 501 + "a", b"")), "more than 1,000 folders"),
        (zip_of(("a", bytes(50 * MB + 1))), "larger than 50 MB"),
        (zip_of(("a", bytes(25 * MB)), ("b", bytes(25 * MB + 1))), "larger than 50 MB"),
    ],
)
def test_a_bad_archive_is_refused(tmp_path: Path, sent: bytes, why: str) -> None:
    """Each has its own sentence, by `check` and by `unpack`, which does not trust that anybody has checked."""
    with pytest.raises(ArchiveError, match=why):
        check(sent)
    folder = tmp_path / "code"
    folder.mkdir()
    with pytest.raises(ArchiveError, match=why):
        unpack(sent, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


def test_a_file_that_comes_twice_is_refused() -> None:
    """Of two files with one name nobody could say which counts."""
    with pytest.warns(UserWarning, match="Duplicate"):
        sent = zip_of(("a", b"1"), ("a", b"2"))
    with pytest.raises(ArchiveError, match="twice"):
        check(sent)


def test_the_limits_are_reached(tmp_path: Path) -> None:
    """1,000 files, and 50 MB to the byte, are accepted."""
    check(zip_of(*((f"{number}", b"") for number in range(1000))))
    unpack(zip_of(("a", bytes(25 * MB)), ("b", bytes(25 * MB))), tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == archive.MOST_BYTES


@pytest.mark.parametrize("said", [0, 10, 2**31])
def test_a_size_that_is_a_lie_is_refused(tmp_path: Path, said: int) -> None:
    """An entry that says it is smaller than it is does not get past the limit, and none lies about itself."""
    sent = bytearray(zip_of(("a", bytes(60 * MB))))
    central = sent.index(b"PK\x01\x02")
    for place in (22, central + 24):
        sent[place : place + 4] = struct.pack("<I", said)
    with pytest.raises(ArchiveError):
        check(bytes(sent))
    with pytest.raises(ArchiveError):
        unpack(bytes(sent), tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1 * MB


def test_names_without_the_mark_of_utf8_are_read_as_utf8(tmp_path: Path) -> None:
    """Info-ZIP writes UTF-8 names unmarked, and they come out as they were."""
    sent = with_flag(0)(zip_of(("ä.py", b"")))
    unmarked = bytearray(sent)
    unmarked[7] &= ~0x08
    unmarked[sent.index(b"PK\x01\x02") + 9] &= ~0x08
    unpack(bytes(unmarked), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ä.py"]


@given(places=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=500)
def test_a_damaged_archive_is_refused_or_as_good_as_it_says(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]]
) -> None:
    """Whatever bytes are changed, there is an ArchiveError or an archive, and nothing outside of its folder."""
    sent = bytearray(GOOD)
    for place, byte in places:
        sent[place] = byte
    outer = tmp_path_factory.mktemp("outer")
    folder = outer / "code"
    folder.mkdir()
    try:
        check(bytes(sent))
    except ArchiveError:
        with pytest.raises(ArchiveError):
            unpack(bytes(sent), folder)
    else:
        unpack(bytes(sent), folder)
    assert [path.name for path in outer.iterdir()] == ["code"]
    assert not [path for path in folder.rglob("*") if path.is_symlink()]


@pytest.mark.parametrize(
    ("runtime", "entrypoint", "file"),
    [
        ("python3", "main.handler", "main.py"),
        ("python3", "app.views.index", "app/views.py"),
        ("nodejs", "index.handler", "index.mjs"),
        ("nodejs", "src/api.v1.get", "src/api.v1.mjs"),
        ("wasm", "main.wat", "main.wat"),
    ],
)
def test_where_a_single_file_goes(runtime: str, entrypoint: str, file: str) -> None:
    """The file is called so that the entrypoint finds it."""
    assert source_file(runtime, entrypoint) == file


@pytest.mark.parametrize(
    ("runtime", "entrypoint"),
    [
        ("python3", "main"),
        ("python3", "../main.handler"),
        ("python3", "main.py/handler"),
        ("python3", ".main.handler"),
        ("python3", "main.handler\n"),
        ("nodejs", "index"),
        ("nodejs", "../../index.handler"),
        ("nodejs", "/index.handler"),
        ("nodejs", "a//b.handler"),
        ("wasm", "main.py"),
        ("wasm", "a/../../main.wat"),
        ("wasm", "/main.wat"),
    ],
)
def test_an_entrypoint_that_is_none(runtime: str, entrypoint: str) -> None:
    """What is no entrypoint of the runtime, or leads out of the folder, is refused."""
    with pytest.raises(ArchiveError):
        source_file(runtime, entrypoint)


@pytest.mark.parametrize("runtime", ["python3", "nodejs", "wasm"])
def test_the_default_entrypoints_fit(runtime: str) -> None:
    """The entrypoint that holds where none is given is one of the runtime."""
    assert source_file(runtime, default_entrypoint(runtime, inline=True)).startswith(("main.", "index."))
    assert default_entrypoint("wasm") == "main.wasm"
