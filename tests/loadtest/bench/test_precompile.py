"""Compiling beforehand: the processes together launch every case and every size of a step, on one layer."""

import math
import time

import torch

from backend.config import EngineConfig
from backend.engine import cuda_graphs, warm_up
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
        buckets = [cuda_graphs.buckets_for(20), cuda_graphs.mixed_buckets_for(2048)]
        seen.append((layers, buckets, warm_up.WARM_UP_TOKENS, config.max_batch_tokens))

    monkeypatch.setattr(precompile, "Engine", engine)
    whole = [cuda_graphs.buckets_for(20), cuda_graphs.mixed_buckets_for(2048)]
    sizes = {*warm_up.WARM_UP_TOKENS, 2048}
    assert sum(precompile.run_engine(CONFIG, part, 5, math.inf) for part in range(5)) == sum(map(len, [*whole, sizes]))
    assert {layers for layers, *_ in seen} == {1} and raw_config("dummy:tiny")["num_hidden_layers"] > 1
    for kind in range(2):
        assert sorted(size for _, buckets, *_ in seen for size in buckets[kind]) == whole[kind]
    assert {size for _, _, prompts, _ in seen for size in prompts} == sizes
    assert all(most >= max(20, *prompts) for *_, prompts, most in seen if prompts)
