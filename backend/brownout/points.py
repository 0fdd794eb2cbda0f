"""Settings written short, one or a grid: MECHANISM[/OPTION]:WAYS:THRESHOLDS[:DECODE_THRESHOLDS]."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from backend.brownout.settings import MECHANISMS, RANKINGS, WITH_UNITED, Settings
from backend.errors import ConfigError

SYNTAX = (
    "MECHANISM[/OPTION]:WAYS:THRESHOLDS[:DECODE_THRESHOLDS], where WAYS and THRESHOLDS may be lists separated by commas and WAYS is "
    "0 for the mechanisms without united experts; OPTION is a ranking for united, united_top_k and drop, and the least similarity for reroute. "
    "Without DECODE_THRESHOLDS both phases have the same threshold. Examples: united:8:0.4  united/gate_mass:2,4,8:0,0.5  "
    "reroute/0.3:0:0.4  top_k:0:0.5  united:8:0.8:0,0.4"
)


def parse_points(texts: Iterable[str]) -> list[Settings]:
    """Settings of all texts in order, each once; raises ConfigError for one that is not in SYNTAX."""
    return list(dict.fromkeys(point for text in texts for point in _parse(text)))


def _parse(text: str) -> list[Settings]:
    fields = text.split(":")
    if not 3 <= len(fields) <= 4:
        raise ConfigError(f"settings {text!r} must be {SYNTAX}")
    mechanism, _, option = fields[0].partition("/")
    if mechanism not in MECHANISMS:
        raise ConfigError(f"settings {text!r}: mechanism must be one of {', '.join(MECHANISMS)}")
    extra: dict[str, object] = {}
    try:
        if option and mechanism == "reroute":
            extra["similarity_min"] = float(option)
        elif option in RANKINGS and mechanism in (*WITH_UNITED, "drop"):
            extra["ranking"] = option
        elif option:
            raise ValueError(f"option {option!r} is not known for {mechanism}")
        ways = [int(way) for way in fields[1].split(",")]
        thresholds = [[float(theta) for theta in field.split(",")] for field in fields[2:]]
    except ValueError as error:
        raise ConfigError(f"settings {text!r}: {error}; they must be {SYNTAX}") from None
    pairs = product(*thresholds) if len(thresholds) == 2 else ((theta, theta) for theta in thresholds[0])
    return [
        Settings(threshold_prefill=prefill, threshold_decode=decode, mechanism=mechanism, way=way, **extra)  # type: ignore[arg-type]
        for way, (prefill, decode) in product(ways, list(pairs))
    ]


def describe(settings: Settings) -> str:
    """The same short form for a reader."""
    option = f"/{settings.similarity_min:g}" if settings.mechanism == "reroute" else ""
    option = f"/{settings.ranking}" if settings.ranking != "count" else option
    same = settings.threshold_prefill == settings.threshold_decode
    thresholds = (settings.threshold_prefill,) if same else (settings.threshold_prefill, settings.threshold_decode)
    return ":".join([settings.mechanism + option, str(settings.way), *(f"{theta:g}" for theta in thresholds)])
