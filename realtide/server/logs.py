"""Structured logs: one line an event, JSON or for people, with the session id of the task that logs."""

from __future__ import annotations

import json
import logging
import time
from contextvars import ContextVar
from typing import Any

# Set at the start of a stream's handler; tasks that it starts inherit it.
session_id: ContextVar[str] = ContextVar("session_id", default="")

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {
    "message",
    "asctime",
    "session",
}


class _SessionFilter(logging.Filter):
    """Adds the session id, unless the caller gave one (the executor's thread has no context of a session)."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "session"):
            record.session = session_id.get()
        return True


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, session, extra fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Render `record`."""
        milliseconds = int(record.created % 1 * 1000)
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{milliseconds:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if session := getattr(record, "session", ""):
            line["session"] = session
        line.update(_extras(record))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class ConsoleFormatter(logging.Formatter):
    """Time, level, logger, session and message for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Render `record`."""
        session = getattr(record, "session", "")
        parts = [
            time.strftime("%H:%M:%S", time.localtime(record.created))
            + f".{int(record.created % 1 * 1000):03d}",
            f"{record.levelname:<7}",
            record.name,
            *([f"[{session}]"] if session else []),
            record.getMessage(),
            *(f"{name}={value}" for name, value in _extras(record).items()),
        ]
        text = " ".join(parts)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure(level: str, form: str) -> None:
    """Send every log of the process to standard error. `form` is ``json`` or ``console``."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else ConsoleFormatter())
    handler.addFilter(_SessionFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
