"""The command line `realtide`. It imports nothing heavy before a command needs it."""
