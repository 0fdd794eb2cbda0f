"""A load as a list of requests with intended start times, fixed before the first one is sent."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable

import msgspec

from backend.errors import ConfigError


class Arrival(msgspec.Struct, frozen=True):
    """One request to send: when (seconds from the run's start), how long, and its quality class."""

    at_s: float
    input_tokens: int
    output_tokens: int
    brownout: str = "auto"


class Schedule(msgspec.Struct, frozen=True):
    """All requests of a run, sorted by time; a request's index is its id. `bursts` are (from_s, until_s)."""

    arrivals: list[Arrival]
    duration_s: float
    bursts: list[tuple[float, float]] = []

    def sha256(self) -> str:
        """Digest of every request's time (in microseconds), lengths and class: equal loads have equal digests."""
        digest = hashlib.sha256()
        for a in self.arrivals:
            digest.update(f"{a.at_s:.6f},{a.input_tokens},{a.output_tokens},{a.brownout}\n".encode())
        return digest.hexdigest()

    def numbered(self) -> list[tuple[int, Arrival]]:
        return list(enumerate(self.arrivals))

    def part(self, index: int, count: int) -> list[tuple[int, Arrival]]:
        """The requests that sender `index` of `count` sends: every count-th, so that each sees the same shape."""
        return self.numbered()[index::count]


class Lengths:
    """A number of tokens: fixed, or uniform between two bounds. Written as `64` or `32-128`."""

    def __init__(self, text: str) -> None:
        """Raises ConfigError where the text is neither form, or asks for less than one token."""
        low, _, high = text.strip().partition("-")
        try:
            self.low, self.high = int(low), int(high or low)
        except ValueError:
            self.low = self.high = 0
        if not 1 <= self.low <= self.high:
            raise ConfigError(f"a number of tokens is N or LOW-HIGH with 1 <= LOW <= HIGH, got {text!r}")

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


def make_schedule(
    times_s: Iterable[float],
    duration_s: float,
    *,
    seed: int,
    input_tokens: Lengths,
    output_tokens: Lengths,
    never_share: float = 0.0,
    bursts: list[tuple[float, float]] | None = None,
) -> Schedule:
    """A schedule of requests at these times with lengths and classes drawn from `seed`."""
    rng = random.Random(f"lengths {seed}")
    arrivals = [
        Arrival(round(t, 6), input_tokens.draw(rng), output_tokens.draw(rng), draw_class(rng, never_share))
        for t in times_s
    ]
    return Schedule(arrivals, duration_s, bursts or [])


def draw_class(rng: random.Random, never_share: float) -> str:
    """`never` with the given probability."""
    if not (math.isfinite(never_share) and 0 <= never_share <= 1):
        raise ConfigError(f"the share of requests that are never browned out is 0 … 1, got {never_share:g}")
    return "never" if rng.random() < never_share else "auto"
