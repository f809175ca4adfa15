import sys

import numpy as np

from realtide.server.probe import probe
from realtide_client import sync

admin, server = sys.argv[1:]
state = probe(admin, timeout=20)
print(f"{admin}: {state}")
if state != "SERVING":
    raise SystemExit(1)
if server:
    with sync.connect(server) as client:
        if probe(server, "realtide.v1.Speech") == "SERVING":
            with client.speech(sample_rate=16000) as stream:
                stream.send(np.zeros(16000, np.float32))
                stream.finish()
                print("speech:", len(list(stream)), "results")
        if probe(server, "realtide.v1.Video") == "SERVING":
            with client.video(prompt="a red apple", length_frames=9) as stream:
                print("video:", len(list(stream)), "events")
