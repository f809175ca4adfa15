"""A server process around the small image engine of the tests: ``python -m tests.ops.serve_images SETTINGS``.

SETTINGS are JSON. It stands in where no bundle of an image model is served.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from realtide.server import logs
from realtide.server.app import serve
from realtide.server.config import load_config
from tests.engines.easycontrol.small import Small

if __name__ == "__main__":
    config = load_config(flags=json.loads(sys.argv[1]))
    logs.configure(config.log_level, config.log_format)
    engine: Any = Small().engine
    asyncio.run(serve(config, [engine]))
