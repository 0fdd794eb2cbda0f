"""What a report says in words: the conclusion, warnings and the table, all computed from the runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loadtest.options import ms, percent
from loadtest.report.run_data import RunData, common
from loadtest.results import why_invalid

#: Row title, field of RunResult, how to write a value, and whether less is better (None: neither).
ROWS: list[tuple[str, str, Callable[[float | None], str], bool | None]] = [
    ("Requests sent", "requests", lambda v: f"{v:.0f}", None),
    ("… completed", "completed", lambda v: f"{v:.0f}", False),
    ("… rejected", "rejected", lambda v: f"{v:.0f}", True),
    ("… failed", "failed", lambda v: f"{v:.0f}", True),
    ("Requests with a late first word, or none", "ttft_violation_ratio", percent, True),
    ("Late words", "itl_violation_ratio", percent, True),
    ("Seconds in which a promise was broken", "violating_seconds_ratio", percent, True),
    ("First word, half of the people within", "ttft_p50_s", ms, True),
    ("First word, 99 of 100 within", "ttft_p99_s", ms, True),
    ("Between words, half within", "itl_p50_s", ms, True),
    ("Between words, 99 of 100 within", "itl_p99_s", ms, True),
    ("Words (tokens) per second", "output_tokens_per_s", lambda v: f"{v:.0f}", False),
    ("Work done by united experts", "united_share", percent, None),
    ("Mean threshold, reading prompts", "mean_threshold_prefill", lambda v: "–" if v is None else f"{v:.2f}", None),
    ("Mean threshold, writing answers", "mean_threshold_decode", lambda v: "–" if v is None else f"{v:.2f}", None),
    (
        "Full quality again after the burst",
        "recovery_s",
        lambda v: "–" if v is None else f"{v:.0f} s",
        True,
    ),
]

#: How a profile's measures are called; a loss of them is said in percent of what the full model gets right.
MEASURES = {
    "letter": "right multiple-choice answers",
    "choices": "right multiple-choice answers",
    "exact_match": "answers right to the letter",
    "perplexity": "predictability of text (perplexity)",
}


def verdict(runs: Sequence[RunData]) -> str:
    """The result in one line."""
    first, last = (run.summary.result for run in (runs[0], runs[-1]))
    names = ("ttft_violation_ratio", "itl_violation_ratio")
    if len(runs) == 1:
        worst = max((getattr(last, name) or 0.0 for name in names), default=0.0)
        return f"At least {percent(1 - worst)} of requests and of words came in time"
    changes = [
        getattr(last, n) / getattr(first, n) - 1 for n in names if getattr(first, n) and getattr(last, n) is not None
    ]
    versus = f"with “{runs[-1].name}” than with “{runs[0].name}”"
    if not changes:
        return f"“{runs[0].name}” broke no promise: the load was too low to tell the runs apart"
    if max(changes) < 0:
        return f"{-max(changes):.0%} fewer broken promises {versus}"
    if min(changes) > 0:
        return f"More broken promises {versus}"
    return f"No clear gain {versus}"


def tiles(runs: Sequence[RunData]) -> list[tuple[str, str, str]]:
    """What to see at first glance: (title, value of the first run or "", value of the last)."""
    first, last = (run.summary.result for run in (runs[0], runs[-1]))
    found = []
    for title, name, text in (
        ("requests whose first word came late or never", "ttft_violation_ratio", percent),
        ("words that came late", "itl_violation_ratio", percent),
        ("99 of 100 first words came within", "ttft_p99_s", ms),
    ):
        before = text(getattr(first, name)) if len(runs) > 1 else ""
        found.append((title, before, text(getattr(last, name))))
    quality = runs[-1].quality
    if quality is not None:
        at_least = "≥ " if quality.is_lower_bound else ""
        found.append(
            (f"the price: {measure_name(quality.measure)} lost", "", f"{at_least}{quality.mean_loss_percent:.1f}%")
        )
    return found


def roles(runs: Sequence[RunData]) -> str:
    """Which runs dimmed and which did not, in a sentence; nothing where that is not known."""
    dimmed, full = [], []
    for run in runs:
        r = run.summary.result
        thresholds = (r.mean_threshold_prefill, r.mean_threshold_decode)
        if None not in thresholds:
            (dimmed if min(thresholds) < 1 else full).append(f"“{run.name}”")
    parts = [f"{_and(full)} ran at full quality all the time"] if full else []
    parts += [f"{_and(dimmed)} dimmed while it was needed"] if dimmed else []
    return "; ".join(parts) + "." if parts else ""


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def conclusion(runs: Sequence[RunData]) -> list[str]:
    """The result in sentences, the last run held against the first."""
    first, last = runs[0], runs[-1]
    slo, r = last.slo, last.summary.result
    promise = f"first word within {ms(slo.ttft_s)}, then one every {ms(slo.itl_s)}"
    if len(runs) == 1:
        return [
            f"The promise was: {promise}.",
            f"{percent(r.ttft_violation_ratio)} of {r.requests} requests got their first word late or never, and "
            f"{percent(r.itl_violation_ratio)} of the words came late.",
            _turned_away(runs),
            *_price(last),
        ]
    before = first.summary.result
    return [
        f"The promise was: {promise}.",
        f"Late first words: {percent(before.ttft_violation_ratio)} of requests with “{first.name}”, "
        f"{percent(r.ttft_violation_ratio)} with “{last.name}”"
        f"{_change(before.ttft_violation_ratio, r.ttft_violation_ratio)}.",
        f"Late words after that: {percent(before.itl_violation_ratio)} with “{first.name}”, "
        f"{percent(r.itl_violation_ratio)} with “{last.name}”"
        f"{_change(before.itl_violation_ratio, r.itl_violation_ratio)}.",
        _turned_away([first, last]),
        *_price(last),
    ]


def _turned_away(runs: Sequence[RunData]) -> str:
    lost = {run.name: (run.summary.result.rejected + run.summary.result.failed) for run in runs}
    if not any(lost.values()):
        return "No request was turned away."
    total = runs[-1].summary.result.requests
    return f"Turned away: {', '.join(f'{count} of {total} requests with “{name}”' for name, count in lost.items())}."


def _price(run: RunData) -> list[str]:
    """What dimming cost in quality, and how much was dimmed."""
    r, quality, sentences = run.summary.result, run.quality, []
    if quality is not None:
        at_least = "at least " if quality.is_lower_bound else ""
        text = (
            f"The price with “{run.name}”: {at_least}{quality.mean_loss_percent:.1f}% of {measure_name(quality.measure)} lost "
            f"on average over all words, {at_least}{quality.max_loss_percent:.1f}% when dimmed most"
        )
        for name, loss in quality.other_mean_losses.items():
            text += f"; {loss:.1f}% of {measure_name(name)} on average"
        sentences.append(text + ".")
    if r.united_share:
        text = f"United experts did {percent(r.united_share)} of the expert work with “{run.name}”"
        if r.recovery_s is not None:
            text += f"; full quality was back {r.recovery_s:.0f} s after the burst"
        sentences.append(text + ".")
    return sentences


def measure_name(measure: str) -> str:
    return MEASURES.get(measure, measure)


def _change(before: float | None, after: float | None) -> str:
    if not before or after is None:
        return ""
    if after > before:
        return f": {after / before:.1f} times as many"
    return f": {1 - after / before:.0%} fewer"


def warnings(runs: Sequence[RunData]) -> list[str]:
    """What a reader must know before trusting the figures."""
    found = [f"“{run.name}” is invalid: {why_invalid(run.summary)}." for run in runs if not run.summary.valid]
    if not common(runs, lambda run: run.summary.run.arrivals_sha256):
        found.append("The runs did not get the same requests: compare with care.")
    if not common(runs, lambda run: run.slo):
        found.append("The runs were held against different promises: compare with care.")
    return found


def table(runs: Sequence[RunData]) -> list[tuple[str, list[str], list[tuple[str, str]]]]:
    """Rows of (title, a value per run, (difference to the first run, "better" | "worse" | "") per further run)."""
    rows = []
    for title, name, text, less_is_better in ROWS:
        values = [getattr(run.summary.result, name) for run in runs]
        if all(value is None for value in values):
            continue
        differences = [_difference(values[0], value, name, less_is_better) for value in values[1:]]
        rows.append((title, [text(value) for value in values], differences))
    return rows + _quality_rows(runs)


def _quality_rows(runs: Sequence[RunData]) -> list[tuple[str, list[str], list[tuple[str, str]]]]:
    known = [run.quality for run in runs if run.quality is not None]
    if not known:
        return []
    losses = {f"Quality lost: {measure_name(known[0].measure)}, mean over all words": lambda q: q.mean_loss_percent}
    losses["… when dimmed most"] = lambda q: q.max_loss_percent
    for name in known[0].other_mean_losses:
        title = f"Quality lost: {measure_name(name)}, mean over all words"
        losses[title] = lambda q, n=name: q.other_mean_losses.get(n)
    rows = []
    for title, loss_of in losses.items():
        values = [None if run.quality is None else loss_of(run.quality) for run in runs]
        ratios = [None if value is None else value / 100 for value in values]
        differences = [_difference(ratios[0], ratio, "loss_ratio", True) for ratio in ratios[1:]]
        rows.append((title, [percent(ratio) for ratio in ratios], differences))
    return rows


def _difference(base: float | None, value: float | None, name: str, less_is_better: bool | None) -> tuple[str, str]:
    if base is None or value is None or base == value:
        return "", ""
    change = value - base
    if name.endswith(("_ratio", "_share")):
        text = f"{100 * change:+.1f} points"
    elif name.startswith("mean_threshold"):
        text = f"{change:+.2f}"
    elif name == "recovery_s":
        text = f"{change:+.0f} s"
    elif name in ("requests", "completed", "rejected", "failed") or not base:
        text = f"{change:+.3g}"
    else:
        text = f"{change / base:+.0%}"
    judgement = "" if less_is_better is None else "better" if (change < 0) == less_is_better else "worse"
    return text.replace("-", "−"), judgement
