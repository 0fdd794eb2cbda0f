"""Benchmarks: `python -m loadtest.bench --help`."""

import backend  # noqa: F401  before torch, as where the product runs: it sets how torch allocates
