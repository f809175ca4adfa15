"""Generated protobuf and gRPC stubs of `proto/realtide/v1` (written by tools/generate_stubs.py)."""
