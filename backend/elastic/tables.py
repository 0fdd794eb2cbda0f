"""A simulation's result as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from backend.elastic.experiment import against

_COLUMNS = {
    "layer p50 ms": "layer_ms_p50",
    "layer p99 ms": "layer_ms_p99",
    "e2e p50 ms": "e2e_ms_p50",
    "e2e p99 ms": "e2e_ms_p99",
    "GB·s": "cost_gb_s",
    "GB·s while running": "execution_gb_s",
    "loss %": "quality_loss_percent",
}


def show(result: dict, console: Console) -> None:
    """Constants and tables for people."""
    cost = {key: value for key, value in result["cost_model"].items() if isinstance(value, float)}
    console.print("[bold]Cost model[/bold] (assumed constants; bytes, FLOP, seconds)")
    console.print(", ".join(f"{key} {value:.4g}" for key, value in cost.items()))
    work = result["workload"]
    console.print(f"{work['requests']} requests from {work['arrivals']}; {work['routing']}")
    table = Table(title=f"{work['devices']} devices, {work['layers']} layers, simulated")
    table.add_column("policy", no_wrap=True)
    for title in _COLUMNS:
        table.add_column(title, justify="right")
    for rows in (result["policies"], result["ablations"]):
        for name, row in rows.items():
            table.add_row(name, *(f"{row[key]:.4g}" for key in _COLUMNS.values()))
        table.add_section()
    console.print(table)
    if any("functions" in row for row in result["policies"].values()):
        console.print(_functions_table({**result["policies"], **result["ablations"]}))
    for latency, names in result["fronts"].items():
        console.print(f"Front of {latency}, GB·s and loss: {', '.join(names)}")
    if result["windows"]["eplb"]:
        console.print(_windows_table(result["windows"], work["windows"]))
    if result["sensitivity"]:
        console.print(_sensitivity_table(result["sensitivity"]))


def _functions_table(rows: dict[str, dict]) -> Table:
    table = Table(title="Expert functions of the simulated layers: totals, and states at the end")
    names = ("loads", "evictions", "expiries", "refusals", "warm", "loading", "cold")
    for title in ("policy", "plans", "active but cold", *names):
        table.add_column(title, no_wrap=title == "policy", justify="left" if title == "policy" else "right")
    for name, row in rows.items():
        if "functions" in row:
            table.add_row(name, str(row["plans"]), str(row["misses"]), *(str(row["functions"][key]) for key in names))
    return table


def _windows_table(windows: dict, count: int) -> Table:
    table = Table(title=f"Change in % over {count} windows: least, median, most")
    titles = {
        "layer p50": "layer_ms_p50",
        "layer p99": "layer_ms_p99",
        "layer mean": "layer_ms_mean",
        "e2e p50": "e2e_ms_p50",
        "GB·s": "cost_gb_s",
        "GB·s while running": "execution_gb_s",
    }
    for title in ("policy", "against", *titles):
        table.add_column(title, no_wrap=title == "policy")
    for base, rows in windows.items():
        for name, row in rows.items():
            if name != base:
                table.add_row(name, base, *(" ".join(f"{value:+.1f}" for value in row[key]) for key in titles.values()))
    return table


def _sensitivity_table(rows: list[dict]) -> Table:
    table = Table(title="Sensitivity: change against static in %, layer p50 / p99 / GB·s")
    names = [name for name in rows[0]["policies"] if name != "static"]
    for title in ("constant", "factor", *names):
        table.add_column(title, justify="left" if title == "constant" else "right")
    for row in rows:
        if "static" not in row["policies"]:
            continue
        change = against(row["policies"], "static", names)
        cells = [
            " / ".join(f"{change[name][key]:+.0f}" for key in ("layer_ms_p50", "layer_ms_p99", "cost_gb_s"))
            for name in names
        ]
        table.add_row(row["constant"], f"{row['factor']:g}", *cells)
    return table
