"""The Triton Python model `brownout`: one call sets and reads the settings of every engine.

Values come as request parameters, the answer is the JSON `status`. What a call asks for is checked whole before anything
changes; it then stands in the shared block, where each engine finds it before its next step.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from backend.brownout.block import MAX_ENGINES, Block, BlockEmpty, BlockError, block_path
from backend.brownout.buckets import FIRST_S, NUM_BUCKETS, RATIO
from backend.brownout.control import Lease
from backend.brownout.profile import Level, find_profile
from backend.brownout.settings import MECHANISMS, Available, Settings
from backend.config import EngineConfig
from backend.errors import ConfigError, InvalidRequestError, UnavailableError
from backend.serving.model_parameters import engine_parameters, own_parameters
from backend.serving.protocol import runtime_dir
from backend.serving.triton_parameters import client_parameters

log = logging.getLogger(__name__)

TOKEN_ENV = "BROWNOUT_CONTROL_TOKEN"
VALUE_KEYS = ("threshold_prefill", "threshold_decode", "level", "way", "mechanism", "similarity_min", "resident_share")
#: threshold_floor: how far the owner may still dim both phases; engines refuse early only what even that would not save.
KEYS = (*VALUE_KEYS, "threshold_floor", "owner", "lease_s", "token")
DEFAULT_OWNER = "operator"
DEFAULT_LEASE_S = 10.0
MAX_LEASE_S = 86400.0
MAX_OWNER_BYTES = 128


@dataclass(frozen=True)
class Change:
    """What a call asks for: values by name (those of Settings), for whom and for how long."""

    values: dict[str, float | int | str]
    owner: str
    lease_s: float
    floor: float = 1.0


def parse_values(parameters: Mapping[str, object], levels: Sequence[Level]) -> dict[str, float | int | str]:
    """Values for Settings from parameters; a level is taken apart. Raises InvalidRequestError, naming key and range."""
    values: dict[str, float | int | str] = {}
    for name in ("threshold_prefill", "threshold_decode", "similarity_min", "resident_share"):
        if name in parameters:
            values[name] = _number(name, parameters[name], 0.0, 1.0)
    if "way" in parameters:
        way = _whole("way", parameters["way"])
        if way != 0 and not 2 <= way <= 64:
            raise InvalidRequestError(f"way must be 0 (the largest that is loaded) or from 2 to 64, got {way}")
        values["way"] = way
    if "mechanism" in parameters:
        mechanism = parameters["mechanism"]
        if mechanism not in MECHANISMS:
            raise InvalidRequestError(f"mechanism must be one of {', '.join(MECHANISMS)}, got {_show(mechanism)}")
        values["mechanism"] = str(mechanism)
    if "level" in parameters:
        both = sorted(values.keys() - {"similarity_min", "resident_share"})
        if both:
            raise InvalidRequestError(f"level sets {both[0]} itself: give one of the two")
        index = _whole("level", parameters["level"])
        if not levels:
            raise InvalidRequestError("level needs a calibrated profile, and none is loaded (parameter profile)")
        if not 0 <= index < len(levels):
            raise InvalidRequestError(f"level must be from 0 to {len(levels) - 1}, got {index}")
        level = levels[index]
        for name in ("threshold_prefill", "threshold_decode", "mechanism", "way"):
            values[name] = getattr(level, name)
        if level.mechanism == "reroute":
            values.setdefault("similarity_min", level.similarity_min)
    return values


def parse_change(parameters: Mapping[str, object], levels: Sequence[Level], token: str) -> Change | None:
    """What a call's parameters ask for, None to read only. `token`: the one to be presented for a change, if any.

    Raises InvalidRequestError, naming the parameter, and what is allowed.
    """
    given = client_parameters(parameters, KEYS)
    for key in given:
        if key not in KEYS:
            raise InvalidRequestError(f"unknown parameter {_show(key)}: known are {', '.join(KEYS)}")
    if given.keys() <= {"token"}:
        return None
    presented = str(given.get("token", ""))
    if token and not hmac.compare_digest(presented.encode(), token.encode()):
        what = "is wrong" if "token" in given else "is missing"
        raise InvalidRequestError(f"the token {what}: a change needs the server's {TOKEN_ENV} as parameter token")
    owner = given.get("owner", DEFAULT_OWNER)
    if not isinstance(owner, str) or not owner.isprintable() or not 0 < len(owner.encode()) <= MAX_OWNER_BYTES:
        raise InvalidRequestError(f"owner must be a name of 1 to {MAX_OWNER_BYTES} bytes, got {_show(owner)}")
    lease_s = _number("lease_s", given.get("lease_s", DEFAULT_LEASE_S), 0.0, MAX_LEASE_S)
    floor = _number("threshold_floor", given.get("threshold_floor", 1.0), 0.0, 1.0)
    return Change(parse_values(given, levels), owner, lease_s, floor)


class ControlPlane:
    """The writer of the block's settings section."""

    def __init__(self, block: Block, baseline: Settings, levels: Sequence[Level] = (), token: str = "") -> None:
        """Puts the baseline in force: a lease of before ends."""
        self._block = block
        self._levels = tuple(levels)
        self._token = token
        try:
            version = Lease.read(block).in_force(time.monotonic()).version
        except BlockError:
            version = 0
        self._lease = Lease.none(replace(baseline, version=version + 1))
        self._lease.write(block)

    def call(self, parameters: Mapping[str, object]) -> dict[str, object]:
        """Change what the parameters ask for, if anything; returns the status.

        Raises InvalidRequestError for a bad value and UnavailableError while another owner has a lease; nothing has changed
        then.
        """
        change = parse_change(parameters, self._levels, self._token)
        sections = self._telemetry()
        if change is not None:
            self._change(change, sections)
        return self._status(sections)

    def _change(self, change: Change, sections: Mapping[int, np.void]) -> None:
        now = time.monotonic()
        lease = self._lease
        if lease.live(now) and lease.owner != change.owner:
            raise UnavailableError(
                f"the settings are held by {lease.owner!r} for another {lease.left_s(now):.1f} s; retry then"
            )
        try:
            settings = replace(lease.in_force(now), **change.values)
            if change.lease_s > 0:
                for section in sections.values():
                    _available(section).way_of(settings)
        except ConfigError as error:
            raise InvalidRequestError(str(error)) from None
        self._lease = lease.granted(settings, change.owner, change.lease_s, now, change.floor)
        self._lease.write(self._block)

    def _telemetry(self) -> dict[int, np.void]:
        """The sections that can be read. One that is damaged is left out: its engine soon writes it again."""
        sections = {}
        for engine in range(MAX_ENGINES):
            try:
                sections[engine] = self._block.read_telemetry(engine)
            except BlockEmpty:
                continue
            except BlockError as error:
                log.warning("%s", error)
        return sections

    def _status(self, sections: Mapping[int, np.void]) -> dict[str, object]:
        now = time.monotonic()
        if self._damaged():
            self._lease.write(self._block)
        lease = self._lease
        settings = lease.in_force(now)
        available = [_available(section) for section in sections.values()]
        ways = set.intersection(*(set(one.ways) for one in available)) if available else set()
        everywhere = Available(
            tuple(sorted(ways)),
            all(one.similarity for one in available) and bool(available),
            any(one.missing_experts for one in available),
            all(one.resident for one in available) and bool(available),
        )
        return {
            "time_s": now,
            "settings": {
                "version": settings.version,
                **_values(settings),
                "owner": lease.owner if lease.live(now) else None,
                "lease_left_s": lease.left_s(now),
                "baseline": _values(lease.baseline),
            },
            "available": {
                "ways": list(everywhere.ways),
                "mechanisms": list(everywhere.mechanisms),
                "resident_share": everywhere.resident,
                "levels": [_level(index, level) for index, level in enumerate(self._levels)],
            },
            "buckets": {"first_s": FIRST_S, "ratio": RATIO, "count": NUM_BUCKETS},
            "telemetry": [_engine(index, section) for index, section in sections.items()],
        }

    def _damaged(self) -> bool:
        """Whether the section no longer says what was last written to it."""
        try:
            return Lease.read(self._block) != self._lease
        except BlockError as error:
            log.error("%s; it is written again", error)
            return True


def _available(section: np.void) -> Available:
    bits = int(section["ways"])
    ways = [way for way in range(2, 64) if bits >> way & 1] + ([64] if bits & 1 else [])
    flags = (bool(section[name]) for name in ("similarity", "missing_experts", "resident"))
    return Available(tuple(ways), *flags)


def _values(settings: Settings) -> dict[str, object]:
    names = ("threshold_prefill", "threshold_decode", "mechanism", "way", "similarity_min", "resident_share")
    return {name: getattr(settings, name) for name in names}


def _level(index: int, level: Level) -> dict[str, object]:
    return {"level": index, **asdict(level)}


def _engine(index: int, section: np.void) -> dict[str, object]:
    """An engine's telemetry as JSON values: scalars by name, bucket counts without trailing zeros, the last steps."""
    entry: dict[str, object] = {"engine": index}
    num_layers, num_steps = int(section["num_layers"]), int(section["num_steps"])
    for name in section.dtype.names:
        value = section[name]
        if name in ("ways", "similarity", "missing_experts", "resident"):
            continue
        if name == "active_slots":
            entry[name] = value[:num_layers].tolist()
        elif name.endswith("_counts"):
            entry[name] = np.trim_zeros(value, "b").tolist()
        elif name == "steps":
            # Oldest first; the last one is step number num_steps - 1.
            kept = min(num_steps, len(value))
            rows = [value[i % len(value)] for i in range(num_steps - kept, num_steps)]
            entry[name] = [[_short(number) for number in row.item()] for row in rows]
        elif isinstance(value, bytes):
            entry[name] = value.decode(errors="replace")
        else:
            entry[name] = value.item()
    return entry


def _short(number: float) -> float:
    """A float32 without the digits that it does not have."""
    return float(f"{number:.6g}") if isinstance(number, float) else number


def _number(name: str, value: object, low: float, high: float) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        raise InvalidRequestError(f"{name} must be a number from {low:g} to {high:g}, got {_show(value)}")
    return number


def _whole(name: str, value: object) -> int:
    number = _number(name, value, 0, 1e6)
    if number != int(number):
        raise InvalidRequestError(f"{name} must be a whole number, got {_show(value)}")
    return int(number)


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def baseline_settings(parameters: Mapping[str, str], levels: Sequence[Level]) -> Settings:
    """The baseline from the model's parameters; an empty value means the default. Raises ConfigError."""
    given = {key: value.strip() for key, value in parameters.items() if value.strip()}
    unknown = sorted(given.keys() - set(VALUE_KEYS))
    if unknown:
        raise ConfigError(f"unknown parameter {unknown[0]!r}; known parameters: {', '.join(VALUE_KEYS)}")
    try:
        return replace(Settings(), **parse_values(given, levels))
    except InvalidRequestError as error:
        raise ConfigError(f"parameter {error}") from None


def profile_levels(config: EngineConfig) -> tuple[Level, ...]:
    """The levels of the engines' profile: the parameter's file, else the checkpoint's own if it has one."""
    profile = find_profile(config.checkpoint, config.profile)
    return profile.levels if profile is not None else ()


class BrownoutModel:
    """The stub's side: parameters in, status out."""

    def __init__(self, pb_utils, args: Mapping[str, str]) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s stub %(levelname)s %(message)s", stream=sys.stderr)
        self._pb_utils = pb_utils
        name = args["model_name"]
        model_config = json.loads(args["model_config"])
        try:
            levels = profile_levels(EngineConfig.from_parameters(engine_parameters(name, model_config, args)))
            baseline = baseline_settings(own_parameters(model_config), levels)
        except ConfigError as error:
            raise pb_utils.TritonModelException(f"{name}: {error}") from None
        self._block = Block(block_path(runtime_dir()), os.getppid())
        self._plane = ControlPlane(self._block, baseline, levels, os.environ.get(TOKEN_ENV, ""))

    def execute(self, requests: list) -> list:
        """Answer each request at once."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        self._block.close()

    def _answer(self, request):
        pb_utils = self._pb_utils
        try:
            status = self._plane.call(json.loads(request.parameters() or "{}"))
        except InvalidRequestError as error:
            return self._error(str(error), pb_utils.TritonError.INVALID_ARG)
        except UnavailableError as error:
            return self._error(str(error), pb_utils.TritonError.UNAVAILABLE)
        except Exception as error:
            log.exception("a call failed")
            return self._error(f"the call failed: {error}", pb_utils.TritonError.INTERNAL)
        text = np.array([json.dumps(status).encode()], dtype=np.object_)
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("status", text)])

    def _error(self, message: str, code: int):
        return self._pb_utils.InferenceResponse(output_tensors=[], error=self._pb_utils.TritonError(message, code))
