"""What a step's kernels take on the device, as torch's profiler sees them, also within CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

#: Kernels that are reported by name; the others are summed.
_MOST = 30


class KernelTime(msgspec.Struct, kw_only=True):
    """One kernel (on a CPU: one operator) of a step: launches and microseconds, means over the steps."""

    name: str
    launches: float
    us: float


def measure(step: Callable[[], object], steps: int, device: torch.device) -> list[KernelTime]:
    """The kernels of `steps` calls, those that take longest first, and the sum of the rest."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    times = [
        KernelTime(
            name=event.key,
            launches=event.count / steps,
            us=(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / steps,
        )
        for event in seen.key_averages()
    ]
    times = sorted((time for time in times if time.us > 0), key=lambda time: -time.us)
    rest = times[_MOST:]
    if rest:
        total = KernelTime(name="others", launches=sum(t.launches for t in rest), us=sum(t.us for t in rest))
        times = [*times[:_MOST], total]
    return times


def table(times: list[KernelTime]) -> Table:
    made = Table(title="Kernels of a decode step")
    made.add_column("kernel", max_width=70, no_wrap=True)
    made.add_column("launches", justify="right")
    made.add_column("µs", justify="right")
    for time in times:
        made.add_row(time.name, f"{time.launches:.0f}", f"{time.us:.1f}")
    made.add_row("sum", f"{sum(t.launches for t in times):.0f}", f"{sum(t.us for t in times):.1f}")
    return made
