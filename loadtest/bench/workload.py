"""The benchmark's workload and what is reported of a run."""

from __future__ import annotations

import os
import platform
import random
import statistics
from pathlib import Path

import msgspec
import torch


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """R requests at once with random prompts, greedy decoding, end-of-sequence ignored."""

    requests: int
    prompt_tokens: int
    new_tokens: int
    seed: int = 0

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids; the same for every engine that is compared. Low ids are left out: they may be special."""
        rng = random.Random(self.seed)
        low = min(300, vocab_size // 2)
        return [[rng.randrange(low, vocab_size) for _ in range(self.prompt_tokens)] for _ in range(self.requests)]


class Rates(msgspec.Struct, kw_only=True):
    """Throughput of one run, from the time for one new token and the time for all."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    output_tokens_per_s: float

    @classmethod
    def of(cls, work: Workload, first_s: float, all_s: float) -> Rates:
        return cls(
            prefill_tokens_per_s=work.requests * work.prompt_tokens / first_s,
            decode_tokens_per_s=work.requests * (work.new_tokens - 1) / (all_s - first_s),
            output_tokens_per_s=work.requests * work.new_tokens / all_s,
        )

    @classmethod
    def median(cls, runs: list[Rates]) -> Rates:
        return cls(**{f: statistics.median(getattr(run, f) for run in runs) for f in cls.__struct_fields__})


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    facts: dict[str, object] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch": str(torch.__version__),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def write_json(path: Path, result: object) -> None:
    """Replace the file at once, so that a reader never sees half of it; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    part.replace(path)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
