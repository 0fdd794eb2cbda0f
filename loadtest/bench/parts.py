"""Where the time of a step goes, by wrapping the engine's parts from outside while it is measured."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import msgspec

from backend.engine import engine as engine_module
from backend.engine.engine import Engine
from backend.engine.scheduler import Schedule
from loadtest.bench.timing import synchronize

#: The part that each kernel belongs to; others stand under their own name.
KERNEL_PARTS = {
    "route": "route",
    "router_scores": "route",
    "remap_experts": "remap",
    "select_experts": "remap",
    "add_shared_slots": "remap",
    "grouped_experts_forward": "grouped experts",
    "experts_add_rms_norm": "grouped experts",
    "decode_attention": "attention",
    "prefill_attention": "attention",
    "mixed_attention": "attention",
    "linear": "qkv and output",
    "output_logits": "lm head",
    "rms_norm": "norms, rope, KV store",
    "add_rms_norm": "norms, rope, KV store",
    "apply_rope": "norms, rope, KV store",
    "store_kv": "norms, rope, KV store",
    "rotate_and_store": "norms, rope, KV store",
    "gated_mlp": "dense MLP",
}
SHARED_EXPERT, DENSE = "shared expert", "dense MLP"
SCHEDULING, BATCH, BOOKING, SAMPLING = "scheduling", "batch building", "booking", "sampling"
#: The step's own time: describing rows to the sampler, ends of sequences, events.
EMIT = "emit"
MODEL_REST = "model, the rest"


class StepTimes(msgspec.Struct, kw_only=True):
    """Seconds of steps of one kind, by part; as means the parts' sum is `step_s`."""

    steps: int
    step_s: float
    tokens: float
    parts: dict[str, float]


@dataclass(frozen=True)
class _Step:
    kind: str
    seconds: float
    tokens: int
    parts: dict[str, float]


class PartTimes:
    """Own time of each part: what is called from within a part counts there and not in its caller.

    Each part's end waits for the device, so on a GPU a profiled step is longer than one that is not.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seconds: dict[str, float] = defaultdict(float)
        #: Names of the parts that are being timed, and when the innermost began or went on.
        self._open: list[str] = []
        self._since = 0.0
        self._absorbing = False
        self._steps: list[_Step] = []
        self._schedule: Schedule | None = None

    def timed(self, function: Callable, part: str, absorbs: bool = False) -> Callable:
        """`function` under `part`; `absorbs`: so is all it calls."""

        def call(*args: object, **kwargs: object) -> object:
            if self._absorbing:
                return function(*args, **kwargs)
            self._switch()
            self._open.append(part)
            self._absorbing = absorbs
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()
                self._absorbing = False

        return call

    def _switch(self) -> None:
        """Book the time since the last switch on the innermost open part."""
        synchronize(self.engine.runner.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Wrap the engine's parts for the time of the block."""
        engine, model = self.engine, self.engine.runner.model
        kernels = model.kernels
        wraps = [
            (engine.scheduler, "schedule", SCHEDULING, False),
            (engine.runner.batches, "build", BATCH, False),
            (engine.runner, "run", MODEL_REST, False),
            (engine, "_book", BOOKING, False),
            (engine_module, "Sampling", SAMPLING, False),
            (engine, "step", EMIT, False),
        ]
        for name in kernels.__all__:
            wraps.append((kernels, name, KERNEL_PARTS.get(name, name), False))
        for layer in model.layers:
            if layer.moe is not None and layer.moe.shared_expert is not None:
                wraps.append((layer.moe, "shared_expert", SHARED_EXPERT, True))
                wraps.append((layer.moe, "shared_gate", SHARED_EXPERT, True))
            if layer.mlp is not None:
                wraps.append((layer, "mlp", DENSE, True))
        with contextlib.ExitStack() as stack:
            for owner, name, part, absorbs in wraps:
                stack.enter_context(patch.object(owner, name, self.timed(getattr(owner, name), part, absorbs)))
            noted = engine.scheduler.schedule
            stack.enter_context(patch.object(engine.scheduler, "schedule", lambda: self._note(noted())))
            yield

    def _note(self, schedule: Schedule) -> Schedule:
        self._schedule = schedule
        return schedule

    def step(self) -> list:
        """One engine step while attached; recorded as a `decode`, a `prefill` or a `mixed` step."""
        self.seconds.clear()
        started = time.perf_counter()
        events = self.engine.step()
        elapsed = time.perf_counter() - started
        if self._schedule:
            decodes, sequences = self._schedule.num_decodes, len(self._schedule.sequences)
            kind = "decode" if decodes == sequences else "prefill" if decodes == 0 else "mixed"
            self._steps.append(_Step(kind, elapsed, sum(self._schedule.num_tokens), dict(self.seconds)))
        return events

    def summary(
        self, kind: str | None = None, skip: int = 0, average: Callable[[list[float]], float] = statistics.fmean
    ) -> StepTimes | None:
        """Averages over the recorded steps of a kind (None: any) but for the first `skip`; None if there are none."""
        kept = [step for step in self._steps if kind in (None, step.kind)][skip:]
        if not kept:
            return None
        names = dict.fromkeys(name for step in kept for name in step.parts)
        return StepTimes(
            steps=len(kept),
            step_s=average([step.seconds for step in kept]),
            tokens=statistics.fmean(step.tokens for step in kept),
            parts={name: average([step.parts.get(name, 0.0) for step in kept]) for name in names},
        )
