"""A function's code as it is sent: what an archive may hold, how it is unpacked, and what a single file is called."""

import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath

MOST_FILES = 1000
MOST_FOLDERS = 1000  # named or not; deep paths would make far more folders than there are files
MOST_BYTES = 50 * 1024 * 1024  # of all files together, once unpacked
_LONGEST_PATH = 1024  # bytes
_LONGEST_NAME = 255  # bytes, as file systems have it
_CHUNK = 64 * 1024
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_UTF8 = 0x800
# The others of zipfile unpack a chunk as a whole, however large it becomes.
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
# Whatever zipfile meets in a damaged archive; it checks little itself.
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
)

_ENTRYPOINTS = {
    "python3": (re.compile(r"(?P<file>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)\.[A-Za-z_]\w*", re.ASCII), "`module.function`"),
    "nodejs": (re.compile(r"(?P<file>[\w./-]+)\.[A-Za-z_$][\w$]*", re.ASCII), "`file.export`"),
    "wasm": (re.compile(r"(?P<file>[\w./-]+\.(wasm|wat))", re.ASCII), "a file that ends in `.wasm` or `.wat`"),
}


class ArchiveError(Exception):
    """The code cannot be taken; the message is a sentence for the customer."""


def default_entrypoint(runtime: str, *, inline: bool = False) -> str:
    """Return what is called where the customer does not say; `inline` is code that is a single file."""
    if runtime == "wasm":
        return "main.wat" if inline else "main.wasm"
    return {"python3": "main.handler", "nodejs": "index.handler"}[runtime]


def source_file(runtime: str, entrypoint: str) -> str:
    """Return the path of the file that code of a single file becomes, such as `main.py`.

    Raises ArchiveError if the entrypoint is none of this runtime.
    """
    pattern, words = _ENTRYPOINTS[runtime]
    found = pattern.fullmatch(entrypoint)
    if found is None:
        raise ArchiveError(f"The entrypoint must be {words}, not '{entrypoint}'.")
    path = found["file"]
    if runtime == "python3":
        path = path.replace(".", "/") + ".py"
    elif runtime == "nodejs":
        path += ".mjs"
    return "/".join(_parts(path))


def check(archive: bytes) -> None:
    """Unpack an archive into nothing. Takes up to a second of CPU: call it in a thread.

    Raises ArchiveError, whose sentence says what is wrong with it.
    """
    with _opened(archive) as opened:
        for _path, entry in _entries(opened):
            for _chunk in _chunks(opened, entry):
                pass


def unpack(archive: bytes, folder: Path) -> None:
    """Unpack an archive into a folder that nobody else writes to, checking it all over again. Call it in a thread.

    Files become 0644 and folders 0755, whatever the archive says. Raises ArchiveError, and may then leave files behind.
    """
    with _opened(archive) as opened:
        for path, entry in _entries(opened):
            file = folder / path
            make_folders(folder, path)
            with file.open("xb") as out:
                for chunk in _chunks(opened, entry):
                    out.write(chunk)
            file.chmod(0o644)


def make_folders(folder: Path, path: PurePosixPath) -> None:
    """Make the folders of a file below a folder, so that everybody may pass through them."""
    for parent in reversed(path.parents[:-1]):
        made = folder / parent
        if not made.exists():
            made.mkdir()
            made.chmod(0o755)


@contextmanager
def _opened(archive: bytes) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(BytesIO(archive)) as opened:
            yield opened
    except _UNREADABLE:
        raise ArchiveError("The archive is not a zip file, or it is damaged.") from None


def _entries(opened: zipfile.ZipFile) -> list[tuple[PurePosixPath, zipfile.ZipInfo]]:
    """Return the files, after all rules that can be held against the list of them."""
    files: dict[tuple[str, ...], zipfile.ZipInfo] = {}
    folders: set[tuple[str, ...]] = set()
    for entry in opened.infolist():
        name = _name(entry)
        parts = _parts(name.removesuffix("/"))
        _check_kind(entry, name)
        for depth in range(1, len(parts)):
            folders.add(parts[:depth])
        if name.endswith("/"):
            folders.add(parts)
        elif parts in files:
            raise ArchiveError(f"The archive has '{name}' twice.")
        else:
            files[parts] = entry
        if len(files) > MOST_FILES:
            raise ArchiveError(f"The archive has more than {MOST_FILES:,} files.")
        if len(folders) > MOST_FOLDERS:
            raise ArchiveError(f"The archive has more than {MOST_FOLDERS:,} folders.")
    if both := folders & files.keys():
        raise ArchiveError(f"The archive has '{'/'.join(min(both))}' as a file and as a folder.")
    if sum(entry.file_size for entry in files.values()) > MOST_BYTES:
        raise ArchiveError(f"The archive is larger than {MOST_BYTES // 1024**2} MB once unpacked.")
    return [(PurePosixPath(*parts), entry) for parts, entry in files.items()]


def _name(entry: zipfile.ZipInfo) -> str:
    """Return the entry's name; what is not marked as UTF-8 zipfile has read as code page 437."""
    try:
        name = entry.orig_filename
        return name if entry.flag_bits & _UTF8 else name.encode("cp437").decode()
    except UnicodeError:
        raise ArchiveError("The archive has a file whose name is not UTF-8.") from None


def _parts(name: str) -> tuple[str, ...]:
    """Return the folders and the file that a path consists of; raise ArchiveError if it leads anywhere else."""
    parts = tuple(name.split("/"))
    if any(part in {"", ".", ".."} for part in parts):
        raise ArchiveError(f"The path {name!r} leads out of the function's folder, or is not written plainly.")
    if "\\" in name or not name.isprintable():
        raise ArchiveError(f"The path {name!r} has a backslash or a character that cannot be shown.")
    if len(name.encode()) > _LONGEST_PATH or any(len(part.encode()) > _LONGEST_NAME for part in parts):
        raise ArchiveError(f"The path '{name[:64]}…' is too long.")
    return parts


def _check_kind(entry: zipfile.ZipInfo, name: str) -> None:
    if stat.S_IFMT(entry.external_attr >> 16) not in {0, stat.S_IFREG, stat.S_IFDIR}:
        raise ArchiveError(f"'{name}' is neither a file nor a folder: links and devices cannot be taken.")
    if entry.flag_bits & _ENCRYPTED:
        raise ArchiveError(f"'{name}' is encrypted.")
    if entry.compress_type not in _METHODS:
        raise ArchiveError(f"'{name}' is compressed in another way than deflate.")


def _chunks(opened: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yield an entry's bytes: no more than it says, for there zipfile ends, and compares the checksum."""
    with opened.open(entry) as file:
        while chunk := file.read(_CHUNK):
            yield chunk
