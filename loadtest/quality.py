"""What brownout cost in quality during a run: the loss of every token, from the thresholds that held when it was delivered.

A calibrated profile knows the loss at some thresholds; between two neighbouring levels it is interpolated. Thresholds that lie
on no line between levels get the loss of the least dimmed point of these lines at which neither threshold is higher: less
dimming never costs more, so this errs on the high side.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path

import msgspec

from backend.brownout.profile import PROFILE_NAME, Level, Profile, read_profile
from backend.errors import ConfigError
from loadtest.record import RequestRecord
from loadtest.telemetry import Sample, with_thresholds


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """Quality lost over a run, in percent of the full model's score: mean over tokens, and the most of any token."""

    mean_loss_percent: float
    max_loss_percent: float
    #: What the loss is of, as the profile names it, and the mean loss by further measures.
    measure: str
    other_mean_losses: dict[str, float] = {}
    #: Thresholds went below those of the profile's deepest level, so the true loss is higher.
    is_lower_bound: bool = False


class LossCurve:
    """Loss by thresholds, for one mechanism and way of a profile."""

    def __init__(self, profile: Profile, *, mechanism: str | None = None, way: int = 0) -> None:
        """By default of the profile's deepest level; `way` 0 is the largest with this mechanism.

        Raises ConfigError if the profile has other mechanisms or ways only.
        """
        mechanism = mechanism or profile.levels[-1].mechanism
        own = [level for level in profile.levels[1:] if level.mechanism == mechanism]
        way = way or max((level.way for level in own), default=0)
        own = [level for level in own if level.way == way]
        if not own and len(profile.levels) > 1:
            found = sorted({f"{level.mechanism} with way {level.way}" for level in profile.levels[1:]})
            raise ConfigError(f"the profile has no level of {mechanism} with way {way}; it has {', '.join(found)}")
        self._levels = [profile.levels[0], *own]
        self.measure = profile.measure
        self.others = sorted(set.intersection(*(set(level.other_losses) for level in own))) if own else []

    def losses(self, prefill: float, decode: float) -> dict[str, float]:
        """Loss in percent by measure at these thresholds; below the deepest level it is that level's."""
        one = other = self._levels[-1]
        part = 0.0
        for first, second in itertools.pairwise(self._levels):
            found = _first_within(first, second, prefill, decode)
            if found is not None:
                one, other, part = first, second, found
                break
        pairs = {self.measure: (one.loss_percent, other.loss_percent)}
        pairs |= {name: (one.other_losses.get(name, 0.0), other.other_losses.get(name, 0.0)) for name in self.others}
        return {name: (1 - part) * a + part * b for name, (a, b) in pairs.items()}

    def reaches(self, prefill: float, decode: float) -> bool:
        """Whether the profile has a level that is dimmed as far."""
        return any(x.threshold_prefill <= prefill and x.threshold_decode <= decode for x in self._levels)


def _first_within(one: Level, other: Level, prefill: float, decode: float) -> float | None:
    """How far (0 … 1) on the line from one level to the other both thresholds are at most the given ones; None: nowhere."""
    first, last = 0.0, 1.0
    for start, end, limit in (
        (one.threshold_prefill, other.threshold_prefill, prefill),
        (one.threshold_decode, other.threshold_decode, decode),
    ):
        if start > limit >= end:
            first = max(first, (start - limit) / (start - end))
        elif start <= limit < end:
            last = min(last, (limit - start) / (end - start))
        elif start > limit:
            return None
    return first if first <= last else None


def curve_of_run(samples: Sequence[Sample], profile: Profile) -> LossCurve:
    """For the mechanism and way that a controller's log names; without one those of the profile's deepest level.

    Raises ConfigError if the profile has no level of them.
    """
    how = {(sample.mechanism, sample.way or 0) for sample in samples if sample.mechanism}
    if len(how) > 1:
        raise ConfigError(f"quality is known for runs of one mechanism; this one dimmed with {sorted(how)}")
    mechanism, way = how.pop() if how else (None, 0)
    return LossCurve(profile, mechanism=mechanism, way=way)


def quality_of_run(
    records: Sequence[RequestRecord],
    samples: Sequence[Sample],
    profile: Profile,
) -> Quality | None:
    """Quality lost over a run, every output token weighing the same.

    Args:
        records: of all requests; those exempt from brownout (`never`) lose nothing.
        samples: the run's course, as `loadtest.control_log.read_course` gives it; thresholds hold until the next sample.
        profile: of the served checkpoint.

    Returns:
        None if no thresholds are known or no tokens were made.

    Raises:
        ConfigError: the profile has no level of the mechanism and way that the run dimmed with.
    """
    curve = curve_of_run(samples, profile)
    known = with_thresholds(samples)
    losses = [curve.losses(s.threshold_prefill, s.threshold_decode) for s in known]
    times = [s.time_s for s in known]
    tokens_at = [0] * len(known)  # tokens that lost what they lose at this sample
    total = 0
    for record in records:
        for at_s, tokens in record.responses:
            total += tokens
            if known and record.brownout != "never":
                tokens_at[max(0, bisect.bisect_right(times, at_s) - 1)] += tokens
    if not known or not total:
        return None
    means = {
        name: sum(tokens * loss[name] for tokens, loss in zip(tokens_at, losses, strict=True)) / total
        for name in (curve.measure, *curve.others)
    }
    used = [i for i, tokens in enumerate(tokens_at) if tokens]
    return Quality(
        mean_loss_percent=means.pop(curve.measure),
        max_loss_percent=max((losses[i][curve.measure] for i in used), default=0.0),
        measure=curve.measure,
        other_mean_losses=means,
        is_lower_bound=any(not curve.reaches(known[i].threshold_prefill, known[i].threshold_decode) for i in used),
    )


def read_run_profile(records_path: Path, profile: Path | None = None) -> Profile | None:
    """The named profile, or that in the folder of a run's records if there is one; ConfigError for an unusable one."""
    beside = records_path.parent / PROFILE_NAME
    if profile is None and not beside.is_file():
        return None
    return read_profile(profile or beside)
