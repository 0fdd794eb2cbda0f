"""The picture of a simulation: latency against cost, and the distribution of layer latencies. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path


def draw(result: dict, path: Path) -> None:
    """Write a PNG for the result of `backend.elastic.simulate.run`; raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    front, spread = figure.subplots(1, 2)
    for name, row in {**result["policies"], **result["ablations"]}.items():
        ablation = name in result["ablations"]
        label = f"{name}, loss {loss:.1f} %" if (loss := row["quality_loss_percent"]) else name
        front.scatter(row["cost_gb_s"], row["layer_ms_p99"], marker="x" if ablation else "o", label=label)
        if not ablation:
            quantiles = row["layer_ms_quantiles"]
            spread.plot(quantiles, [i / (len(quantiles) - 1) for i in range(len(quantiles))], label=name)
    front.set(xlabel="cost, GB·s", ylabel="layer latency p99, ms", yscale="log", title="Latency and cost")
    front.legend(fontsize="x-small")
    spread.set(xlabel="layer latency, ms", ylabel="share of layers", xscale="log", title="Layer latency")
    spread.legend(fontsize="x-small")
    spread.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    for axis in (front.yaxis, spread.xaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    work = result["workload"]
    figure.suptitle(f"Simulated: {work['arrivals']}, {work['requests']} requests; {work['routing']}", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
