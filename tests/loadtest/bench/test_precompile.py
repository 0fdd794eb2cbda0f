"""Compiling beforehand: the processes together launch every case and every size of a step, on one layer."""

import math
import time

import torch

from backend.config import EngineConfig
from backend.engine import cuda_graphs, model_runner
from backend.models.dummy import raw_config
from loadtest.bench import precompile
from loadtest.bench.kernel_cases import Case

CONFIG = EngineConfig(checkpoint="dummy:tiny", device="cpu", max_running=20, max_batch_tokens=2048)


def test_parts_launch_each_case_once_and_nothing_after_the_deadline(monkeypatch):
    made = []

    def case(number: int, kernel: str = "rms_norm") -> Case:
        args = (torch.ones(2, 4), torch.ones(4), 1e-6)
        return Case(kernel, str(number), lambda _: (made.append(number), args)[1])

    every = [case(0), case(1, "linear"), case(2), case(3, "no such kernel"), case(4)]
    monkeypatch.setattr(precompile, "cases", lambda *_: iter(every))
    counts = [precompile.launch_cases(CONFIG, torch.float32, part, 2, math.inf) for part in range(2)]
    assert sorted(made) == [0, 2, 4] and sum(counts) == 3, "one has no kernel of ours, and one fails"
    assert precompile.launch_cases(CONFIG, torch.float32, 0, 1, time.time() - 1) == 0


def test_engines_of_one_layer_share_the_sizes(monkeypatch):
    seen = []

    def engine(config: EngineConfig) -> None:
        layers = raw_config(config.checkpoint)["num_hidden_layers"]
        seen.append((layers, cuda_graphs.buckets_for(20), model_runner._WARM_UP_TOKENS, config.max_batch_tokens))

    monkeypatch.setattr(precompile, "Engine", engine)
    whole = cuda_graphs.buckets_for(20)
    sizes = {*model_runner._WARM_UP_TOKENS, 2048}
    assert sum(precompile.run_engine(CONFIG, part, 5, math.inf) for part in range(5)) == len(whole) + len(sizes)
    assert {layers for layers, *_ in seen} == {1} and raw_config("dummy:tiny")["num_hidden_layers"] > 1
    assert sorted(bucket for _, buckets, *_ in seen for bucket in buckets) == whole
    assert {size for _, _, prompts, _ in seen for size in prompts} == sizes
    assert all(most >= max(20, *prompts) for *_, prompts, most in seen if prompts)
