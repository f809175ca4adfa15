"""Programs: compiled graphs with named tensors and in-place caches, and the slots that use them (ours)."""
