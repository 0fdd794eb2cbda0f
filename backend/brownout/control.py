"""Settings under a lease, as both ends of the block see them: the control plane grants, the engines enforce."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from backend.brownout.block import SETTINGS, Block, BlockError
from backend.brownout.settings import Settings

_VALUE_NAMES = ("threshold_prefill", "threshold_decode", "similarity_min", "resident_share", "way")


@dataclass(frozen=True)
class Lease:
    """What the settings section says. `values` hold until `end_s`, then `baseline` does."""

    values: Settings
    baseline: Settings
    owner: str = ""
    #: time.monotonic(); in the past: no lease.
    end_s: float = -math.inf
    #: The lowest threshold that the owner may still choose, as far as it has said so.
    floor: float = 1.0

    def live(self, now_s: float) -> bool:
        return now_s < self.end_s

    def in_force(self, now_s: float) -> Settings:
        """The settings at this moment."""
        return self.values if self.live(now_s) else self.baseline

    def left_s(self, now_s: float) -> float:
        return max(0.0, self.end_s - now_s)

    def granted(self, values: Settings, owner: str, lease_s: float, now_s: float, floor: float = 1.0) -> Lease:
        """The lease after a change. A version counts changes of values, not renewals; the lease's end is a change, too."""
        current = self.in_force(now_s)
        if lease_s <= 0:
            return replace(self, owner="", end_s=-math.inf, floor=1.0)
        if self.live(now_s) and replace(values, version=current.version) == current:
            version = current.version
        else:
            version = current.version + 1
        return Lease(
            replace(values, version=version),
            replace(self.baseline, version=version + 1),
            owner,
            now_s + lease_s,
            floor,
        )

    def write(self, block: Block) -> None:
        record = np.zeros(1, SETTINGS)
        row = record[0]
        row["version"] = self.baseline.version - 1
        for key, settings in (("values", self.values), ("baseline", self.baseline)):
            for name in _VALUE_NAMES:
                row[key][name] = getattr(settings, name)
            row[key]["mechanism"] = settings.mechanism.encode()
        row["owner"] = self.owner.encode()
        row["lease_end_s"], row["floor"] = self.end_s, self.floor
        block.write_settings(record)

    @classmethod
    def read(cls, block: Block) -> Lease:
        """Raises BlockError if the section cannot be read or holds nonsense."""
        row = block.read_settings()
        version = int(row["version"])
        try:
            return cls(
                _settings(row["values"], version),
                _settings(row["baseline"], version + 1),
                row["owner"].decode(),
                float(row["lease_end_s"]),
                float(row["floor"]),
            )
        except ValueError as error:
            raise BlockError(f"the settings in {block.path} make no sense: {error}") from None

    @classmethod
    def none(cls, baseline: Settings) -> Lease:
        """No lease: the baseline holds, with its version."""
        return cls(replace(baseline, version=baseline.version - 1), baseline)


def _settings(values: np.void, version: int) -> Settings:
    numbers = {name: values[name].item() for name in _VALUE_NAMES}
    return Settings(version=version, mechanism=values["mechanism"].decode(), **numbers)


class SettingsReader:
    """An engine's end: asked between steps, it says when the settings have changed.

    A block that cannot be read changes nothing until the lease that was last seen ends; then the baseline holds.
    """

    def __init__(self, block: Block) -> None:
        self._block = block
        self._lease = Lease.none(Settings())
        self._sequence = (0, 0)
        self._version: int | None = None
        #: Why the block could not be read, or an empty string.
        self.error = ""

    @property
    def floor(self) -> float:
        """The lowest threshold that is still to be expected; 1 while nobody has a lease."""
        return self._lease.floor if self._lease.live(time.monotonic()) else 1.0

    def changed(self) -> Settings | None:
        """The settings in force if they are not those of the call before."""
        try:
            sequence = self._block.settings_sequence()
            if sequence != self._sequence:
                self._sequence = sequence
                if sequence[1]:
                    self._lease = Lease.read(self._block)
                self.error = ""
        except (BlockError, OSError) as error:
            self.error = str(error)
        settings = self._lease.in_force(time.monotonic())
        if settings.version == self._version:
            return None
        self._version = settings.version
        return settings
