"""How the command line fails: one sentence on standard error, and a status that scripts can rely on."""

from __future__ import annotations


class CommandError(Exception):
    """The command failed (exit status 1); the message is one sentence that says what to do about it."""

    exit_code = 1


class UsageError(CommandError):
    """The command was called in a way that cannot work (exit status 2)."""

    exit_code = 2
