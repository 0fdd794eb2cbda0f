"""Block sizes of the grouped expert kernels: from a tuned file if one fits, else from a rule. Plain Python.

`python -m loadtest.bench tune` writes the files: `backend/kernels/tuned/experts-<hidden>-<size>-<dtype>-<GPU>.json`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

TUNED_DIR = Path(__file__).parent / "tuned"
#: The two kernels of each phase: gate, up and activation; down.
KERNELS = ("gate_up", "down")
#: A row of a tile is a token's assignment; tensor cores take at least this many.
LEAST_ROWS = 16
#: Shared memory that a program may use on the smallest GPU the rule is made for (A100: 163 KiB).
SHARED_MEMORY_BYTES = 160 * 1024


@dataclass(frozen=True)
class TileConfig:
    """Tile of one expert kernel: `rows` assignments by `columns` outputs, summed `depth` inputs at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "depth"):
            value = getattr(self, name)
            if value < LEAST_ROWS or value & (value - 1):
                raise ValueError(f"{name} must be a power of 2 from {LEAST_ROWS} on, got {value}")
        if self.num_warps not in (1, 2, 4, 8, 16) or not 1 <= self.num_stages <= 8:
            raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16 and num_stages from 1 to 8, got {self}")

    def shared_memory_bytes(self, matrices: int, itemsize: int) -> int:
        """Bytes that the pipeline of input tiles takes: `matrices` weight tiles and one of rows in each stage."""
        return self.num_stages * (matrices * self.columns + self.rows) * self.depth * itemsize


@dataclass(frozen=True)
class ExpertShape:
    """What block sizes are chosen by: P slots, hidden size M, expert size I, T tokens with K assignments each."""

    slots: int
    hidden: int
    size: int
    tokens: int
    top_k: int
    dtype: str
    device: str

    @property
    def phase(self) -> str:
        """`decode` while a slot serves few rows: then its weights are read once for all of them; else `prefill`."""
        few = self.tokens <= 64 or self.tokens * self.top_k <= 16 * self.slots
        return "decode" if few else "prefill"


@lru_cache(maxsize=4096)
def expert_tiles(shape: ExpertShape, folder: Path = TUNED_DIR) -> dict[str, TileConfig]:
    """A configuration for each of KERNELS in the shape's phase."""
    tuned = _nearest(_entries(folder / file_name(shape)), shape)
    return tuned if tuned is not None else default_tiles(shape)


def file_name(shape: ExpertShape) -> str:
    """Name of the file with the tuned configurations of these sizes on this GPU."""
    device = re.sub(r"[^A-Za-z0-9]+", "_", shape.device).strip("_")
    return f"experts-{shape.hidden}-{shape.size}-{shape.dtype}-{device}.json"


def default_tiles(shape: ExpertShape) -> dict[str, TileConfig]:
    """The rule for sizes that nobody has tuned."""
    itemsize = 4 if shape.dtype == "float32" else 2
    if shape.phase == "decode":
        rows = min(64, max(LEAST_ROWS, 1 << (shape.tokens - 1).bit_length()))
        # With few active slots narrow tiles give every processor something to read.
        columns = 32 if shape.tokens * shape.top_k <= 8 else 64
        # Tiles small enough that two or three programs share a processor: bytes in flight hide the memory's latency.
        stages = 3 if rows == 64 else 4
        wanted = {"gate_up": TileConfig(rows, columns, 64, 4, stages), "down": TileConfig(rows, columns, 64, 4, 4)}
    else:
        rows = 128 if shape.tokens * shape.top_k >= 96 * shape.slots else 64
        wanted = {"gate_up": TileConfig(rows, 64, 64, 8, 4), "down": TileConfig(rows, 128, 64, 8, 4)}
    return {
        kernel: _fitting(config, matrices=2 if kernel == "gate_up" else 1, itemsize=itemsize)
        for kernel, config in wanted.items()
    }


def write_entries(folder: Path, shape: ExpertShape, entries: Iterable[dict[str, object]]) -> Path:
    """Write tuned entries (see `entry`) into their file, in place of those it has for the same sizes; returns its path."""

    def key(one: dict[str, object]) -> tuple:
        return str(one["phase"]), int(one["slots"]), int(one["tokens"]), int(one["top_k"])

    path = folder / file_name(shape)
    folder.mkdir(parents=True, exist_ok=True)
    _entries.cache_clear()
    expert_tiles.cache_clear()
    ordered = [one for _, one in sorted({key(one): one for one in (*_entries(path), *entries)}.items())]
    part = path.with_suffix(".part")  # whoever reads meanwhile, or if this is cut off, finds the old file
    part.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    _entries.cache_clear()
    return path


def entry(shape: ExpertShape, tiles: dict[str, TileConfig]) -> dict[str, object]:
    """One tuned configuration as it stands in a file."""
    head = {"phase": shape.phase, "slots": shape.slots, "tokens": shape.tokens, "top_k": shape.top_k}
    return head | {kernel: asdict(config) for kernel, config in tiles.items()}


@lru_cache
def _entries(path: Path) -> tuple[dict[str, object], ...]:
    if not path.exists():
        return ()
    return tuple(json.loads(path.read_text(encoding="utf-8")))


def _nearest(entries: Iterable[dict[str, object]], shape: ExpertShape) -> dict[str, TileConfig] | None:
    """The entry of the same phase whose rows per slot and number of slots are nearest, in octaves.

    In decode only those, if there are any, whose tiles have the rows that the rule asks for: a slot that every token has would
    be read more than once.
    """

    def distance(candidate: dict[str, object]) -> tuple[float, float]:
        rows = candidate["tokens"] * candidate["top_k"]
        return (
            abs(math.log2(rows / candidate["slots"]) - math.log2(shape.tokens * shape.top_k / shape.slots)),
            abs(math.log2(candidate["slots"] / shape.slots)),
        )

    same_phase = [candidate for candidate in entries if candidate["phase"] == shape.phase]
    if not same_phase:
        return None
    if shape.phase == "decode":
        rows = default_tiles(shape)["gate_up"].rows
        same_phase = [one for one in same_phase if one["gate_up"]["rows"] >= rows] or same_phase
    best = min(same_phase, key=distance)
    return {kernel: TileConfig(**best[kernel]) for kernel in KERNELS}


def _fitting(config: TileConfig, matrices: int, itemsize: int) -> TileConfig:
    """The configuration with fewer stages, then less depth, until its tiles fit the shared memory."""
    while config.shared_memory_bytes(matrices, itemsize) > SHARED_MEMORY_BYTES:
        if config.num_stages > 2:
            config = TileConfig(config.rows, config.columns, config.depth, config.num_warps, config.num_stages - 1)
        else:
            config = TileConfig(config.rows, config.columns, config.depth // 2, config.num_warps, config.num_stages)
    return config
