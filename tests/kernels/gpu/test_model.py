"""A whole model on the GPU kernels makes the tokens that it makes on the CPU kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need Triton's compiler")

from backend.config import EngineConfig
from backend.engine.engine import Engine
from backend.engine.request import Request
from backend.engine.sampling_params import SamplingParams
from backend.kernels import cpu, gpu, kernels_for, reference
from backend.models.attention import KVCache


def test_every_device_has_the_same_kernels() -> None:
    assert kernels_for(torch.device("cuda")) is gpu
    assert kernels_for(torch.device("cuda"), "triton") is gpu
    assert set(gpu.__all__) == set(cpu.__all__) == set(reference.__all__)
    with_torch = kernels_for(torch.device("cuda"), "torch")
    assert with_torch.prefill_attention is reference.prefill_attention
    assert with_torch.grouped_experts_forward is gpu.grouped_experts_forward


class Repeat:
    """A graph that calls its function again."""

    def capture(self, function):
        self.function, self.result = function, function()
        return self.result

    def replay(self) -> None:
        self.result.copy_(self.function())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the engine's own tests run on the GPU there")
def test_an_engine_on_gpu_kernels_makes_the_same_tokens(monkeypatch) -> None:
    """Chunked prompts beside decodes, and decode steps with padding rows; the shared expert is in slots, as on a GPU."""

    def tokens(with_graphs: bool) -> dict[object, list[int]]:
        config = EngineConfig(
            checkpoint="dummy:tiny", dtype="float32", device="cpu", max_model_len=64, max_running=4, max_batch_tokens=24
        )
        engine, made = Engine(config), {}
        runner = engine.runner
        if with_graphs:
            runner.model.fold_shared_experts()
            blocks = runner.num_blocks + 1
            runner.kv_cache = KVCache(
                runner.model.config, blocks, runner.block_size, dtype=runner.model.dtype, device=runner.device
            )
            runner.graphs = runner.make_graphs(config, Repeat)
        for number in range(3):
            params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
            engine.add(Request(number, [(11 * number + i) % 500 for i in range(4 + 14 * number)], params))
        while engine.has_work:
            for event in engine.step():
                made.setdefault(event.request_id, []).append(event.token_id)
        return made

    expected = tokens(with_graphs=False)
    monkeypatch.setattr("backend.models.model.kernels_for", lambda *_: gpu)
    assert tokens(with_graphs=True) == expected
