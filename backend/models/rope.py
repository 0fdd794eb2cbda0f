"""Rotary frequencies and their scaling variants.

Every variant is reduced to one set of frequencies and one factor, functions of the checkpoint alone: cached keys are shared
between requests, so they must not depend on how long a sequence becomes. `dynamic` and `longrope` change frequencies once a
sequence outgrows the trained length; they are exact up to it, and the context is limited to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backend.errors import ConfigError

_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
#: Keys of each variant beside the common ones: required, optional.
_VARIANTS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "longrope": ({"short_factor", "long_factor"}, {"original_max_position_embeddings", "attention_factor", "factor"}),
}

_NUMBERS = (
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "low_freq_factor",
    "high_freq_factor",
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of a checkpoint; names as in Hugging Face's `rope_parameters`."""

    rope_type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    #: Trained length in tokens, where the variant needs it.
    original_max_position_embeddings: int = 0
    #: Multiplies cos and sin; None: the variant's own default.
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()

    @classmethod
    def from_raw(cls, raw: Mapping[str, object], default_theta: float, max_position_embeddings: int) -> RopeConfig:
        """From a config.json: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
        section = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(section, Mapping):
            raise ConfigError(f"config.json: rope_parameters must be an object, got {section!r}")
        values = {key: value for key, value in section.items() if value is not None}
        rope_type = str(values.get("rope_type", values.get("type", "default")))
        if rope_type not in _VARIANTS:
            raise ConfigError(
                f"config.json: rope type {rope_type!r} is not supported; one of {', '.join(_VARIANTS)} is"
            )
        required, optional = _VARIANTS[rope_type]
        for key in sorted(required - set(values)):
            raise ConfigError(f"config.json: rope type {rope_type!r} needs {key!r}")
        for key in sorted(set(values) - required - optional - _COMMON_KEYS):
            raise ConfigError(f"config.json: option {key!r} of rope type {rope_type!r} is not supported")
        partial = values.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise ConfigError(f"config.json: partial_rotary_factor {partial!r} is not supported, only 1.0 is")
        original = raw.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
        numbers = {key: _number(key, values[key]) for key in _NUMBERS if key in values}
        config = cls(
            rope_type=rope_type,
            theta=_number("rope_theta", values.get("rope_theta") or raw.get("rope_theta") or default_theta),
            original_max_position_embeddings=int(
                _number("original_max_position_embeddings", original or max_position_embeddings)
            ),
            truncate=bool(values.get("truncate", True)),
            short_factor=tuple(_number("short_factor", x) for x in values.get("short_factor", ())),
            **numbers,  # type: ignore[arg-type]
        )
        if config.factor < 1.0 or config.theta <= 0 or config.original_max_position_embeddings < 1:
            raise ConfigError("config.json: rope factor must be at least 1, and theta and lengths positive")
        if rope_type == "longrope" and "factor" not in values:
            factor = max_position_embeddings / config.original_max_position_embeddings
            config = replace(config, factor=max(factor, 1.0))
        return config

    def context_length(self, max_position_embeddings: int) -> int:
        """Longest sequence, in tokens, for which these frequencies are what the checkpoint means."""
        if self.rope_type == "yarn":
            return max(max_position_embeddings, int(self.original_max_position_embeddings * self.factor))
        if self.rope_type == "longrope":
            return min(max_position_embeddings, self.original_max_position_embeddings)
        return max_position_embeddings


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"config.json: rope option {key!r} must be a number, got {value!r}")
    return float(value)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] float32 and the factor on cos and sin."""
    pos_freqs = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    inv_freq = 1.0 / pos_freqs
    match rope.rope_type:
        case "linear":
            return inv_freq / rope.factor, 1.0
        case "yarn":
            return _yarn(rope, pos_freqs, head_dim)
        case "llama3":
            return _llama3(rope, inv_freq), 1.0
        case "longrope":
            return _longrope(rope, pos_freqs)
        case _:  # default, and dynamic within the trained length
            return inv_freq, 1.0


def _yarn(rope: RopeConfig, pos_freqs: Tensor, head_dim: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., arXiv 2309.00071): fast dimensions extrapolate, slow ones interpolate, a ramp between."""

    def dimension_of(rotations: float) -> float:
        wavelength = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    inv_freq = ramp / (rope.factor * pos_freqs) + (1 - ramp) / pos_freqs

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return inv_freq, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return inv_freq, magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return inv_freq, magnitude(1.0)


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, smoothly joined."""
    wavelength = 2 * math.pi / inv_freq
    length = rope.original_max_position_embeddings
    smooth = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq


def _longrope(rope: RopeConfig, pos_freqs: Tensor) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al., arXiv 2402.13753) within the trained length: the short factors."""
    if len(rope.short_factor) != len(pos_freqs):
        raise ConfigError(
            f"config.json: longrope short_factor must have {len(pos_freqs)} entries, got {len(rope.short_factor)}"
        )
    scaling = rope.attention_factor
    if scaling is None:
        length = math.log(rope.original_max_position_embeddings)
        scaling = math.sqrt(1 + math.log(rope.factor) / length) if rope.factor > 1 else 1.0
    return 1.0 / (torch.tensor(rope.short_factor, dtype=torch.float32) * pos_freqs), scaling
