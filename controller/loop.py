"""The loop: read, decide, set, log. Whatever is unknown changes nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from backend.brownout.profile import Level, deepest_within
from backend.brownout.step_model import StepModel
from backend.errors import ConfigError
from controller.client import Held, Plane, Refused, Unreachable
from controller.config import ControllerConfig
from controller.event_log import Event, EventLog
from controller.laws import LAWS, Law, Limits, Predictive
from controller.metrics import Metrics
from controller.reading import Reading
from controller.window import Window

log = logging.getLogger("controller")


def make_law(config: ControllerConfig, levels: Sequence[Level], model: StepModel | None) -> tuple[Law, dict]:
    """The law within the quality budget, and the settings besides thresholds that it is to run with.

    The budget allows every pair of thresholds that is nowhere below the deepest level within it: all of them lose less.
    """
    floor_prefill, floor_decode = config.min_threshold_prefill, config.min_threshold_decode
    extra: dict[str, float | int | str] = {}
    if config.max_quality_loss is not None:
        deepest = _deepest_allowed(levels, config)
        if deepest is None:
            floor_prefill = floor_decode = 1.0
        else:
            floor_prefill = max(floor_prefill, deepest.threshold_prefill)
            floor_decode = max(floor_decode, deepest.threshold_decode)
            extra = {"mechanism": deepest.mechanism, "way": deepest.way}
    if config.law == "off":
        floor_prefill = floor_decode = 1.0
    given = {name: getattr(config, name) for name in ("mechanism", "way", "resident_share")}
    extra |= {name: value for name, value in given.items() if value is not None}
    limits = Limits(config.ttft_slo_s, config.itl_slo_s, floor_prefill, floor_decode)
    if config.law == "predictive":
        law = Predictive(
            limits,
            margin=config.margin,
            hysteresis=config.hysteresis,
            brighten_per_s=config.brighten_rate,
            model=model,
        )
        return law, extra
    return LAWS[config.law](limits), extra


def _deepest_allowed(levels: Sequence[Level], config: ControllerConfig) -> Level | None:
    """The fastest level within the quality budget, None if there is none. Raises ConfigError without usable levels."""
    usable = [
        level for level in levels if config.mechanism in (None, level.mechanism) and config.way in (None, level.way)
    ]
    if not usable:
        raise ConfigError(
            "max_quality_loss needs the levels of a calibrated profile (of the given mechanism and way), and there are "
            "none: give the server or the controller one (parameter profile)"
        )
    return deepest_within(tuple(usable), config.max_quality_loss)


class Controller:
    """One turn at a time; time comes from outside."""

    def __init__(
        self,
        config: ControllerConfig,
        plane: Plane,
        law: Law,
        extra: dict,
        *,
        events: EventLog,
        metrics: Metrics,
        dry_run: bool = False,
    ) -> None:
        self._config, self._plane, self._law, self._extra = config, plane, law, extra
        self._events, self._metrics, self._dry_run = events, metrics, dry_run
        self._window = Window(law.window_s, law.limits)
        #: Seconds without a fresh reading.
        self._blind_s = 0.0
        #: The law's thresholds may not be those in force: it starts from these again.
        self._resume = True
        self._holds_lease = False
        self.mode = "starting"

    def turn(self, dt_s: float) -> Event:
        """Read, decide and set, once; `dt_s` since the last turn. Raises Refused if the server refuses for good."""
        event = Event(time.monotonic(), time.time(), dt_s, self.mode)
        try:
            self._turn(event, dt_s)
        except Unreachable as error:
            event.mode, event.message = "unreachable", str(error)
            self._window.clear()
            self._resume, self._holds_lease = True, False
        except Held as error:
            event.mode, event.message = "standby", str(error)
            self._resume, self._holds_lease = True, False
        if event.mode != self.mode:
            log.info("%s%s", event.mode, f": {event.message}" if event.message else "")
        self.mode = event.mode
        self._metrics.turned(event.mode)
        self._events.write(event)
        return event

    def hand_back(self) -> None:
        """Give the settings back, if they are ours; the server returns to its baseline at once."""
        if self._holds_lease:
            self._holds_lease = False
            try:
                self._plane.call(owner=self._config.owner, lease_s=0)
            except (Unreachable, Held) as error:
                log.warning("the settings could not be handed back, their lease ends by itself: %s", error)

    def _turn(self, event: Event, dt_s: float) -> None:
        status = self._plane.call()
        reading = self._window.add(status)
        if reading is not None:
            event.reading = reading
            self._metrics.read(reading.age_s, reading.ttft_violation_ratio, reading.itl_violation_ratio)
            if reading.age_s > self._config.stale_after_s:
                reading = None
        if reading is None:
            self._hold(event, dt_s)
            return
        self._blind_s = 0.0
        if self._resume:
            self._check_mechanism(status)
            event.resumed = (reading.threshold_prefill, reading.threshold_decode)
            self._law.resume(*event.resumed)
            self._resume = False
        self._decide(event, reading, dt_s)
        event.mode = "dry_run" if self._dry_run else "control"
        self._set(event)

    def _check_mechanism(self, status: Mapping) -> None:
        """Raises Refused if the server's model cannot be dimmed in this way: better now than in the middle of a burst."""
        limits = self._law.limits
        wanted = self._extra.get("mechanism", status["settings"]["baseline"]["mechanism"])
        there = status["available"]["mechanisms"]
        if wanted not in there and min(limits.min_threshold_prefill, limits.min_threshold_decode) < 1:
            raise Refused(
                f"the server's model has not what mechanism {wanted} needs; it can do {', '.join(there)} (--mechanism), or "
                "nothing at all (--law off)"
            )

    def _hold(self, event: Event, dt_s: float) -> None:
        """Keep what is in force by renewing the lease, for a while; then give it back."""
        self._blind_s += dt_s
        self._decide(event, None, dt_s)
        if self._blind_s >= self._config.hand_back_after_s:
            event.mode = "handed_back"
            self.hand_back()
            self._resume = True
        else:
            event.mode = "hold"
            if self._holds_lease:
                self._set(event)

    def _decide(self, event: Event, reading: Reading | None, dt_s: float) -> None:
        decision = self._law.update(reading, dt_s)
        event.threshold_prefill, event.threshold_decode = decision.threshold_prefill, decision.threshold_decode
        event.terms = decision.terms
        self._metrics.decided(decision.threshold_prefill, decision.threshold_decode)

    def _set(self, event: Event) -> None:
        if self._dry_run:
            return
        config = self._config
        status = self._plane.call(
            threshold_prefill=event.threshold_prefill,
            threshold_decode=event.threshold_decode,
            # One number for both phases: engines count on no deeper dimming than either allows.
            threshold_floor=max(self._law.limits.min_threshold_prefill, self._law.limits.min_threshold_decode),
            owner=config.owner,
            lease_s=config.lease_s,
            **self._extra,
        )
        self._holds_lease = True
        self._metrics.updated()
        settings = status["settings"]
        event.settings_version, event.mechanism, event.way = (
            settings[name] for name in ("version", "mechanism", "way")
        )
