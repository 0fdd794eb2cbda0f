"""BrownoutServe's SLO-aware latency control (arXiv 2507.17133, Algorithm 2)."""

from __future__ import annotations

from controller.laws.base import Decision, Law, Limits
from controller.reading import Reading


class Salc(Law):
    """Once a window, for prefill (TTFT) and decode (inter-token latency) apart, by the P90 over the window:

    below warning_factor · SLO the threshold rises by `increase`, above the SLO it is multiplied by `decrease`, between
    them and where nothing was served it stays. The defaults are the paper's, whose objectives are 0.25 s and 0.15 s.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        warning_factor: float = 0.8,
        increase: float = 0.1,
        decrease: float = 0.8,
        window_s: float = 2.0,
    ) -> None:
        super().__init__(limits)
        self.window_s = window_s
        self._warning_factor = warning_factor
        self._increase = increase
        self._decrease = decrease
        self._since_s = 0.0

    def resume(self, threshold_prefill: float, threshold_decode: float) -> None:
        super().resume(threshold_prefill, threshold_decode)
        self._since_s = 0.0

    def update(self, reading: Reading | None, dt_s: float) -> Decision:
        self._since_s += dt_s
        if reading is None:
            return self._decision(prefill="no reading", decode="no reading")
        if self._since_s < self.window_s - 1e-9:
            return self._decision(prefill="window", decode="window")
        self._since_s = 0.0
        limits = self.limits
        self.threshold_prefill, prefill = self._next(
            self.threshold_prefill, reading.ttft_p90_s, limits.ttft_slo_s, limits.min_threshold_prefill
        )
        self.threshold_decode, decode = self._next(
            self.threshold_decode, reading.itl_p90_s, limits.itl_slo_s, limits.min_threshold_decode
        )
        return self._decision(prefill=prefill, decode=decode)

    def _next(self, theta: float, p90_s: float | None, slo_s: float, least: float) -> tuple[float, str]:
        if p90_s is None:
            return theta, "nothing served"
        if p90_s > slo_s:
            return max(least, theta * self._decrease), "dim"
        if p90_s < self._warning_factor * slo_s:
            return min(1.0, theta + self._increase), "brighten"
        return theta, "hold"
