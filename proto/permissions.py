"""Print the table of who may call what, `docs/permissions.md`: `python proto/permissions.py`."""

import sys

from controlplane.access.permissions import SCOPES, known_permissions, permissions_of, permits
from controlplane.rpc.contract import Rpc, rpcs

_TEXT = """\
# Permissions

What each operation needs, and which credentials have it. Made by `make proto` from the rule that stands beside each
RPC; a test holds every cell against what the server answers.

- A permission is `resource:action`, such as `databases:list`. `databases:*` is every action on databases, also those
  that are yet to come; `*:*` is everything.
- A scope is a name for a set of permissions; the columns below show what is in it. `full` is `*:*`, `read` is whatever
  only reads, and a product's scope is that and all of the product.
- A token has a scope, or permissions of its own; its scope then reads `custom`.
- A login may do everything. What needs a login is refused to every token.

To make a token with exactly two permissions, log in and send this to `POST /api/portal/tokens`:

```json
{{"name": "monitoring", "permissions": ["databases:list", "databases:get"]}}
```

To find out the least that a program needs, let it do its work with a wider token, and wait for ten seconds, as uses are
written that often. Then `GET /api/portal/tokens/{{id}}` shows what it used, and in `least_privilege` what would have
done. A rotation with `{{"narrow": true}}` takes that over.

## Operations
{operations}

## All permissions
{permissions}
"""


def main() -> None:
    """Print the page on stdout."""
    columns = (*SCOPES, "login")
    head = ["operation", "RPC", "needs", *(f"`{scope}`" for scope in SCOPES), "login"]
    lines = [head, ["---"] * 3 + [":-:"] * len(columns)]
    lines += [
        [f"`{rpc.verb} {rpc.route}`", rpc.name, _need(rpc), *("✓" if _may(rpc, column) else "" for column in columns)]
        for rpc in rpcs().values()
    ]
    page = _TEXT.format(
        operations="\n".join(f"| {' | '.join(cells)} |" for cells in lines),
        permissions="\n".join(f"- `{permission}`" for permission in sorted(known_permissions())),
    )
    sys.stdout.buffer.write(page.encode())


def _need(rpc: Rpc) -> str:
    if rpc.access.public:
        return "nothing"
    if rpc.access.login:
        return "a login"
    return "any credential" if rpc.access.authenticated else f"`{rpc.access.permission}`"


def _may(rpc: Rpc, credential: str) -> bool:
    if rpc.access.public or rpc.access.authenticated or credential == "login":
        return True
    return not rpc.access.login and permits(permissions_of(credential), rpc.access.permission)


if __name__ == "__main__":
    main()
