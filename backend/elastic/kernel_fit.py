"""Constants of the cost model from measured kernels: a least squares fit to `python -m loadtest.bench kernels --json FILE`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from backend.errors import ConfigError

_KERNEL = "grouped_experts_forward"
#: With fewer cases the three constants would be mere interpolation.
_LEAST_CASES = 4


@dataclass(frozen=True)
class KernelFit:
    """An expert layer takes `fixed_s` and the longer of its bytes at `memory_bandwidth` and its FLOP at `matmul_rate`."""

    fixed_s: float
    #: Bytes/s and FLOP/s.
    memory_bandwidth: float
    matmul_rate: float
    #: Per case: label, measured seconds, seconds of the fit.
    cases: tuple[tuple[str, float, float], ...]
    source: str

    def constants(self) -> dict[str, float]:
        """As fields of `CostModel`."""
        return {
            "experts_s": self.fixed_s,
            "memory_bandwidth": self.memory_bandwidth,
            "matmul_rate": self.matmul_rate,
        }


def fit_kernels(path: Path, shape: str) -> KernelFit:
    """Fit the expert kernel's cases of a model shape. Raises ConfigError naming what the file lacks.

    Which cases memory bounds and which computation is part of the fit: cases in the order of FLOP per byte are cut in two
    where the relative squared error is least, and between the cuts the problem is linear in the three constants.
    """
    report = _read(path)
    cases = [case for case in report["cases"] if case["kernel"] == _KERNEL and case.get("time_us")]
    if not (chosen := [case for case in cases if case["shape"] == shape]):
        shapes = ", ".join(sorted({case["shape"] for case in cases})) or "nothing"
        raise ConfigError(f"{path} has no times of {_KERNEL} for {shape}; it has times for {shapes}")
    if len(chosen) < _LEAST_CASES:
        raise ConfigError(
            f"{path} has {len(chosen)} times of {_KERNEL} for {shape}, at least {_LEAST_CASES} are needed"
        )
    chosen.sort(key=lambda case: case["flops"] / case["bytes"])
    times, sizes, flops = (np.array([float(case[key]) for case in chosen]) for key in ("time_us", "bytes", "flops"))
    seconds = 1e-6 * times
    fixed, per_byte, per_flop = _fit(seconds, sizes, flops, path)
    fitted = fixed + np.maximum(per_byte * sizes, per_flop * flops)
    machine = report.get("machine", {})
    return KernelFit(
        fixed,
        1 / per_byte,
        1 / per_flop,
        tuple((case["case"], float(t), float(f)) for case, t, f in zip(chosen, seconds, fitted, strict=True)),
        f"{path.name}: {len(chosen)} cases of {shape}, {chosen[0]['dtype']}, {report.get('device', 'unknown device')}, "
        f"{machine.get('processor', 'unknown machine')}",
    )


def _read(path: Path) -> dict:
    """The report of the kernels, alone or in that of a whole benchmark."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        report = report.get("kernels") or report
        for case in report["cases"]:
            for key in ("kernel", "shape", "dtype", "case", "bytes", "flops"):
                case[key]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no report of loadtest.bench kernels: {error!r}") from None
    return report


def _fit(
    seconds: NDArray[np.float64], sizes: NDArray[np.float64], flops: NDArray[np.float64], path: Path
) -> Sequence[float]:
    """(fixed, per byte, per FLOP) in seconds for cases [N] in the order of FLOP per byte."""
    best, found = float("inf"), None
    for cut in range(1, len(seconds)):
        memory = np.arange(len(seconds)) < cut
        columns = np.stack([np.ones_like(seconds), sizes * memory, flops * ~memory], axis=1) / seconds[:, None]
        scale = columns.max(0)
        constants = nnls(columns / scale, np.ones_like(seconds))[0] / scale
        fitted = constants[0] + np.maximum(constants[1] * sizes, constants[2] * flops)
        error = float(((fitted / seconds - 1) ** 2).sum())
        if min(constants[1:]) > 0 and error < best:
            best, found = error, constants.tolist()
    if found is None:
        raise ConfigError(f"the times in {path} grow with neither bytes nor FLOP: no cost can be told from them")
    return found
