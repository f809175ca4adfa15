"""The command line `realtide`. It imports nothing heavy before a command needs it."""

import os

# gRPC writes a line to standard error for each handshake that fails: strangers could fill a server's log with
# them, and they are not in its format. It looks at this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
