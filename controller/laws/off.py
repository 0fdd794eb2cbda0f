"""No brownout, whatever happens: the comparison."""

from __future__ import annotations

from controller.laws.base import Decision, Law
from controller.reading import Reading


class Off(Law):
    """Full quality always."""

    def update(self, reading: Reading | None, dt_s: float) -> Decision:
        self.threshold_prefill = self.threshold_decode = 1.0
        return self._decision()
