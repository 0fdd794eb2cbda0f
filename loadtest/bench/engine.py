"""Engine alone, beside transformers on the same checkpoint and prompts."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path

import torch

from backend.brownout.settings import Settings
from backend.config import EngineConfig
from backend.engine.engine import Engine
from backend.engine.request import Request, TokenOutput
from backend.engine.sampling_params import SamplingParams
from backend.models.dummy import PREFIX
from loadtest.bench.peers import TransformersPeer, export_shape, export_united
from loadtest.bench.workload import Rates, Workload, machine, peak_memory_bytes

#: Way of a shape's seeded united experts if none is asked for.
_SHAPE_WAY = 8


class OurEngine:
    """The product's engine as the benchmark drives it."""

    def __init__(self, config: EngineConfig, settings: Settings) -> None:
        self.engine = Engine(config)
        self.engine.set_settings(settings)
        #: Of the step half-way through the last run, when all requests decode.
        self.stats = self.engine.stats()

    def time_s(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Seconds from handing over all prompts to the last token. No prompt is cached from an earlier run."""
        self.engine.blocks.clear_cache()
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        started = time.perf_counter()
        for number, prompt in enumerate(prompts):
            self.engine.add(Request(number, prompt, params))
        tokens, half = 0, len(prompts) * new_tokens // 2
        while self.engine.has_work:
            made = sum(isinstance(event, TokenOutput) for event in self.engine.step())
            if tokens < half <= tokens + made:
                self.stats = self.engine.stats()
            tokens += made
        elapsed = time.perf_counter() - started
        if tokens != len(prompts) * new_tokens:
            raise RuntimeError(f"{tokens} tokens were made instead of {len(prompts) * new_tokens}")
        return elapsed


def run(
    *,
    checkpoint: str,
    work: Workload,
    settings: Settings,
    device: str,
    dtype: str,
    routing: str,
    runs: int,
    peers: list[str],
) -> dict[str, object]:
    """Measure ours and the peers in turn, run by run; returns the result as written to JSON."""
    with contextlib.ExitStack() as stack:
        united = similarity = ""
        if checkpoint.startswith(PREFIX) and settings.dims:
            united = str(settings.way or _SHAPE_WAY)
            similarity = "seeded" if settings.mechanism == "reroute" else ""
        if peers and checkpoint.startswith(PREFIX):
            # Peers read files: seeded weights are written once, and everyone loads them from there.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            checkpoint = str(export_shape(checkpoint, folder, dtype))
            if united:
                export_united(folder, int(united))
                united = ""
        config = EngineConfig(
            checkpoint=checkpoint,
            routing=routing,
            device=device,
            dtype=dtype,
            united=united,
            similarity=similarity,
            max_model_len=work.prompt_tokens + work.new_tokens,
            max_running=max(256, work.requests),
            max_waiting=max(1024, work.requests),
        )
        ours = OurEngine(config, settings)
        engines: dict[str, object] = {"ours": ours}
        for peer in peers:
            engines[peer] = TransformersPeer(checkpoint, ours.engine.runner.device, dtype)
        prompts = work.prompts(ours.engine.vocab_size)
        measured: dict[str, list[Rates]] = {name: [] for name in engines}
        for number in range(runs + 1):
            for name, engine in engines.items():
                first_s = engine.time_s(prompts, 1)
                all_s = engine.time_s(prompts, work.new_tokens)
                if number:  # the first round warms up
                    measured[name].append(Rates.of(work, first_s, all_s))
    result: dict[str, object] = {}
    median = Rates.median(measured["ours"])
    result |= {f: getattr(median, f) for f in Rates.__struct_fields__}
    result |= {
        "step_ms": work.requests / median.decode_tokens_per_s * 1e3,
        "active_slots_per_layer": ours.stats.active_slots,
        "active_slots_by_layer": ours.stats.active_slots_by_layer,
        "assignments_per_token": ours.stats.assignments_per_token,
        "united_share": ours.stats.united_share,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.startswith("cuda") else peak_memory_bytes(),
        "settings": {
            "threshold_prefill": settings.threshold_prefill,
            "threshold_decode": settings.threshold_decode,
            "mechanism": settings.mechanism,
            "way": ours.engine.available.way_of(settings),
            "checkpoint": checkpoint,
            "dtype": dtype,
            "device": device,
            "routing": routing,
        },
        "workload": work,
        "machine": machine(),
        "runs": measured.pop("ours"),
    }
    if peers:
        result["peers"] = {name: {"median": Rates.median(rates), "runs": rates} for name, rates in measured.items()}
    return result
