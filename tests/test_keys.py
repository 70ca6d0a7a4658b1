"""The server's keys: made once, rotated by adding one first, and never shown in an error."""

import base64
import hashlib
import hmac
import json
import secrets
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag

from controlplane.keys import KeyFileError, Keys


def new_key() -> str:
    """Return a key as the file holds it."""
    return base64.b64encode(secrets.token_bytes(32)).decode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the key file is, or will be."""
    return tmp_path / "keys.json"


@pytest.fixture
def keys(path: Path) -> Keys:
    """The keys of a first start."""
    return Keys.load(path)


def rotate(path: Path) -> Keys:
    """Put a new key before the others in each family, as an operator does."""
    old = json.loads(path.read_text())
    path.write_text(json.dumps({family: {"k2": new_key(), **keys} for family, keys in old.items()}))
    return Keys.load(path)


def test_the_first_start_makes_a_file_for_the_owner_alone(keys: Keys, path: Path) -> None:
    """The file that is made is found again, is the owner's alone, and nothing lies beside it."""
    assert Keys.load(path) == keys
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]
    assert Keys.load(path.with_name("other.json")) != keys


def test_first_starts_at_once_agree(path: Path) -> None:
    """Processes that start together on an empty folder all use the same keys."""
    program = (
        "import sys; from pathlib import Path; from controlplane.keys import Keys; sys.stdin.read();"
        "print(Keys.load(Path(sys.argv[1])).digest('x'))"
    )
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in racing:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    digests = {process.communicate()[0] for process in racing}
    assert len(digests) == 1
    assert digests.pop().startswith("k1:")
    assert list(path.parent.iterdir()) == [path]


def test_a_new_key_is_put_first(keys: Keys, path: Path) -> None:
    """After a rotation the old key still recognises and opens what it made, and the new one makes what is new."""
    digest, sealed = keys.digest("secret"), keys.encrypt(b"plain", bound_to="row")
    rotated = rotate(path)
    assert rotated.digest("secret").startswith("k2:")
    assert digest in rotated.digests("secret")
    assert rotated.decrypt(sealed, bound_to="row") == b"plain"
    anew = rotated.encrypt(b"plain", bound_to="row")
    assert anew.startswith("k2:")
    with pytest.raises(KeyError):
        keys.decrypt(anew, bound_to="row")


def test_what_is_sealed_opens_in_its_place_only(keys: Keys) -> None:
    """A sealed text that is moved to another row, or changed, does not open."""
    sealed = keys.encrypt(b"plain", bound_to="account/row")
    assert keys.decrypt(sealed, bound_to="account/row") == b"plain"
    with pytest.raises(InvalidTag):
        keys.decrypt(sealed, bound_to="account/other")
    key_id, _, text = sealed.partition(":")
    raw = bytearray(base64.b64decode(text))
    raw[-1] ^= 1
    with pytest.raises(InvalidTag):
        keys.decrypt(f"{key_id}:{base64.b64encode(raw).decode()}", bound_to="account/row")


def test_the_same_text_is_sealed_differently(keys: Keys) -> None:
    """Nobody sees in the database that two passwords are the same."""
    assert keys.encrypt(b"plain", bound_to="row") != keys.encrypt(b"plain", bound_to="row")
    assert b"plain" not in base64.b64decode(keys.encrypt(b"plain", bound_to="row").partition(":")[2])


def test_a_key_is_derived_for_one_purpose_and_one_salt(keys: Keys, path: Path) -> None:
    """Another purpose, salt or server key gives another key, and the same ones the same."""
    key_id, key = keys.derive("backup", b"salt")
    assert (key_id, len(key)) == ("k1", 32)
    others = [keys.derive("other", b"salt"), keys.derive("backup", b"pepper"), rotate(path).derive("backup", b"salt")]
    assert len({key, *(other for _, other in others)}) == 4
    assert keys.derive("backup", b"salt", key_id="k1") == (key_id, key)
    with pytest.raises(KeyError):
        keys.derive("backup", b"salt", key_id="")


def test_an_old_key_is_derived_again_by_its_id(keys: Keys, path: Path) -> None:
    """After a rotation the newest key is taken, and the old one for what names it."""
    old, rotated = keys.derive("backup", b"salt"), rotate(path)
    assert rotated.derive("backup", b"salt")[0] == "k2"
    assert rotated.derive("backup", b"salt", key_id="k1") == old


def test_a_key_is_derived_as_rfc_5869_has_it(keys: Keys) -> None:
    """What is derived is HKDF-SHA256 of the key: one step of extraction, one of expansion."""
    extracted = hmac.new(b"salt", base64.b64decode(keys.seal["k1"]), hashlib.sha256).digest()
    assert keys.derive("backup", b"salt")[1] == hmac.new(extracted, b"backup\x01", hashlib.sha256).digest()


def test_a_digest_is_of_the_secret_and_the_key(keys: Keys, path: Path) -> None:
    """Another secret, and another installation's key, give another digest."""
    assert keys.digest("a") == keys.digest("a") != keys.digest("b")
    assert Keys.load(path.with_name("other.json")).digest("a") != keys.digest("a")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "EOF"),
        ("{", "EOF"),
        ("[]", "should be an object"),
        ('{"mac": {"k1": "KEY"}}', "seal"),
        ('{"mac": {}, "seal": {"k1": "KEY"}}', "at least 1"),
        ('{"mac": {"k1": "KEY"}, "seal": {"k1": "KEY"}, "seel": {}}', "seel"),
        ('{"mac": {"k1": "KEY"}, "seal": {"k1": "c2hvcnQ="}}', "seal.k1: .* 32 bytes in base64, and is 5"),
        ('{"mac": {"k1": "MTYgYnl0ZXMsIG5vdCAzMg=="}, "seal": {"k1": "KEY"}}', "mac.k1: .* and is 16"),
        ('{"mac": {"k1": "KEY"}, "seal": {"2026:10": "KEY"}}', "seal.2026:10"),
        ('{"mac": {"k1": "KEY"}, "seal": {"' + 256 * "k" + '": "KEY"}}', "at most 255"),
        ('{"mac": {"k1": "KEY"}, "seal": {"k1": "KEY!"}}', "seal.k1: .* not base64"),
    ],
)
def test_a_broken_file_is_told_without_what_it_holds(path: Path, content: str, reason: str) -> None:
    """The message names the file and what is wrong, and no key."""
    key = new_key()
    path.write_text(content.replace("KEY", key))
    with pytest.raises(KeyFileError, match=reason) as broken:
        Keys.load(path)
    assert str(path) in str(broken.value)
    assert key not in str(broken.value)
    assert "c2hvcnQ" not in str(broken.value)
    assert broken.value.__suppress_context__


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """A folder in place of the file is one sentence, not an OSError."""
    with pytest.raises(KeyFileError, match="cannot be read"):
        Keys.load(tmp_path)
