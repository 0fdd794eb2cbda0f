"""What a controller may change while the engine runs."""

from __future__ import annotations

from dataclasses import dataclass

from backend.errors import ConfigError

#: Token classes of a thresholds table, in the order of `ForwardBatch.token_class`.
TOKEN_CLASSES = ("prefill", "decode", "prefill_never", "decode_never")
#: What is done with the assignments that a threshold gives up; see `backend.kernels.reference.remap`.
MECHANISMS = ("united", "reroute", "piggyback", "top_k", "drop")


@dataclass(frozen=True)
class Settings:
    """Thresholds theta: the share of routed assignments kept on original experts (1 = no brownout, 0 = full).

    `version` counts changes; it is reported with every response that asks for brownout information.
    """

    version: int = 0
    threshold_prefill: float = 1.0
    threshold_decode: float = 1.0
    mechanism: str = "united"
    #: Which loaded united experts serve (`united` only); 0 is the largest way that is loaded.
    way: int = 0
    #: Least similarity of the expert that takes an assignment over (`reroute` only).
    similarity_min: float = 0.0

    def __post_init__(self) -> None:
        for name in ("threshold_prefill", "threshold_decode", "similarity_min"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} must be between 0 and 1, got {value}")
        if self.mechanism not in MECHANISMS:
            raise ConfigError(f"mechanism must be one of {', '.join(MECHANISMS)}, got {self.mechanism!r}")
        if self.way != 0 and not 2 <= self.way <= 64:
            raise ConfigError(f"way must be 0 (the largest that is loaded) or from 2 to 64, got {self.way}")

    def by_class(self) -> tuple[float, float, float, float]:
        """Threshold per token class; `never` requests keep every assignment (theta = 1)."""
        return self.threshold_prefill, self.threshold_decode, 1.0, 1.0
