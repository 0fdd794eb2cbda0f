"""The metrics of a stub on Triton's own metrics port.

Triton's Python backend takes one value per call, each an inter-process call: too slow for the response path. Values are
collected here and written by a thread once a second. Counters and gauges are exact; of inter-token latencies, at most
MAX_ITL_OBSERVATIONS evenly chosen ones a second enter the histogram, so its quantiles hold and its count does not.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable

from backend.elastic.functions import STATES
from backend.serving.protocol import Stats

log = logging.getLogger(__name__)

FLUSH_PERIOD_S = 1.0
MAX_ITL_OBSERVATIONS = 100

#: Bounds of the histograms' buckets in seconds.
_TTFT_BUCKETS = [0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75,
                 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]  # fmt: skip
_ITL_BUCKETS = [0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5,
                1.0, 2.0]  # fmt: skip
_E2E_BUCKETS = [0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0,
                60.0, 120.0, 300.0]  # fmt: skip
#: Name, description, buckets.
_HISTOGRAMS = {
    "ttft": (
        "moe_time_to_first_token_seconds",
        "Arrival of a streaming request to its first response",
        _TTFT_BUCKETS,
    ),
    "itl": (
        "moe_inter_token_latency_seconds",
        "Gap between responses divided by their tokens; evenly sampled above 100 tokens/s",
        _ITL_BUCKETS,
    ),
    "e2e": ("moe_e2e_request_latency_seconds", "Arrival of a request to its final response", _E2E_BUCKETS),
}
#: By field of ExpertTelemetry.
_EXPERT_TOTALS = {
    "assignments": ("moe_expert_assignments_total", "Assignments of tokens to experts that the expert pool has booked"),
    "misses": ("moe_expert_misses_total", "Assignments served by others because their expert was missing"),
    "stalls": ("moe_expert_stalls_total", "MoE layers of steps that waited for weights"),
    "stall_s": ("moe_expert_stall_seconds_total", "Time that steps waited for weights"),
    "prefetches": ("moe_expert_prefetches_total", "Experts fetched ahead"),
    "prefetch_hits": ("moe_expert_prefetch_hits_total", "Experts fetched ahead that were then used"),
    "bytes_moved": ("moe_expert_moved_bytes_total", "Bytes of weights copied into slots"),
    "loads": ("moe_expert_loads_total", "Loads of copies of experts that were begun"),
    "failures": ("moe_expert_load_failures_total", "Loads of copies of experts that failed"),
    "evictions": (
        "moe_expert_evictions_total",
        "Copies that gave way to others, to a smaller share, or with their worker",
    ),
    "refusals": ("moe_expert_refusals_total", "Plans for which the workers had no room"),
    "slot_byte_s": ("moe_expert_slot_byte_seconds_total", "Bytes of memory for copies of experts, times seconds"),
    "always_on_byte_s": (
        "moe_expert_always_on_byte_seconds_total",
        "Bytes that one copy of each expert would take, times seconds",
    ),
    "workers_lost": ("moe_expert_workers_lost_total", "Expert workers that ended or did not answer"),
    "workers_relieved": (
        "moe_expert_workers_relieved_total",
        "Expert workers that were too slow and had others take their place",
    ),
    "redone": ("moe_expert_layers_redone_total", "MoE layers of which a lost worker's part was done again"),
    "plan_changes": ("moe_expert_plan_changes_total", "Changes of what expert workers hold"),
    "bytes_exchanged": ("moe_expert_exchanged_bytes_total", "Bytes of tokens and results to and from workers"),
}
#: All but histograms, as (kind, name, description).
_FAMILIES = {
    "prompt": ("COUNTER", "moe_prompt_tokens_total", "Prompt tokens of completed requests"),
    "generation": ("COUNTER", "moe_generation_tokens_total", "Tokens handed to clients"),
    "requests": ("COUNTER", "moe_requests_total", "Ended requests by outcome"),
    "preemptions": ("COUNTER", "moe_preemptions_total", "Sequences that gave their KV blocks back"),
    "prefix_hits": ("COUNTER", "moe_prefix_cache_hits_total", "Prompt tokens found in the prefix cache"),
    "running": ("GAUGE", "moe_requests_running", "Requests that have produced a token"),
    "waiting": ("GAUGE", "moe_requests_waiting", "Requests without a token yet"),
    "kv": ("GAUGE", "moe_kv_cache_usage_ratio", "KV blocks in use / all"),
    "slots": ("GAUGE", "moe_active_slots", "Weight slots read per MoE layer in the last step"),
    "united": ("GAUGE", "moe_united_assignment_ratio", "Assignments that united experts served / all, last step"),
    "resident": ("GAUGE", "moe_resident_expert_ratio", "Experts whose weights are on the device / all"),
    "functions": (
        "GAUGE",
        "moe_expert_functions",
        "Copies of experts that serve (warm) or are on their way (loading), and experts without either (cold)",
    ),
    "workers": ("GAUGE", "moe_expert_workers", "Expert workers that take part"),
    **{field: ("COUNTER", *words) for field, words in _EXPERT_TOTALS.items()},
    "threshold": ("GAUGE", "moe_brownout_threshold", "Brownout threshold in force"),
}


class Metrics:
    """Collects from any thread; `pb_utils` is Triton's Python module (a fake in tests).

    `engine_wide` metrics (KV use, preemptions, cache hits, thresholds) are written by one model only, so that sums over
    models stay right.
    """

    def __init__(self, pb_utils, model: str, version: str, engine_wide: bool) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], float] = defaultdict(float)
        self._observations: dict[str, list[float]] = {"ttft": [], "e2e": []}
        self._itl: list[tuple[float, int]] = []  # (seconds per token, tokens)
        self._last_totals: dict[str, float] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._labels = {"model": model, "version": version}
        self._engine_wide = engine_wide
        family = pb_utils.MetricFamily
        # A metric works only as long as its family exists.
        self._histogram_families = {
            key: family(name=name, description=description, kind=family.HISTOGRAM)
            for key, (name, description, _) in _HISTOGRAMS.items()
        }
        self._histograms = {
            key: made.Metric(labels=self._labels, buckets=_HISTOGRAMS[key][2])
            for key, made in self._histogram_families.items()
        }
        self._families = {
            key: family(name=name, description=description, kind=getattr(family, kind))
            for key, (kind, name, description) in _FAMILIES.items()
        }
        self._metrics: dict[tuple[str, str], object] = {}
        for name in ("prompt", "generation", "running", "waiting"):
            self._metric(name)
        self._metric("requests", outcome="completed")

    def start(self, read_stats: Callable[[], list[Stats]]) -> None:
        """Flush once a second, with the engines' statistics from `read_stats`."""
        self._read_stats = read_stats
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def first_response(self, seconds: float) -> None:
        with self._lock:
            self._observations["ttft"].append(seconds)

    def tokens(self, count: int, gap_s: float | None) -> None:
        """`count` tokens were handed over, `gap_s` after the response before (None: it was the first)."""
        with self._lock:
            self._counts["generation", ""] += count
            if gap_s is not None and count:
                self._itl.append((gap_s / count, count))

    def ended(self, outcome: str, prompt_tokens: int, seconds: float | None) -> None:
        """A request ended; `seconds` from arrival to its final response if it completed."""
        with self._lock:
            self._counts["requests", outcome] += 1
            if seconds is not None:
                self._counts["prompt", ""] += prompt_tokens
                self._observations["e2e"].append(seconds)

    def flush(self, stats: list[Stats]) -> None:
        """Hand everything collected to Triton; `stats` has one entry per connected engine."""
        with self._lock:
            counts, self._counts = self._counts, defaultdict(float)
            observations, self._observations = self._observations, {"ttft": [], "e2e": []}
            itl, self._itl = self._itl, []
        for (name, outcome), value in counts.items():
            self._metric(name, **({"outcome": outcome} if outcome else {})).increment(value)
        for name, values in observations.items():
            for value in values:
                self._histograms[name].observe(value)
        for value in thin(itl, MAX_ITL_OBSERVATIONS):
            self._histograms["itl"].observe(value)
        self._metric("running").set(sum(s.client_running for s in stats))
        self._metric("waiting").set(sum(s.client_waiting for s in stats))
        if self._engine_wide and stats:
            self._write_engines(stats)

    def _write_engines(self, stats: list[Stats]) -> None:
        """The engine-wide metrics: sums over the engines where they count something, else means."""
        self._metric("kv").set(sum(s.kv_usage_ratio for s in stats) / len(stats))
        self._metric("threshold", phase="prefill").set(stats[0].threshold_prefill)
        self._metric("threshold", phase="decode").set(stats[0].threshold_decode)
        self._metric("slots").set(sum(s.active_slots for s in stats) / len(stats))
        self._metric("united").set(sum(s.united_share for s in stats) / len(stats))
        self._metric("resident").set(sum(s.experts["resident_share"] for s in stats) / len(stats))
        for state in STATES:
            self._metric("functions", state=state).set(sum(s.experts[state] for s in stats))
        self._metric("workers").set(sum(s.experts["workers"] for s in stats))
        for field in _EXPERT_TOTALS:
            self._raise_to(field, sum(s.experts[field] for s in stats))
        self._raise_to("preemptions", sum(s.num_preemptions for s in stats))
        self._raise_to("prefix_hits", sum(s.prefix_hit_tokens for s in stats))

    def _run(self) -> None:
        while not self._closed.wait(FLUSH_PERIOD_S):
            try:
                self.flush(self._read_stats())
            except Exception:
                log.exception("metrics could not be written")

    def _raise_to(self, name: str, total: float) -> None:
        """Increase a counter to an engine's total, which starts anew with each engine process."""
        last = self._last_totals.get(name, 0)
        self._last_totals[name] = total
        self._metric(name).increment(total - last if total >= last else total)

    def _metric(self, name: str, **labels: str):
        key = (name, ",".join(labels.values()))
        if key not in self._metrics:
            self._metrics[key] = self._families[name].Metric(labels=self._labels | labels)
        return self._metrics[key]


def thin(weighted: list[tuple[float, int]], limit: int) -> list[float]:
    """At most `limit` values of a weighted list, evenly spaced in weight over the sorted values; all if they are fewer."""
    total = sum(weight for _, weight in weighted)
    if total <= limit:
        return [value for value, weight in weighted for _ in range(weight)]
    ordered = sorted(weighted)
    chosen, position, seen = [], 0, 0
    for i in range(limit):
        target = (i + 0.5) * total / limit
        while seen + ordered[position][1] <= target:
            seen += ordered[position][1]
            position += 1
        chosen.append(ordered[position][0])
    return chosen
