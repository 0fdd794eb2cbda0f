"""Tables of the results of `bench engine`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from loadtest.bench import kernel_times
from loadtest.bench.memory import Growth, Memory, mib
from loadtest.bench.parts import StepTimes
from loadtest.bench.rounds import OURS, RATES, not_measured


def show(result: dict, checkpoint: str, console: Console) -> None:
    """The table of rates and whatever else was measured."""
    console.print(rates_table(result, checkpoint))
    for kind in ("points", "peers"):
        for name, other in result.get(kind, {}).items():
            if reason := not_measured(other):
                console.print(f"{name}: {reason}", style="red", markup=False)
            elif kind == "peers":
                console.print(f"{name}: {other['tokens_equal']:.0%} of the sequences have the same tokens")
    memory: Memory | None = result.get("memory")
    if memory is not None:
        console.print(str(memory), highlight=False)
    growth: Growth | None = result.get("memory_growth")
    if growth is not None:
        console.print(
            f"Resident memory grew by {growth.growth_bytes / 2**20:+.1f} MiB from step {growth.warm_up_steps} "
            f"({mib(growth.rss_after_warm_up_bytes)}) to step {growth.steps}"
        )
    if "profile" in result:
        console.print(profile_table(result["profile"]))
    if "decode_kernels_error" in result:
        console.print(f"kernels of a decode step: {result['decode_kernels_error']}", style="red", markup=False)
    if result.get("decode_kernels"):
        console.print(kernel_times.table(result["decode_kernels"]))


def rates_table(result: dict, checkpoint: str) -> Table:
    table = Table(title=f"{checkpoint}, tokens per second, medians")
    table.add_column("")
    for name in ("prefill", "decode", "output"):
        table.add_column(name, justify="right")
    points = result.get("points", {})
    if points:  # what explains their speed: active slots per layer, share of assignments that united experts served
        table.add_column("slots", justify="right")
        table.add_column("united", justify="right")

    def slots(figures: dict) -> list[str]:
        return [f"{figures['active_slots_per_layer']:.1f}", f"{figures['united_share']:.0%}"] if points else []

    table.add_row(OURS, *(f"{result[key]:.0f}" for key in RATES), *slots(result))
    for name, point in points.items():
        if not not_measured(point):
            table.add_row(name, *(f"{getattr(point['median'], key):.0f}" for key in RATES), *slots(point))
            table.add_row(f"{name} / {OURS}", *(f"{point['ratio'][key]:.2f}" for key in RATES))
    for name, peer in result.get("peers", {}).items():
        if not not_measured(peer):
            table.add_row(name, *(f"{getattr(peer['median'], key):.0f}" for key in RATES))
            table.add_row(f"{OURS} / {name}", *(f"{peer['ratio'][key]:.2f}" for key in RATES))
    return table


def profile_table(profile: dict[str, StepTimes]) -> Table:
    table = Table(title="Where a step's time goes, means")
    table.add_column("part")
    for kind, times in profile.items():
        table.add_column(f"{kind}, {times.tokens:.0f} tokens: ms", justify="right")
        table.add_column("share", justify="right")
    names = dict.fromkeys(name for times in profile.values() for name in times.parts)
    most = {name: max(times.parts.get(name, 0.0) / times.step_s for times in profile.values()) for name in names}
    for name in sorted(names, key=lambda name: -most[name]):
        cells = []
        for times in profile.values():
            seconds = times.parts.get(name, 0.0)
            cells += [f"{seconds * 1e3:.2f}", f"{seconds / times.step_s:.0%}"]
        table.add_row(name, *cells)
    table.add_section()
    whole = [cell for times in profile.values() for cell in (f"{times.step_s * 1e3:.2f}", "100%")]
    table.add_row("step", *whole)
    return table
