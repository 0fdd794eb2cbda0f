"""Steps of the engine on stand-ins for tensors of a GPU: they have a device, a type and a shape, but no values.

Whatever would meet a tensor on another device, or make the host wait for the device to read a value, is an error there; only
`HostCopy` may wait. Kernels in the Triton language are not run, only looked at what they are launched with.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the GPU kernels need Triton's compiler")

from triton.runtime.interpreter import InterpretedFunction

from backend.brownout.profile import Level, Profile
from backend.brownout.settings import Settings
from backend.config import EngineConfig
from backend.engine import model_runner
from backend.engine.engine import Engine
from backend.engine.request import Request
from backend.engine.sampling_params import SamplingParams
from backend.engine.scheduler import Schedule
from backend.errors import ConfigError
from backend.kernels import transfer
from backend.kernels.gpu import attention_prefill
from backend.kernels.transfer import HostCopy
from backend.models import dummy

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the engine itself is tested on it")


class Repeat:
    """A graph that calls its function again."""

    def capture(self, function):
        self.function, self.result = function, function()
        return self.result

    def replay(self) -> None:
        self.result.copy_(self.function())


class NoHiddenCopies(TorchDispatchMode):
    """Copies to the host must be those that the host does not wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in (*args[:2], result) if isinstance(value, torch.Tensor)]
        if function.overloadpacket.__name__ == "copy_":
            if (args[0].device.type, args[1].device.type) == ("cpu", "cuda"):
                assert (kwargs or {}).get("non_blocking", len(args) > 2 and args[2]), "a copy to the host that waits"
        elif tensors and tensors[0].device.type == "cuda":
            assert tensors[-1].device.type == "cuda", "a copy to the host"
        return result


_OPERATORS = {
    torch.Tensor.copy_: torch.ops.aten.copy_.default,
    torch.Tensor.__invert__: torch.ops.aten.bitwise_not.default,
}


class Indexing(TorchFunctionMode):
    """Some of torch's methods ask for the device itself, which is not there; the operators behind them do not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            return self.part(*args)
        if function is torch.Tensor.__setitem__:
            target, index, value = args
            if isinstance(index, torch.Tensor):
                return torch.ops.aten.index_put_(target, [index], value)
            part = self.part(target, index)
            return torch.ops.aten.copy_.default(part, value) if isinstance(value, torch.Tensor) else part.fill_(value)
        if function in _OPERATORS:
            return _OPERATORS[function](*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def part(self, x: torch.Tensor, index: object) -> torch.Tensor:
        dim, items = 0, index if isinstance(index, tuple) else (index,)
        for number, item in enumerate(items):
            if item is ...:
                dim = x.dim() - (len(items) - 1 - number)
                continue
            if item is None:
                x = x.unsqueeze(dim)
            elif isinstance(item, slice):
                x = torch.ops.aten.slice.Tensor(x, dim, item.start, item.stop, item.step or 1)
            elif isinstance(item, torch.Tensor):
                x = torch.ops.aten.index.Tensor(x, [*[None] * dim, item])
            else:
                x = x.select(dim, item)
                continue
            dim += 1
        return x


def specialization(kernel: InterpretedFunction, args: tuple, options: dict[str, object]) -> tuple:
    """What Triton compiles a kernel anew for: constants, types, and numbers and addresses by whether they are 1 or end a 16."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    never, never_by_place = (kernel.kwargs[f"do_not_specialize{which}"] or () for which in ("", "_on_alignment"))
    parameters = inspect.signature(kernel.fn).parameters
    key: list[object] = [kernel.fn.__name__]
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            aligned = name in never_by_place or value.storage_offset() * value.element_size() % 16 == 0
            key.append((name, value.dtype, aligned))
        elif name not in parameters or "constexpr" in str(parameters[name].annotation) or value is None:
            key.append((name, value))
        elif isinstance(value, int) and name not in never:
            key.append((name, value == 1, value % 16 == 0))
    return tuple(key)


@pytest.fixture
def gpu(monkeypatch) -> Iterator[SimpleNamespace]:
    """A GPU without values; counts launches, what would be compiled for them, and how often the host waits."""
    seen = SimpleNamespace(launches=0, waits=0, compiled=set())

    def launch(kernel: InterpretedFunction, *args, grid, warmup, **options) -> None:
        tensors = [value for value in (*args, *options.values()) if isinstance(value, torch.Tensor)]
        assert tensors and {tensor.device.type for tensor in tensors} == {"cuda"}
        assert all(count > 0 for count in grid), "an empty grid"
        seen.launches += 1
        seen.compiled.add(specialization(kernel, args, options))

    def values(copy: HostCopy) -> list[np.ndarray]:
        seen.waits += 1
        return [np.ones(host.shape, np.int64) for host in copy._host]

    def check_device(device: torch.device) -> None:
        assert device.index is not None, "torch takes no other"

    properties = SimpleNamespace(multi_processor_count=132)
    for name, stand_in in {
        "device_count": lambda: 1,
        "set_device": check_device,
        "empty_cache": lambda: None,
        "mem_get_info": lambda _: (2**32, 2**33),
        "get_device_name": lambda _: "stand-in",
        "get_device_properties": lambda _: properties,
        "Event": lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(InterpretedFunction, "run", launch)
    monkeypatch.setattr(HostCopy, "numpy", values)
    monkeypatch.setattr(model_runner, "cuda_graphs", lambda: Repeat)
    monkeypatch.setattr(transfer, "host_buffer", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    # Values are not made, and there is no generator for a device that is not there.
    monkeypatch.setattr(dummy, "fill", lambda *_: None)
    monkeypatch.setattr(dummy, "fill_brownout", lambda *_: None)
    # torch says nothing of the shape of this product's result.
    product = torch.mm

    def mm(
        a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        result = product(a, b).to(out_dtype or a.dtype)
        return result if out is None else torch.ops.aten.copy_.default(out, result)

    monkeypatch.setattr(torch, "mm", mm)
    attention_prefill._tiles.cache_clear()
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True), NoHiddenCopies(), Indexing():
        yield seen
    attention_prefill._tiles.cache_clear()


def make_engine(**options: object) -> Engine:
    sizes = {"max_model_len": 128, "max_running": 6, "max_batch_tokens": 64}
    return Engine(EngineConfig(checkpoint="dummy:tiny", device="cuda", **sizes, **options))


def add(engine: Engine, number: int, **params: object) -> None:
    params = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, **params}
    engine.add(Request(number, [1 + number] * (5 + 30 * number), SamplingParams(**params)))


def give_tables(engine: Engine) -> None:
    """United experts and similarities, which cannot be made without values."""
    for block in engine.runner.model.moe_blocks:
        block.similarity = torch.empty(8, 8, device="cuda")
        block.expert_map._united_slots_of_way[4] = torch.empty(8, dtype=torch.int64, device="cuda")
    engine.runner.available = replace(engine.runner.available, ways=(4,), similarity=True)


KINDS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.5, "min_tokens": 3},
]


@pytest.mark.parametrize("mechanism", [None, "united", "drop", "reroute", "top_k", "piggyback"])
@pytest.mark.parametrize("graphs", ["on", "off"])
def test_a_step_stays_on_the_device_and_waits_once(gpu, graphs: str, mechanism: str | None) -> None:
    engine = make_engine(cuda_graphs=graphs)
    assert engine.overlap and engine.runner.device == torch.device("cuda", 0)
    give_tables(engine)
    if mechanism is not None:
        engine.set_settings(Settings(threshold_prefill=0.5, threshold_decode=0.5, mechanism=mechanism))
    for number, params in enumerate(KINDS):
        add(engine, number, **params)
    steps, launches = 0, gpu.launches
    while engine.has_work:
        waits = gpu.waits
        engine.step()
        steps += 1
        assert gpu.waits - waits == 1, "for tokens and what brownout replaced together, or for a part of a prompt"
        assert steps < 30
    assert steps >= 6 and gpu.launches > launches


def test_all_levels_of_the_profile_are_compiled_and_captured_at_the_start(gpu, monkeypatch) -> None:
    """Those that the engine cannot follow (here: without united experts) are left out."""
    level = Level("united", 0, 1.0, 1.0, 0.0, 8.0, 2.0, 1.0)
    deeper = [
        replace(level, threshold_decode=t, mechanism=m) for m, t in (("drop", 0.5), ("drop", 0.0), ("top_k", 0.5))
    ]
    missing = replace(level, threshold_decode=0.0, way=4)
    profile = Profile("tiny", "", 1, "score", (level, *deeper, missing))
    monkeypatch.setattr(model_runner, "find_profile", lambda *_: profile)
    runner = make_engine(cuda_graphs="on").runner
    captured = set(runner.graphs._captured)
    assert captured == {
        (size, (mechanism, "count")) for size in runner.graphs.buckets for mechanism in ("united", "drop", "top_k")
    }
    assert {bool(size.tiles) for size, _ in captured} == {True, False}, "decode steps and those with prompts"
    assert runner.model.variant == ("united", "count") and not any(runner.browned_classes)


def test_the_cache_leaves_memory_for_graphs_and_steps(gpu, monkeypatch) -> None:
    for graphs, least in (("off", 2 * 2**30), ("on", 2 * 2**30 + 6 * 24 * 2**20)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, least=least: (least, 2**33))
        with pytest.raises(ConfigError, match="kv_cache_memory gives 0 KV blocks"):
            make_engine(cuda_graphs=graphs)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, least=least: (least + 2**20, 2**33))
        engine = make_engine(cuda_graphs=graphs)
        assert engine.runner.kv_cache.k[0].nbytes * 4 <= 2**20
    assert len(engine.runner.graphs.buckets) == 6


def mixed_step(
    runner: model_runner.ModelRunner, num_decodes: int, prompt: int, context: int = 16, cached: int = 0
) -> None:
    """One token of each of `num_decodes` sequences, in such contexts, and a prompt of that length after what is cached."""
    schedule = Schedule(num_decodes=num_decodes + (prompt == 1))
    for length, computed in [*[(context, context - 1)] * num_decodes, *[(cached + prompt, cached)] * (prompt > 0)]:
        sequence = Request("mixed", [0] * length, SamplingParams()).sequences[0]
        sequence.num_computed = computed
        sequence.blocks.extend(range(-(-length // 16)))
        schedule.sequences.append(sequence)
        schedule.num_tokens.append(length - computed)
    runner.run(schedule)


EDGES = [2**power + offset for power in range(4, 11) for offset in (-1, 0, 1)]
DENSE = [*range(1, 40), *range(40, 700, 9), *(edge + 1 for edge in EDGES), 1500, 2047, 2048]


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ("qwen1.5-moe-a2.7b", [*range(1, 8), *EDGES, 300, 400, 2048]),
        *(
            pytest.param(shape, DENSE, marks=pytest.mark.slow)
            for shape in ("qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "mixtral-8x7b")
        ),
    ],
)
def test_nothing_is_compiled_once_the_engine_is_ready(gpu, monkeypatch, shape: str, numbers: list[int]) -> None:
    """Whatever number of sequences decode, beside whatever prompt, in a graph or not; `numbers` of tokens in all."""
    monkeypatch.setitem(dummy.SHAPES, "one-layer", {**dummy.SHAPES[shape], "num_hidden_layers": 1})
    sizes = {"max_model_len": 2048, "max_running": 256, "max_batch_tokens": 2048, "kv_cache_blocks": 1024}
    config = EngineConfig(checkpoint="dummy:one-layer", device="cuda", dtype="bfloat16", **sizes)
    runner = Engine(config).runner
    ready = set(gpu.compiled)
    assert len({kernel for kernel, *_ in ready}) >= 10
    assert runner.graphs is not None and runner.graphs.mixed_buckets
    runner.graphs.mixed_buckets.clear()  # a replay compiles nothing; this is as if no graph were for such steps
    for tokens in sorted({*numbers}):
        for num_decodes in {0, 1, tokens // 2, tokens}:
            if num_decodes <= min(tokens, 256):
                mixed_step(runner, num_decodes, tokens - num_decodes)
        assert gpu.compiled == ready, (tokens, gpu.compiled - ready)
    for context in (100, 257, 600, 1025, 2048):
        for num_decodes in (1, 3, 50):
            mixed_step(runner, num_decodes, 0, context)
            mixed_step(runner, num_decodes, 7, context, cached=context - 7)
        assert gpu.compiled == ready, (context, gpu.compiled - ready)


def test_a_decode_step_is_few_launches(gpu) -> None:
    """A layer: heads into the cache, attention, a norm, the choice of experts in three, the experts in three with the next norm."""
    engine = make_engine(cuda_graphs="off")
    give_tables(engine)
    engine.set_settings(Settings(threshold_prefill=0.5, threshold_decode=0.5))
    add(engine, 0)
    add(engine, 1)
    engine.step()
    launches = gpu.launches
    engine.step()
    assert gpu.launches - launches == 1 + 2 * 9, "the first norm and two layers"


@pytest.mark.parametrize(("num_decodes", "prompt"), [(3, 0), (3, 20), (0, 50)])
def test_a_step_that_is_replayed_launches_no_kernel(gpu, monkeypatch, num_decodes: int, prompt: int) -> None:
    runner = make_engine(cuda_graphs="on").runner
    replayed = []
    monkeypatch.setattr(Repeat, "replay", lambda graph: replayed.append(graph))
    launches = gpu.launches
    mixed_step(runner, num_decodes, prompt)
    assert len(replayed) == 1 and gpu.launches == launches


def test_the_load_of_experts_is_read_at_once(gpu, monkeypatch) -> None:
    engine, read = make_engine(), []
    add(engine, 0)
    engine.step()
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: (read.append(x.device.type), [1.0] * len(x))[1])
    active, assignments = engine.runner.model.slot_usage()
    assert read == ["cuda"] and active == [1.0, 1.0] and assignments > 0


def test_experts_in_eight_bits_are_made_on_the_device(gpu, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    engine = make_engine(expert_dtype="fp8")
    experts = engine.runner.model.moe_block(0).experts
    assert experts.w13.dtype == experts.w2.dtype == torch.float8_e4m3fn
    assert {part.device.type for part in (experts.w13, experts.w2, *experts.scales)} == {"cuda"}
    add(engine, 0)
    while engine.has_work:
        engine.step()


def test_the_stand_in_notices_what_it_is_there_for(gpu) -> None:
    there = torch.zeros(3, device="cuda")
    with pytest.raises(DataDependentOutputException):
        there[0].item()
    with pytest.raises(RuntimeError, match="device"):
        there + torch.zeros(3)
    with pytest.raises(AssertionError, match="to the host"):
        there.cpu()
