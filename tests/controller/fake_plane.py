"""The real control plane over a block, with an engine's telemetry made by hand: a server without Triton."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from backend.brownout.block import MAX_STEPS, TELEMETRY, Block
from backend.brownout.buckets import bucket_of
from backend.brownout.settings import Settings
from backend.errors import InvalidRequestError, UnavailableError
from backend.serving.control_adapter import ControlPlane
from controller.client import Held, Refused, Unreachable
from tests.controller.readings import measured_steps


class FakePlane:
    """`down` makes it unreachable; `record` is the engine's section, published anew before each call unless `frozen`."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.block = Block(folder / "block", 1)
        self.plane = ControlPlane(self.block, Settings(), **options)
        self.down = self.frozen = False
        self.changes: list[dict] = []
        self.record = np.zeros(1, TELEMETRY)
        self.row = self.record[0]
        self.row["ways"], self.row["max_batch_tokens"], self.row["max_running"] = 1 << 8, 256, 64
        self.row["threshold_prefill"] = self.row["threshold_decode"] = 1.0
        self.publish()

    def call(self, **parameters: float | int | str) -> dict:
        if self.down:
            raise Unreachable("connection refused")
        if not self.frozen:
            self.publish()
        try:
            status = self.plane.call(parameters)
        except InvalidRequestError as error:
            raise Refused(str(error)) from None
        except UnavailableError as error:
            raise Held(str(error)) from None
        if parameters:
            self.changes.append(parameters)
        return status

    def publish(self) -> None:
        self.row["time_s"] = time.monotonic()
        self.block.write_telemetry(0, self.record)

    def serve(self, ttft_s: float, itl_s: float, count: int = 20) -> None:
        """So many first tokens and gaps, and some steps."""
        self.row["ttft_counts"][bucket_of(ttft_s)] += count
        self.row["itl_counts"][bucket_of(itl_s)] += count
        for step in measured_steps(count=count):
            self.row["steps"][int(self.row["num_steps"]) % MAX_STEPS] = (
                step.seconds,
                step.prefill_tokens,
                step.decode_tokens,
                step.threshold_prefill,
                step.threshold_decode,
            )
            self.row["num_steps"] += 1

    def queue(self, **state: float) -> None:
        for name, value in state.items():
            self.row[name] = value
