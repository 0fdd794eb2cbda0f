"""A simulation's result as tables for people."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
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
    model = result["cost_model"]
    assumed = "assumed constants" if model["assumed"] else "links and fixed times assumed, experts fitted as below"
    console.print(f"[bold]Cost model[/bold] ({model['shape']} on {model['hardware']}, {assumed}; bytes, FLOP, seconds)")
    console.print(", ".join(f"{key} {value:.4g}" for key, value in model.items() if isinstance(value, float)))
    if model["given"]:
        console.print(f"Given by --constant: {', '.join(model['given'])}")
    if fit := model["kernels"]:
        console.print(_fit_table(fit, model["expert_flops"]))
    work = result["workload"]
    console.print(f"{work['requests']} requests from {work['arrivals']}; {work['routing']}")
    table = _table(f"{work['devices']} devices, {work['layers']} layers, simulated", ["policy"], list(_COLUMNS))
    for rows in (result["policies"], result["ablations"]):
        for name, row in rows.items():
            table.add_row(_short(name), *(f"{row[key]:.4g}" for key in _COLUMNS.values()))
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


def _table(title: str, names: list[str], numbers: list[str]) -> Table:
    """An empty table with columns of names and of numbers, which fits into 80 characters."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right")
    return table


def _short(policy: str) -> str:
    return policy.replace("moeless_without_", " without ")


def _fit_table(fit: dict, expert_flops: float) -> Table:
    constants = (
        f"{1e6 * fit['fixed_s']:.3g} µs, {1e12 / fit['memory_bandwidth']:.3g} µs a MB, "
        f"{1e6 * expert_flops / fit['matmul_rate']:.3g} µs an assignment"
    )
    table = _table(f"Experts fitted to {fit['source']}: {constants}", ["case"], ["measured µs", "fitted µs", "off by"])
    for label, measured, fitted in fit["cases"]:
        table.add_row(label, f"{1e6 * measured:.0f}", f"{1e6 * fitted:.0f}", f"{100 * (fitted / measured - 1):+.0f} %")
    return table


def _functions_table(rows: dict[str, dict]) -> Table:
    keys = {"loads": "loads", "evicted": "evictions", "expired": "expiries", "no room": "refusals"}
    keys |= {"warm": "warm", "cold": "cold"}
    title = "Expert functions of the simulated layers: totals, and states at the end"
    table = _table(title, ["policy"], ["plans", "misses", *keys])
    for name, row in rows.items():
        if "functions" in row:
            cells = (row["plans"], row["misses"], *(row["functions"][key] for key in keys.values()))
            table.add_row(_short(name), *map(str, cells))
    return table


def _windows_table(windows: dict, count: int) -> Table:
    titles = {
        "layer p50": "layer_ms_p50",
        "layer p99": "layer_ms_p99",
        "layer mean": "layer_ms_mean",
        "e2e p50": "e2e_ms_p50",
        "GB·s": "cost_gb_s",
        "GB·s while running": "execution_gb_s",
    }
    table = _table(f"Change in % over {count} windows: least, median, most", ["policy", "against"], list(titles))
    for base, rows in windows.items():
        for name, row in rows.items():
            if name != base:
                table.add_row(
                    _short(name), base, *(" ".join(f"{value:+.1f}" for value in row[key]) for key in titles.values())
                )
    return table


def _sensitivity_table(rows: list[dict]) -> Table:
    names = [name for name in rows[0]["policies"] if name != "static"]
    table = _table("Sensitivity: change against static in %, layer p50 / p99 / GB·s", ["constant"], ["factor", *names])
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
