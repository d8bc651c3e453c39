"""Measurements, each run as ``python -m benchmarks.NAME [--quick]``; the last line is one JSON object."""

import os

# gRPC reports closed connections on stderr, among the progress lines.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
