"""The report as one HTML page that needs nothing else: styles and charts are inside."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from string import Template

from loadtest.report.charts import Chart, make_charts
from loadtest.report.run_data import RunData
from loadtest.report.words import conclusion, roles, table, tiles, verdict, warnings

_INTRODUCTION = (
    "A language model of the Mixture-of-Experts kind has many small networks, its experts, and asks a few of them for every "
    "word. When more people ask than the machine can serve, answers become slow for everyone. <b>Brownout</b> dims the "
    "model instead, like lamps on a weak grid: for rarely used experts it lets one merged (<i>united</i>) expert stand in, "
    "which is faster and a little less exact, and only for as long as the rush lasts."
)

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --page: #f6f7f9; --card: #ffffff; --ink: #1f2429; --muted: #57606b; --grid: #dde2e8; --burst: #f7edcf;
  --slo: #b0122b; --run0: #c4501b; --run1: #1f6fc4; --run2: #1a8a5a; --run3: #8c4fc0; --run4: #7a6a00;
  --good: #18794e; --bad: #b0122b; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1d2126; --ink: #e8ebee; --muted: #a4adb7;
  --grid: #353c44; --burst: #3b351f; --slo: #ff7b87; --run0: #f08a4f; --run1: #6cb0f5; --run2: #5ccf9c; --run3: #c79af2;
  --run4: #d8c650; --good: #5ccf9c; --bad: #ff7b87; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 16px 48px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 1.15rem; margin: 0 0 2px; }
p { margin: 6px 0; }
section, figure { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; margin: 16px 0 0; padding: 16px 20px; }
.conclusion { border-left: 5px solid var(--run1); }
.conclusion h2 { font-size: 1.3rem; }
.conclusion li { font-size: 1.08rem; margin: 2px 0; }
.conclusion ul { margin: 8px 0 0; padding-left: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin: 12px 0; }
.tiles div { background: var(--page); border-radius: 8px; padding: 10px 14px; }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.3; white-space: nowrap; font-variant-numeric: tabular-nums; }
.tiles b span { color: var(--muted); font-weight: 400; }
.tiles small { color: var(--muted); font-size: .85rem; line-height: 1.3; display: block; }
.warning { border-left: 5px solid var(--bad); }
.note { color: var(--muted); font-size: .92rem; }
figure p { color: var(--muted); max-width: 75ch; }
figure svg { width: 100%; min-width: 600px; height: auto; display: block; font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin-top: 8px; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
td { font-variant-numeric: tabular-nums; }
.better { color: var(--good); } .worse { color: var(--bad); }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
code { font-size: .9em; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="note">$subtitle</p>
$warnings
<section class="conclusion"><h2>$verdict</h2><div class="tiles">$tiles</div><ul>$conclusion</ul></section>
<section><h2>What is this?</h2><p>$introduction</p></section>
$charts
<section><h2>All figures</h2><div class="scroll">$table</div></section>
<section><h2>How it was measured</h2>$method</section>
</main>
</body>
</html>
""")


def write_report(runs: Sequence[RunData], folder: Path, *, title: str = "Serving through a burst") -> Path:
    """Write report.html and a PNG per chart; the page's path. The first run is what the others are compared with."""
    folder.mkdir(parents=True, exist_ok=True)
    charts = make_charts(runs)
    for chart in charts:
        chart.write_png(folder)
    path = folder / "report.html"
    path.write_text(page(runs, charts, title), encoding="utf-8")
    return path


def page(runs: Sequence[RunData], charts: Sequence[Chart], title: str) -> str:
    """The whole HTML text."""
    names = [f"“{run.name}”" for run in runs]
    subtitle = f"{', '.join(names[:-1])} and {names[-1]} compared" if len(runs) > 1 else names[0]
    subtitle += f" · {runs[0].summary.run.started_at[:16].replace('T', ' ')} UTC"
    problems = warnings(runs)
    return _PAGE.substitute(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        warnings=f'<section class="warning"><h2>Take care</h2><ul>{_items(problems)}</ul></section>'
        if problems
        else "",
        verdict=html.escape(verdict(runs)),
        conclusion=_items(conclusion(runs)),
        tiles="".join(_tile(*tile) for tile in tiles(runs)),
        introduction=f"{_INTRODUCTION} {html.escape(roles(runs))}",
        charts="\n".join(_figure(chart) for chart in charts),
        table=_table(runs),
        method=_method(runs),
    )


def _items(sentences: Sequence[str]) -> str:
    return "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)


def _tile(title: str, before: str, value: str) -> str:
    change = f"<span>{html.escape(before)} → </span>" if before else ""
    return f"<div><b>{change}{html.escape(value)}</b><small>{html.escape(title)}</small></div>"


def _figure(chart: Chart) -> str:
    title, sentence = html.escape(chart.title), html.escape(chart.sentence)
    svg = chart.svg().replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    return f'<figure><figcaption><h2>{title}</h2><p>{sentence}</p></figcaption><div class="scroll">{svg}</div></figure>'


def _table(runs: Sequence[RunData]) -> str:
    heads = []
    for number, run in enumerate(runs):
        swatch = f'<span class="swatch" style="background:var(--run{number % 5})"></span>'
        heads.append(f"<th>{swatch}{html.escape(run.name)}</th>" + ("<th>difference</th>" if number else ""))
    lines = [f"<tr><th></th>{''.join(heads)}</tr>"]
    for title, values, differences in table(runs):
        cells = f"<td>{html.escape(values[0])}</td>"
        for value, (text, judgement) in zip(values[1:], differences, strict=True):
            cells += f'<td>{html.escape(value)}</td><td class="{judgement}">{html.escape(text)}</td>'
        lines.append(f"<tr><td>{html.escape(title)}</td>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _method(runs: Sequence[RunData]) -> str:
    text = (
        "<p>Open loop: every request has a planned start and is sent then, whether or not earlier ones were answered. Waiting "
        "counts from the planned start. A response that brings m tokens g seconds after the one before counts as m gaps of "
        "g/m. A refused or failed request counts as a late first word. A second breaks a promise when 1 in 10 of its first "
        f"words or gaps is late. Points are windows of {runs[0].window_s:g} s.</p>"
    )
    for run in runs:
        info = run.summary.run
        text += (
            f'<p class="note">“{html.escape(run.name)}”: <code>{html.escape(info.arrivals)}</code>, seed {info.seed}, '
            f"requests <code>{info.arrivals_sha256[:16]}</code>; the generator was at most "
            f"{run.summary.generator_lateness_p99_s * 1e3:.1f} ms late for 99 of 100 requests.</p>"
        )
    return text
