"""The charts of a report. Each is one matplotlib figure; the page inlines its SVG, and a PNG goes beside the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from loadtest.report.run_data import Line, RunData, common
from loadtest.report.words import measure_name

#: One colour and dash a run, distinct for colour-blind readers too. Keys are the page's CSS variables.
RUN_COLOURS = {"run0": "#c4501b", "run1": "#1f6fc4", "run2": "#1a8a5a", "run3": "#8c4fc0", "run4": "#7a6a00"}
_INK, _MUTED, _GRID, _BURST, _SLO = "#24292e", "#57606b", "#d8dee5", "#f5ecd2", "#b0122b"
#: Colours of the pictures → CSS variables, so that the page's charts follow its light or dark theme.
THEME = {colour: name for name, colour in RUN_COLOURS.items()} | {
    _INK: "ink",
    _MUTED: "muted",
    _GRID: "grid",
    _BURST: "burst",
    _SLO: "slo",
}
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_DASHES = ["-", "-", "--", "-.", ":"]
#: Above this multiple of the promise an axis is logarithmic, or the promise would lie on the bottom.
_LOG_ABOVE = 6.0

#: The axis of the quality lost reaches at least so many percent: a small loss shall look small.
_LEAST_LOSS_AXIS = 20.0


class Chart:
    """A figure with what the page says about it."""

    def __init__(self, name: str, title: str, sentence: str, figure: Figure) -> None:
        self.name, self.title, self.sentence, self._figure = name, title, sentence, figure

    def svg(self) -> str:
        """An <svg> element for an HTML page, coloured by the page's variables."""
        buffer = io.StringIO()
        self._head(None)
        with mpl.rc_context({**_STYLE, "svg.hashsalt": self.name}):
            self._figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"|(<svg [^>]*?)height="[^"]*"', r"\1\2", text, count=1)
        # Figure and axes ids repeat from chart to chart; nothing refers to them.
        text = re.sub(r'<g id="(?!m)[a-zA-Z]+_?[0-9]*">', "<g>", text)
        for colour, name in THEME.items():
            text = text.replace(colour, f"var(--{name})")
        return text

    def write_png(self, folder: Path) -> Path:
        path = folder / f"{self.name}.png"
        self._head(self.title)
        with mpl.rc_context(_STYLE):
            self._figure.savefig(path, dpi=150, facecolor="white")
        return path

    def _head(self, title: str | None) -> None:
        """Put a title above the legend: pictures stand alone, on the page the title is text."""
        (legend,) = self._figure.legends
        legend.set_title(title, prop={"weight": "bold", "size": 11})
        legend.set_alignment("left")


def make_charts(runs: Sequence[RunData]) -> list[Chart]:
    """All charts for which the runs have data, in the order of the page."""
    charts = [
        _violations(runs),
        _over_time(
            "arrivals",
            "How many people asked",
            "Requests per second. Each was sent at its planned time, however slow the server was; the shaded time is the "
            "burst." + (" All runs got exactly the same requests." if _same_requests(runs) and len(runs) > 1 else ""),
            "requests per second",
            runs[:1] if _same_requests(runs) else runs,
            lambda run: run.arrivals(),
            label="requests" if _same_requests(runs) else None,
        ),
        _latency(
            "first_token",
            "Wait for the first word",
            "How long people waited until an answer began. The line is the wait that 9 in 10 people stayed below; the band "
            "reaches from the typical wait (p50) to the 1 in 100 that waited longest (p99).",
            runs,
            lambda run, percent: run.first_token_s(percent),
            "ttft_s",
        ),
        _latency(
            "between_tokens",
            "Flow of the words",
            "Time between two words (tokens) of an answer, drawn in the same way. Above the promise, reading stutters.",
            runs,
            lambda run, percent: run.between_tokens_s(percent),
            "itl_s",
        ),
    ]
    served = [run for run in runs if run.telemetry("threshold_decode")[0]]
    if served:
        charts += _brownout_charts(served)
    charts.append(
        _over_time(
            "throughput",
            "Words delivered",
            "Output tokens per second that reached the clients: what the machine got done.",
            "tokens per second",
            runs,
            lambda run: run.throughput(),
        )
    )
    if any(run.summary.result.requests > run.summary.result.completed for run in runs):
        charts.append(
            _over_time(
                "lost",
                "Requests turned away",
                "Requests per second that the server refused or failed, by the time at which they were sent.",
                "requests per second",
                runs,
                lambda run: run.lost(),
            )
        )
    return charts


def _brownout_charts(runs: Sequence[RunData]) -> list[Chart]:
    def dial(axes: Axes, run: RunData, number: int) -> None:
        _step(axes, run.telemetry("threshold_prefill"), number, "", ":")
        _step(axes, run.telemetry("threshold_decode"), number, run.name, "-")
        axes.set_ylim(0, 1.08)

    charts = [
        _figure(
            "thresholds",
            "The dimmer",
            "The brownout threshold while answers are written (solid) and prompts are read (dotted): 1 is full quality, 0 "
            "the most dimmed. A good controller dims only while it must and comes back to 1 soon after the burst.",
            "threshold",
            runs,
            dial,
        ),
        *_quality(runs),
        _over_time(
            "active_slots",
            "Work per step",
            "Sets of expert weights that each layer had to read in a step. Fewer is faster; this is what dimming saves.",
            "active slots per layer",
            runs,
            lambda run: run.telemetry("active_slots"),
        ),
        _over_time(
            "queue",
            "The queue",
            "Requests that wait for their first word.",
            "waiting requests",
            runs,
            lambda run: run.telemetry("waiting"),
        ),
    ]
    if any(share > 0 for run in runs for share in run.telemetry("united_share")[1]):
        charts.append(
            _over_time(
                "united_share",
                "Who did the work",
                "Share of the expert work done by united (merged) experts in place of the original ones.",
                "share",
                runs,
                lambda run: run.telemetry("united_share"),
            )
        )
    return charts


def _quality(runs: Sequence[RunData]) -> list[Chart]:
    """What the thresholds cost, for runs whose model was calibrated."""
    known = [run for run in runs if run.quality_loss()[0]]
    if not known:
        return []
    most = max(loss for run in known for loss in run.quality_loss()[1])

    def draw(axes: Axes, run: RunData, number: int) -> None:
        _step(axes, run.quality_loss(), number, run.name)
        axes.set_ylim(0, max(_LEAST_LOSS_AXIS, 1.1 * most))

    return [
        _figure(
            "quality",
            "The price in quality",
            f"How much worse the dimmed model answers at each moment: the share of {measure_name(known[0].quality.measure)} that "
            "it loses against full quality, as measured beforehand for the settings of the dimmer. 0 is full quality.",
            "percent lost",
            runs,
            draw,
        )
    ]


def _over_time(
    name: str,
    title: str,
    sentence: str,
    unit: str,
    runs: Sequence[RunData],
    line: Callable[[RunData], Line],
    label: str | None = None,
) -> Chart:
    def draw(axes: Axes, run: RunData, number: int) -> None:
        if label:
            axes.plot(*line(run), color=_INK, linewidth=1.6, drawstyle="steps-post", label=label)
        else:
            _step(axes, line(run), number, run.name)

    return _figure(name, title, sentence, unit, runs, draw)


def _latency(
    name: str,
    title: str,
    sentence: str,
    runs: Sequence[RunData],
    line: Callable[[RunData, float], Line],
    promise: str,
) -> Chart:
    promises = sorted({getattr(run.slo, promise) for run in runs})
    finite = [v for run in runs for v in line(run, 99)[1] if math.isfinite(v)]
    is_log = bool(finite) and max(finite) > _LOG_ABOVE * promises[-1]

    def draw(axes: Axes, run: RunData, number: int) -> None:
        colour = _colour(number)
        times, low = line(run, 50)
        high = line(run, 99)[1]
        top = max([*finite, *promises]) * 1.1
        low, high = ([min(v, top) for v in values] for values in (low, high))
        axes.fill_between(times, low, high, color=colour, alpha=0.16, linewidth=0)
        middle = [min(v, top) for v in line(run, 90)[1]]
        axes.plot(times, middle, color=colour, linewidth=1.9, linestyle=_dash(number), label=run.name)
        if is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))

    return _figure(name, title, sentence, "seconds" + (" (log scale)" if is_log else ""), runs, draw, promises)


def _violations(runs: Sequence[RunData]) -> Chart:
    """Bars of the three ratios, a bar per run."""
    kinds = [
        ("ttft_violation_ratio", "requests whose first\nword came late or never"),
        ("itl_violation_ratio", "words that\ncame late"),
        ("violating_seconds_ratio", "seconds in which\na promise was broken"),
    ]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.1), layout="constrained")
        axes = figure.add_subplot()
        width = 0.8 / len(runs)
        for number, run in enumerate(runs):
            values = [100 * (getattr(run.summary.result, name) or 0.0) for name, _ in kinds]
            places = [i + (number - (len(runs) - 1) / 2) * width for i in range(len(kinds))]
            axes.bar(places, values, width * 0.92, color=_colour(number), label=run.name)
            for place, value in zip(places, values, strict=True):
                axes.text(place, value + 1.5, f"{value:.1f}%", ha="center", va="bottom", color=_INK)
        axes.set_xticks(range(len(kinds)), [text for _, text in kinds])
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0, 112)
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.set_ylabel("percent")
        figure.legend(loc="outside upper left", ncols=6)
    sentence = "How often the promises were broken, counted in three ways. Lower is better; 0 is every promise kept."
    return Chart("violations", "Broken promises", sentence, figure)


def _figure(
    name: str,
    title: str,
    sentence: str,
    unit: str,
    runs: Sequence[RunData],
    draw: Callable[[Axes, RunData, int], None],
    promises_s: Sequence[float] = (),
) -> Chart:
    """A chart over time with bursts shaded, promises dashed and the legend outside."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for i, (start, end) in enumerate(runs[0].summary.run.bursts):
            axes.axvspan(start, end, color=_BURST, linewidth=0, zorder=0, label=None if i else "burst")
        for promise in promises_s:
            axes.axhline(promise, color=_SLO, linewidth=1.4, linestyle=(0, (5, 3)), label=f"promise: {promise:.3g} s")
        for number, run in enumerate(runs):
            draw(axes, run, number)
        axes.set_xlim(0, max(run.length_s for run in runs))
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds from the start")
        axes.set_ylabel(unit)
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: labels[i] == "burst" or labels[i].startswith("promise"))
        figure.legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            loc="outside upper left",
            ncols=4 if len(runs) < 3 else 5,
        )
    return Chart(name, title, sentence, figure)


def _step(axes: Axes, line: Line, number: int, label: str, style: str | None = None) -> None:
    axes.plot(
        *line,
        color=_colour(number),
        linestyle=style or _dash(number),
        linewidth=1.9,
        drawstyle="steps-post",
        label=label,
    )


def _colour(number: int) -> str:
    return list(RUN_COLOURS.values())[number % len(RUN_COLOURS)]


def _dash(number: int) -> str:
    return _DASHES[number % len(_DASHES)]


def _same_requests(runs: Sequence[RunData]) -> bool:
    return common(runs, lambda run: run.summary.run.arrivals_sha256)
