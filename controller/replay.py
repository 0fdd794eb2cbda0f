"""A recorded run through a law: the same code, without a server."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TextIO

from controller.event_log import Event
from controller.laws import Law


def replay(events: Iterable[Event], law: Law, stale_after_s: float, out: TextIO) -> dict[str, float | int]:
    """Feed the readings of a log to a law and write a JSON line per turn: what it decides beside what was decided then.

    Returns a summary: turns, those decided differently, and both mean thresholds.
    """
    turns = differing = 0
    total, recorded = [0.0, 0.0], [0.0, 0.0]
    for event in events:
        if event.threshold_prefill is None or event.threshold_decode is None:
            continue  # the server could not be read: no law was asked
        if event.resumed is not None:
            law.resume(*event.resumed)
        fresh = event.reading is not None and event.reading.age_s <= stale_after_s
        decision = law.update(event.reading if fresh else None, event.dt_s)
        then = (event.threshold_prefill, event.threshold_decode)
        now = (decision.threshold_prefill, decision.threshold_decode)
        line = {"time_s": event.time_s, "recorded": then, "decided": now, "terms": decision.terms}
        out.write(json.dumps(line) + "\n")
        turns += 1
        differing += max(abs(a - b) for a, b in zip(then, now, strict=True)) > 1e-9
        total = [a + b for a, b in zip(total, now, strict=True)]
        recorded = [a + b for a, b in zip(recorded, then, strict=True)]
    count = max(turns, 1)
    return {
        "turns": turns,
        "differing": differing,
        "mean_threshold_prefill": total[0] / count,
        "mean_threshold_decode": total[1] / count,
        "recorded_mean_threshold_prefill": recorded[0] / count,
        "recorded_mean_threshold_decode": recorded[1] / count,
    }
