"""Loads as one line of text, such as `step:base=2,duration=60` or `trace:FILE,time=0.5,rate=2`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec

from backend.errors import ConfigError
from loadtest.arrivals import PATTERNS
from loadtest.schedule import Lengths, Schedule, make_schedule
from loadtest.traces import Scaling, read_trace, scale_trace

TRACE = "trace"

HELP = (
    "NAME:KEY=VALUE,…: "
    + "; ".join(f"{name} ({', '.join(f.name for f in dataclasses.fields(kind))})" for name, kind in PATTERNS.items())
    + f"; or {TRACE}:FILE,KEY=VALUE,… ({', '.join(Scaling.__struct_fields__)}). Rates in requests/s, times in s"
)


def build_schedule(
    spec: str, *, seed: int = 0, input_tokens: str = "128", output_tokens: str = "64", never_share: float = 0.0
) -> Schedule:
    """The schedule that a specification asks for; a trace brings its own lengths.

    Raises:
        ConfigError: what is wrong in the specification and what is allowed.
    """
    name, _, rest = spec.strip().partition(":")
    if name == TRACE:
        file, _, rest = rest.partition(",")
        numbers = _parse(rest, Scaling.__struct_fields__, name)
        for key in {"max_input", "max_output"} & numbers.keys():
            numbers[key] = int(numbers[key])
        return scale_trace(read_trace(Path(file)), Scaling(**numbers), seed=seed, never_share=never_share)
    if name not in PATTERNS:
        raise ConfigError(f"arrivals: unknown load {name!r}; allowed are {', '.join([*PATTERNS, TRACE])}")
    kind = PATTERNS[name]
    pattern = kind(**_parse(rest, tuple(f.name for f in dataclasses.fields(kind)), name))
    schedule = make_schedule(
        pattern.times(seed),
        pattern.duration,
        seed=seed,
        input_tokens=Lengths(input_tokens),
        output_tokens=Lengths(output_tokens),
        never_share=never_share,
        bursts=pattern.bursts(),
    )
    if not schedule.arrivals:
        raise ConfigError(
            f"arrivals: {spec} has no request within {pattern.duration:g} s; raise a rate or the duration"
        )
    return schedule


def _parse(text: str, allowed: tuple[str, ...], name: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.partition("=")
        if key not in allowed:
            raise ConfigError(f"arrivals {name}: unknown key {key!r}; allowed are {', '.join(allowed)}")
        try:
            values[key] = msgspec.convert(value, float, strict=False)
        except msgspec.ValidationError:
            raise ConfigError(f"arrivals {name}: {key} must be a number, got {value!r}") from None
    return values
