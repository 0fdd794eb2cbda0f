"""What a controller may change while the engine runs."""

from __future__ import annotations

from dataclasses import dataclass

from backend.errors import ConfigError

#: Token classes of a thresholds table, in the order of `ForwardBatch.token_class`.
TOKEN_CLASSES = ("prefill", "decode", "prefill_never", "decode_never")
#: Added to a token's class when its request is never browned out.
NEVER = TOKEN_CLASSES.index("prefill_never")
#: What is done with the assignments that a threshold gives up; see `backend.kernels.reference.remap`.
MECHANISMS = ("united", "united_top_k", "reroute", "piggyback", "top_k", "drop")
#: Those that need united experts.
WITH_UNITED = ("united", "united_top_k")
_BY_TOKEN = ("piggyback", "top_k")
RANKINGS = ("count", "gate_mass")


@dataclass(frozen=True)
class Settings:
    """Thresholds theta: the share of routed assignments kept on original experts (1 = no brownout, 0 = full).

    `version` counts changes; it is reported with every response that asks for brownout information.
    """

    version: int = 0
    threshold_prefill: float = 1.0
    threshold_decode: float = 1.0
    mechanism: str = "united"
    #: Which loaded united experts serve (`united` and `united_top_k`); 0 is the largest way that is loaded.
    way: int = 0
    #: Least similarity of the expert that takes an assignment over (`reroute` only, which does nothing at theta = 0: no
    #: expert is kept to take over).
    similarity_min: float = 0.0
    #: What experts are ranked by to decide which are kept: their assignments, or the sum of their gate weights.
    ranking: str = "count"
    #: Resident expert pool: hold at most this share of each layer's experts (at least one expert, and no more than there are
    #: slots for).
    resident_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("threshold_prefill", "threshold_decode", "similarity_min", "resident_share"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} must be between 0 and 1, got {value}")
        if self.mechanism not in MECHANISMS:
            raise ConfigError(f"mechanism must be one of {', '.join(MECHANISMS)}, got {self.mechanism!r}")
        if self.ranking not in RANKINGS:
            raise ConfigError(f"ranking must be one of {', '.join(RANKINGS)}, got {self.ranking!r}")
        if self.way != 0 and not 2 <= self.way <= 64:
            raise ConfigError(f"way must be 0 (the largest that is loaded) or from 2 to 64, got {self.way}")

    def by_class(self) -> tuple[float, float, float, float]:
        """Threshold per token class; `never` requests keep every assignment (theta = 1)."""
        return self.threshold_prefill, self.threshold_decode, 1.0, 1.0

    @property
    def dims(self) -> bool:
        """Whether any assignment may be replaced."""
        return min(self.by_class()) < 1.0


@dataclass(frozen=True)
class Available:
    """What a loaded model can do: the ways of its united experts, ascending, and whether it knows expert similarities."""

    ways: tuple[int, ...] = ()
    similarity: bool = False
    #: Whether united experts stand in for experts that are not on the device, which `piggyback` and `top_k` know nothing of.
    missing_experts: bool = False
    #: Whether there is a resident expert pool.
    resident: bool = False

    @property
    def mechanisms(self) -> tuple[str, ...]:
        without = {"reroute": not self.similarity}
        without |= dict.fromkeys(WITH_UNITED, not self.ways) | dict.fromkeys(_BY_TOKEN, self.missing_experts)
        return tuple(name for name in MECHANISMS if not without.get(name))

    def way_of(self, settings: Settings) -> int:
        """The way that serves under these settings; 0 if there is none and none is needed.

        Raises ConfigError, naming what there is, for settings that need what is not loaded.
        """
        if settings.way and settings.way not in self.ways:
            raise ConfigError(f"way {settings.way} is not loaded; {self._loaded()}")
        if settings.mechanism in WITH_UNITED and settings.dims and not self.ways:
            raise ConfigError(
                f"mechanism {settings.mechanism} with a threshold below 1 needs united experts; {self._loaded()}"
            )
        if settings.mechanism == "reroute" and not self.similarity:
            raise ConfigError(
                "mechanism reroute needs expert similarities, which are not loaded (parameter similarity); available "
                f"mechanisms are {', '.join(self.mechanisms)}"
            )
        if settings.mechanism in _BY_TOKEN and settings.dims and self.missing_experts:
            raise ConfigError(
                f"mechanism {settings.mechanism} cannot stand in for missing experts (parameters expert_pool resident and "
                f"expert_miss united); available mechanisms are {', '.join(self.mechanisms)}"
            )
        if settings.resident_share < 1 and not self.resident:
            raise ConfigError(
                f"resident_share {settings.resident_share:g} needs a resident expert pool (parameter expert_pool resident); "
                "without one it can only be 1"
            )
        return settings.way or max(self.ways, default=0)

    def _loaded(self) -> str:
        ways = ", ".join(map(str, self.ways))
        return f"loaded ways are {ways}" if ways else "no united experts are loaded (parameter united)"
