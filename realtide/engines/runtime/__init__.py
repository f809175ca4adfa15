"""Programs: compiled graphs with named tensors and in-place caches, and the slots that use them (ours)."""

import os

# Since 1.32 onnxruntime keeps an identifier of the device and reports its use. What hears people speak
# reports to nobody, unless its operator says otherwise. This is read when onnxruntime is imported, so it
# stands before any module of the package.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
