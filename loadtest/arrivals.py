"""Arrival times of synthetic loads: renewal processes whose rate follows a profile. Pure and seeded.

A profile is a list of (from_s, requests per second), each rate holding until the next. Gaps are drawn at rate 1 and the
profile stretches them (time rescaling), so that a Poisson process keeps its statistics whatever the rate does, and a
coefficient of variation (CV) means the same at every rate.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from typing import ClassVar

from backend.errors import ConfigError

Profile = list[tuple[float, float]]

#: Constant pieces that stand for one period of a diurnal profile.
_DIURNAL_PIECES = 240


def arrival_times(profile: Profile, duration_s: float, rng: random.Random, cv: float = 1.0) -> Iterator[float]:
    """Times in [0, duration_s), ascending. cv: of the gaps' Gamma distribution; 1 is a Poisson process, 0 a metronome."""
    gaps = _unit_gaps(rng, cv)
    left = next(gaps)
    for (start, rate), (end, _) in itertools.pairwise([*profile, (duration_s, 0.0)]):
        now, end = start, min(end, duration_s)
        while rate > 0 and now + left / rate < end:
            now += left / rate
            yield now
            left = next(gaps)
        left -= rate * max(0.0, end - now)


def _unit_gaps(rng: random.Random, cv: float) -> Iterator[float]:
    """Gaps with mean 1: Gamma with shape 1/cv² (exponential for cv = 1)."""
    while True:
        yield rng.gammavariate(1 / cv**2, cv**2) if cv > 0 else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern:
    """A named load; its fields are the parameters a user may set. Rates are in requests per second."""

    name: ClassVar[str]

    duration: float = 60.0
    cv: float = 1.0

    def __post_init__(self) -> None:
        self._require("duration", self.duration > 0, "more than 0 s")
        self._require("cv", 0 <= self.cv <= 20, "0 … 20")

    def profile(self) -> Profile:
        raise NotImplementedError

    def bursts(self) -> list[tuple[float, float]]:
        """(from_s, until_s) of the times of high load."""
        return []

    def times(self, seed: int) -> list[float]:
        return list(arrival_times(self.profile(), self.duration, random.Random(f"arrivals {seed}"), self.cv))

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not (holds and math.isfinite(getattr(self, name))):
            raise ConfigError(f"arrivals {self.name}: {name} must be {allowed}, got {getattr(self, name):g}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisson(Pattern):
    """A steady rate with independent arrivals."""

    name = "poisson"
    rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("rate", self.rate > 0, "more than 0")

    def profile(self) -> Profile:
        return [(0.0, self.rate)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gamma(Poisson):
    """A steady mean rate whose gaps vary more (cv > 1: clumps) or less (cv < 1) than Poisson's."""

    name = "gamma"
    cv: float = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Pattern):
    """BrownoutServe's burst: the rate rises at `start`, by default to the double in mid-run, and falls back at `end`."""

    name = "step"
    base: float = 1.0
    burst: float | None = None  # default 2 × base
    start: float | None = None  # default: mid-run
    end: float | None = None  # default: the run's end

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "burst", 2 * self.base if self.burst is None else self.burst)
        object.__setattr__(self, "start", self.duration / 2 if self.start is None else self.start)
        object.__setattr__(self, "end", self.duration if self.end is None else self.end)
        self._require("base", self.base >= 0, "at least 0")
        self._require("burst", self.burst > 0, "more than 0")
        self._require("start", 0 <= self.start < self.duration, f"0 … {self.duration:g} s")
        self._require("end", self.start < self.end <= self.duration, f"between start and {self.duration:g} s")

    def profile(self) -> Profile:
        return [(0.0, self.base), (self.start, self.burst), (self.end, self.base)]

    def bursts(self) -> list[tuple[float, float]]:
        return [(self.start, self.end)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spike(Pattern):
    """Short bursts of `width` s to the rate `peak`, one every `every` s, the first after half of that."""

    name = "spike"
    base: float = 1.0
    peak: float | None = None  # default 5 × base
    width: float = 3.0
    every: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "peak", 5 * self.base if self.peak is None else self.peak)
        self._require("base", self.base >= 0, "at least 0")
        self._require("peak", self.peak > 0, "more than 0")
        self._require("every", self.every > 0, "more than 0 s")
        self._require("width", 0 < self.width < self.every, f"more than 0 and less than every = {self.every:g} s")

    def profile(self) -> Profile:
        return [(0.0, self.base), *((t, r) for a, b in self.bursts() for t, r in ((a, self.peak), (b, self.base)))]

    def bursts(self) -> list[tuple[float, float]]:
        starts = [self.every * (i + 0.5) for i in range(math.ceil(self.duration / self.every))]
        return [(t, min(t + self.width, self.duration)) for t in starts if t < self.duration]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diurnal(Pattern):
    """A day in short: the rate swings around `rate` like a cosine that starts at its lowest, rate × (1 ± swing)."""

    name = "diurnal"
    rate: float = 1.0
    swing: float = 0.8
    period: float | None = None  # default: the duration

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "period", self.duration if self.period is None else self.period)
        self._require("rate", self.rate > 0, "more than 0")
        self._require("swing", 0 <= self.swing <= 1, "0 … 1")
        self._require("period", self.period > 0, "more than 0 s")

    def profile(self) -> Profile:
        piece = self.period / _DIURNAL_PIECES
        return [
            (i * piece, self.rate * (1 - self.swing * math.cos(2 * math.pi * (i + 0.5) / _DIURNAL_PIECES)))
            for i in range(math.ceil(self.duration / piece))
        ]


PATTERNS: dict[str, type[Pattern]] = {kind.name: kind for kind in (Poisson, Gamma, Step, Spike, Diurnal)}
