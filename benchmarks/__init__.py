"""Benchmarks: `python -m benchmarks.NAME [--quick]`, one JSON object as the last line."""
