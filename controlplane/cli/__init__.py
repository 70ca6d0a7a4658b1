"""The operator's command, `controlplane`: `main.py`, and a module for each of its commands, which has its name."""

import os
import sys

# Before gRPC is loaded anywhere: it looks at these once. Its fork handlers are for programs that fork and go on; we
# start other programs, and it would log a line at each.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# structlog takes rich along where there is one, to colour tracebacks: 5 MB that a server has no use for.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
