"""A server process around the tests' engine: ``python -m tests.server.serve_bursts SETTINGS-AS-JSON``."""

from __future__ import annotations

import asyncio
import json
import sys

from realtide.server import logs
from realtide.server.app import serve
from realtide.server.config import load_config
from tests.server.engine import BurstEngine

if __name__ == "__main__":
    config = load_config(flags=json.loads(sys.argv[1]))
    logs.configure(config.log_level, config.log_format)
    asyncio.run(serve(config, [BurstEngine(slots=4)]))
