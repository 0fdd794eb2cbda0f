"""Benchmarks: `python -m loadtest.bench --help`."""
