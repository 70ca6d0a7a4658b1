"""The cookies that a login needs: read, set and taken back."""

from collections.abc import Mapping

from controlplane.rpc.call import Call

# Of this host alone, over HTTPS, out of reach of scripts. Not Strict: a link from elsewhere into the portal would find
# nobody logged in. No write is let in by a cookie that another page made the browser send (access/same_site.py).
_ATTRIBUTES = "Path=/; Secure; HttpOnly; SameSite=Lax"


def find_cookie(metadata: Mapping[str, str], name: str) -> str | None:
    """Return the value of a cookie that came along, if it did; cookies that cannot be read are none."""
    for cookie in metadata.get("cookie", "").split(";"):
        given, _, value = cookie.strip().partition("=")
        if given == name:
            return value
    return None


def set_cookie(call: Call, name: str, value: str, *, seconds: int) -> None:
    """Give the browser a cookie along with the answer."""
    call.headers.append(("set-cookie", f"{name}={value}; Max-Age={seconds}; {_ATTRIBUTES}"))


def clear_cookie(call: Call, name: str) -> None:
    """Tell the browser to forget a cookie."""
    set_cookie(call, name, "", seconds=0)
