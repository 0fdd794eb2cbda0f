"""Which pool serves the experts, as parameters say it."""

from __future__ import annotations

from dataclasses import dataclass

from backend.errors import ConfigError

_WORKERS = "workers:"
MISSES = ("united", "wait")
PREFETCHES = ("auto", "predictor", "ewma", "none")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class PoolOptions:
    """See the parameters of these names in `backend.config.EngineConfig`. Raises ConfigError that names what is wrong."""

    expert_pool: str = "local"
    resident_experts: str = "0.5"
    expert_miss: str = "united"
    expert_prefetch: str = "auto"
    ray_address: str = ""
    worker_cpus: int | None = None
    exchange_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        if self.expert_pool not in ("local", "resident") and self.num_workers is None:
            raise ConfigError(
                f"parameter expert_pool must be local, resident or {_WORKERS}N with N workers, got {self.expert_pool!r}"
            )
        for name, allowed in (("expert_miss", MISSES), ("expert_prefetch", PREFETCHES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"parameter {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        self._share_or_bytes()

    @property
    def num_workers(self) -> int | None:
        """Workers that hold the experts; None: the engine itself does."""
        kind, _, number = self.expert_pool.partition(":")
        return int(number) if kind == "workers" and number.isdecimal() and int(number) > 0 else None

    @property
    def resident(self) -> bool:
        """Whether only some of the experts have slots."""
        return self.expert_pool == "resident"

    def slots(self, num_experts: int, num_layers: int, expert_bytes: int) -> int | None:
        """Slots of each of the `num_layers` layers with experts, in the engine or in each worker; None: one for each expert."""
        if self.expert_pool == "local":
            return None
        share, memory = self._share_or_bytes()
        if memory is None:
            return max(1, int(share * num_experts + 1e-9))
        if memory < num_layers * expert_bytes:
            raise ConfigError(
                f"parameter resident_experts gives {memory} bytes, but one expert of each of the {num_layers} layers needs "
                f"{num_layers * expert_bytes}"
            )
        return min(num_experts, memory // (num_layers * expert_bytes))

    def _share_or_bytes(self) -> tuple[float, int | None]:
        text = self.resident_experts
        number, unit = (text[:-1], text[-1].upper()) if text and text[-1].isalpha() else (text, "")
        try:
            value = float(number) * _UNITS[unit]
            if value > 0 and not unit and value <= 1:
                return value, None
            if 1 < value < 2**63:
                return 1.0, int(value)
        except (ValueError, KeyError):
            pass
        raise ConfigError(
            "parameter resident_experts must be a share of each layer's experts, above 0 and up to 1, or the bytes for all "
            f"resident experts, with K, M, G or T if wanted; got {text!r}"
        )
