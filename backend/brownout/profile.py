"""The calibrated profile of a checkpoint: settings in order of dimming, with what they cost and what they lose.

The file is `brownout-profile.json`; `backend.brownout.calibrate` writes it, controller and engine read it. Plain Python: no
tensor library here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.brownout.layer_thresholds import LayerThresholds
from backend.brownout.settings import Settings
from backend.errors import ConfigError

FORMAT = 1
PROFILE_NAME = "brownout-profile.json"


@dataclass(frozen=True)
class Level:
    """One point: settings, quality loss in percent of the full model's score, and cost at the profile's batch."""

    mechanism: str
    way: int
    threshold_prefill: float
    threshold_decode: float
    loss_percent: float
    #: Mean over the MoE layers, and per token and layer.
    active_slots: float
    assignments_per_token: float
    #: Decode step time relative to level 0.
    relative_step_time: float
    loss_by_task: dict[str, float] = field(default_factory=dict)
    similarity_min: float = 0.0
    ranking: str = "count"
    #: Share of assignments that other than their own experts served when the loss was measured.
    united_share: float = 0.0
    #: Time of a prefill step relative to level 0.
    relative_prefill_time: float = 1.0
    #: Mean loss in percent by further measures than the profile's.
    other_losses: dict[str, float] = field(default_factory=dict)

    def settings(self, version: int = 0) -> Settings:
        """What to set for this level."""
        return Settings(
            version, self.threshold_prefill, self.threshold_decode, self.mechanism, self.way, self.similarity_min, self.ranking
        )  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """Levels from 0, full quality; loss never falls from one to the next. `measure` says what the loss is of."""

    checkpoint: str
    fingerprint: str
    #: Sequences at once in all measurements.
    batch: int
    measure: str
    levels: tuple[Level, ...]
    #: By way of the united experts: the layers' own thresholds, with which all its levels were measured. Other ways and
    #: mechanisms have one threshold for all layers.
    layer_thresholds: dict[int, LayerThresholds] = field(default_factory=dict)


def deepest_within(levels: Sequence[Level], max_loss_percent: float) -> Level | None:
    """The fastest level that loses no more than that; None if even the first loses more."""
    allowed = [level for level in levels if level.loss_percent <= max_loss_percent]
    return min(allowed, key=lambda level: level.relative_step_time, default=None)


def write_profile(path: Path, profile: Profile) -> None:
    """Write the file, whole or not at all."""
    content = {"format": FORMAT, **asdict(profile), "united_share": [level.united_share for level in profile.levels]}
    content["layer_thresholds"] = {str(way): table.to_json() for way, table in profile.layer_thresholds.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)


def read_profile(path: Path, fingerprint: str | None = None) -> Profile:
    """Read and check a profile; with `fingerprint` also that it belongs to that checkpoint.

    Raises ConfigError naming the file and what is wrong with it.
    """
    try:
        raw = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"profile {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"profile {path} is not JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else raw
        raise ConfigError(f"profile {path} has format {found!r}, this version reads {FORMAT}")
    values = {name: _value(path, raw, name, kind) for name, kind in _PROFILE_FIELDS.items()}
    levels = _value(path, raw, "levels", list)
    if not levels:
        raise ConfigError(f"profile {path} has no levels")
    tables = _layer_thresholds(path, _value(path, raw, "layer_thresholds", dict) if "layer_thresholds" in raw else {})
    levels = tuple(_level(path, number, level) for number, level in enumerate(levels))
    profile = Profile(levels=levels, layer_thresholds=tables, **values)
    if fingerprint is not None and profile.fingerprint != fingerprint:
        raise ConfigError(
            f"profile {path} was made for another checkpoint (fingerprint {profile.fingerprint}, this one has {fingerprint}); "
            "make it again with backend.brownout.calibrate"
        )
    first = profile.levels[0]
    if first.settings().dims or first.loss_percent:
        raise ConfigError(f"profile {path}: level 0 must be full quality (thresholds 1, loss 0)")
    for number, (one, other) in enumerate(zip(profile.levels, profile.levels[1:], strict=False), 1):
        if other.loss_percent < one.loss_percent:
            raise ConfigError(
                f"profile {path}: level {number} loses {other.loss_percent} %, less than the {one.loss_percent} % of the level "
                "before it"
            )
    return profile


def find_profile(checkpoint: str, named: str = "") -> Profile | None:
    """The profile that serves a checkpoint: the file `named`, else the one in the checkpoint's folder if there is one.

    `named` "none" is none. Raises ConfigError for a file that cannot be read or belongs to another checkpoint.
    """
    folder = Path(checkpoint)
    path = Path(named) if named else folder / PROFILE_NAME
    if named == "none" or (not named and not path.is_file()):
        return None
    return read_profile(path, checkpoint_fingerprint(folder) if folder.is_dir() else None)


_PROFILE_FIELDS: dict[str, type] = {"checkpoint": str, "fingerprint": str, "batch": int, "measure": str}
_LEVEL_FIELDS: dict[str, type] = {
    "mechanism": str, "way": int, "threshold_prefill": float, "threshold_decode": float, "loss_percent": float,
    "active_slots": float, "assignments_per_token": float, "relative_step_time": float,
}  # fmt: skip
_OPTIONAL_FIELDS: dict[str, type] = {
    "loss_by_task": dict, "similarity_min": float, "ranking": str, "united_share": float, "relative_prefill_time": float,
    "other_losses": dict,
}  # fmt: skip


def _level(path: Path, number: int, raw: object) -> Level:
    where = f"levels[{number}]."
    if not isinstance(raw, dict):
        raise ConfigError(f"profile {path}: {where[:-1]} must be an object")
    values = {name: _value(path, raw, name, kind, where) for name, kind in _LEVEL_FIELDS.items()}
    values |= {name: _value(path, raw, name, kind, where) for name, kind in _OPTIONAL_FIELDS.items() if name in raw}
    if unknown := sorted(set(raw) - set(_LEVEL_FIELDS) - set(_OPTIONAL_FIELDS)):
        raise ConfigError(f"profile {path}: {where}{unknown[0]} is not known")
    level = Level(**values)
    try:
        level.settings()
    except ConfigError as error:
        raise ConfigError(f"profile {path}: levels[{number}]: {error}") from None
    return level


def _layer_thresholds(path: Path, raw: dict[str, Any]) -> dict[int, LayerThresholds]:
    tables = {}
    for way, table in raw.items():
        try:
            tables[int(way)] = LayerThresholds.from_json(table)
        except ValueError as error:
            raise ConfigError(f"profile {path}: layer_thresholds[{way!r}]: {error}") from None
    return tables


def _value(path: Path, raw: dict[str, Any], name: str, kind: type, where: str = "") -> Any:
    if name not in raw:
        raise ConfigError(f"profile {path}: {where}{name} is missing")
    value = raw[name]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is float and not math.isfinite(value)):
        raise ConfigError(f"profile {path}: {where}{name} must be of type {kind.__name__}, got {raw[name]!r}")
    return value
