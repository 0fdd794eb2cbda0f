"""The engine: scheduling, paged KV bookkeeping, running and sampling. `Engine` is usable without Triton."""
