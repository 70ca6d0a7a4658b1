"""Writes with a browser's cookie must come from our own page; a browser sends the cookie along from any."""

from urllib.parse import urlsplit

from controlplane.errors import CrossSite
from controlplane.rpc.call import Call


def check_same_site(call: Call) -> None:
    """Raise CrossSite for a write by cookie, or a login, that does not come from our own origin.

    `Sec-Fetch-Site` is what current browsers say of it and no page can forge; `Origin` is what older ones say. A write
    by cookie must have one of them; a login may have neither, as nothing is in the cookie yet to be abused.

    A GET is never held against it. The only one that writes ends the provider's own login: it comes from the provider's
    site by a redirect, and what proves that this browser began it is the cookie that it was given for that.
    """
    if call.rpc.verb == "GET" or (call.maybe_caller is not None and call.maybe_caller.kind == "token"):
        return
    site = call.metadata.get("sec-fetch-site")
    origin = call.metadata.get("origin")
    if site is not None:
        same = site == "same-origin"
    elif origin is not None:
        same = urlsplit(origin).netloc == call.metadata.get("x-htx-host")
    else:
        same = call.maybe_caller is None
    if not same:
        raise CrossSite
