"""Which worker holds the others up. Pure: what was measured is passed in."""

from __future__ import annotations

from collections.abc import Mapping

#: Layers over which the workers are compared.
_WINDOW = 64
#: A worker is slow if the engine waits for it alone so many times as long as for another one on average.
_FACTOR = 8.0


class Stragglers:
    """Compares how long an engine waits for each of its workers."""

    def __init__(self, least_s: float) -> None:
        """A worker for which a layer waits less than `least_s` seconds on average is never slow."""
        self._least_s = least_s
        self.forget()

    def forget(self) -> None:
        """Begin anew: the workers have changed."""
        self._layers = 0
        self._waited: dict[int, float] = {}

    def observe(self, waited: Mapping[int, float]) -> int | None:
        """Seconds that a layer waited for each worker after those that it waited for before. Returns a worker that is slow.

        The worker waited for first has the time that all need, so let it be another one each time.
        """
        if len(waited) < 2:
            return None
        for worker, seconds in waited.items():
            self._waited[worker] = self._waited.get(worker, 0.0) + seconds
        self._layers += 1
        if self._layers < _WINDOW:
            return None
        slowest = max(self._waited, key=lambda worker: self._waited[worker])
        longest = self._waited[slowest]
        others = (sum(self._waited.values()) - longest) / (len(self._waited) - 1)
        slow = longest > self._least_s * self._layers and longest > _FACTOR * others
        self.forget()
        return slowest if slow else None
