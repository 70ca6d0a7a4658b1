"""`make bench`: how fast lists are answered and databases made, and that neither grows dearer as tables grow.

`__main__` runs the parts, `report` says what came of them, `ours` starts the server and calls it, `process` measures
and ends whatever was started.

`requests` puts the list under load beside the usual way to build the same: `seed` fills the database; `peers` says who
is compared, with `usual`, `data_path` and `empty` as their sources; `same` holds them to the same work; `load` and
`native` make the load; `revocation` checks a promise that caching could break.

The others need clusters, which `clusters` starts. `provisioning` waits for databases of every engine, beside the same
statements without us, which `bare` records and repeats. `backlog` has the reconciler work off many at once, also by
`faked`, on a cluster that does nothing. `growth` reads longer and longer tables.

`functions` calls some through a host in its sandbox, and `socks` carries bytes through a proxy, each beside programs
that do the same without us.
"""

import os

# Before gRPC is loaded, as in the command itself: we start programs, and it would log a line at each.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
