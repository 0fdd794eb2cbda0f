"""What `bench kernels` runs: each kernel at the sizes of a model, with arguments made from a seed.

Letters as in `backend.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from backend.brownout.settings import TOKEN_CLASSES
from backend.engine import sampler
from backend.engine.penalties import SampleRow
from backend.engine.sampling_params import SamplingParams
from backend.kernels import reference
from backend.kernels.query_tiles import query_tiles, tile_queries
from backend.models.config import ModelConfig
from backend.models.moe import num_folded
from loadtest.bench import kernel_costs
from loadtest.bench.floors import Cost
from loadtest.bench.interpreter import interpreting

BLOCK_SIZE = 16
#: Rows of a decode step and of a prefill step.
DECODE_ROWS = (1, 8, 32)
PREFILL_ROWS = (512, 2048)
#: Sequences and cached tokens of each in a decode step.
DECODE_CONTEXTS = ((8, 192), (32, 192), (32, 1024))
LONG_CONTEXTS = ((64, 512), (64, 4096))

Arguments = tuple


@dataclass(frozen=True)
class Case:
    """One kernel with one set of arguments."""

    kernel: str
    label: str
    #: Fresh arguments; the same generator state gives the same ones.
    make: Callable[[torch.Generator], Arguments]
    #: What is to be compared: from what the kernel returned and its arguments, which it may have written to.
    outputs: Callable[[object, Arguments], list[Tensor]] = lambda returned, _: _tensors(returned)
    #: How the kernel is called with these arguments, where some of them have to be named.
    bind: Callable[[Callable], Callable] = lambda function: function
    #: Whether its weights or keys and values come from memory in a step (they are larger than the caches there).
    streams: bool = False

    @property
    def captures(self) -> bool:
        """Whether it can stand in a CUDA graph: the sampler reads its tokens back."""
        return self.kernel != "sample"

    def cost(self, args: Arguments) -> Cost:
        return getattr(kernel_costs, self.kernel)(*args)


@dataclass(frozen=True)
class Sizes:
    """Rows and contexts to measure."""

    decode_rows: tuple[int, ...] = DECODE_ROWS
    prefill_rows: tuple[int, ...] = PREFILL_ROWS
    contexts: tuple[tuple[int, int], ...] = DECODE_CONTEXTS

    @classmethod
    def for_device(cls, device: torch.device) -> Sizes:
        if device.type == "cpu" and interpreting():
            return cls(decode_rows=(1, 4), prefill_rows=(40,), contexts=((2, 40),))
        if device.type == "cpu":
            return cls()
        return cls(decode_rows=(1, 8, 32, 64), prefill_rows=(2048, 8192), contexts=LONG_CONTEXTS)


class Samplers:
    """The engine's sampler as a kernel: [R, V] logits and R rows -> [R] tokens."""

    @staticmethod
    def sample(logits: Tensor, rows: list[SampleRow]) -> Tensor:
        return torch.tensor([sampled.token_id for sampled in sampler.sample(logits, rows)])


class ReferenceSamplers:
    """The same tokens row by row in float64: the best one, or where the row's number falls in the cumulative distribution."""

    @staticmethod
    def sample(logits: Tensor, rows: list[SampleRow]) -> Tensor:
        tokens = []
        for row, values in zip(rows, logits.double().cpu(), strict=True):
            if row.params.greedy:
                tokens.append(int(values.argmax()))
            else:
                ends = torch.softmax(values / row.params.temperature, 0).cumsum(0)
                target = sampler.uniform(row.seed, row.position) * ends[-1]
                tokens.append(int(torch.searchsorted(ends, target, right=True)))
        return torch.tensor(tokens)


def implementation_of(case: Case, kernels: ModuleType | SimpleNamespace) -> Callable:
    """The function that a case measures, from a device's kernels."""
    return Samplers.sample if case.kernel == "sample" else case.bind(getattr(kernels, case.kernel))


def reference_of(case: Case) -> Callable:
    """What it is compared with."""
    return ReferenceSamplers.sample if case.kernel == "sample" else case.bind(getattr(reference, case.kernel))


def cases(config: ModelConfig, dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """All cases of a model; `dtype` is that of weights and KV cache, activations as in `MoeModel`."""
    make = _Maker(config, dtype, torch.float32 if device.type == "cpu" else dtype, device)
    k, hidden = config.top_k, config.hidden_size
    rows = (*sizes.decode_rows, *sizes.prefill_rows)
    few, many = sizes.decode_rows[-1], sizes.prefill_rows[-1]
    for n in rows:
        yield Case("grouped_experts_forward", f"{n} tokens", make.experts(n, config.num_experts), streams=True)
    # What full brownout leaves: the united experts of 4-way and of 8-way groups.
    for way in (4, 8):
        active = max(k, -(-config.num_experts // way))
        label = f"{few} tokens on {active} slots"
        yield Case("grouped_experts_forward", label, make.experts(few, active), streams=True)
    shared = num_folded(config)
    with_norm = make.experts_and_norm(few, shared)
    yield Case("experts_add_rms_norm", f"{few} tokens", with_norm, lambda out, args: [out, args[5]], streams=True)
    if shared:
        label = f"{few} tokens, shared expert folded"
        yield Case("grouped_experts_forward", label, make.experts(few, config.num_experts, shared), streams=True)
        yield Case("add_shared_slots", f"{few} rows", make.shared(few, shared))
    for sequences, context in sizes.contexts:
        label = f"{sequences} × {context} tokens"
        yield Case("decode_attention", label, make.decode(sequences, context), streams=True)
    for n in sizes.prefill_rows:
        chunk = min(n, 128)
        yield Case("prefill_attention", f"{n // chunk} × {chunk} tokens", make.prefill(n // chunk, chunk))
    yield Case(
        "mixed_attention", f"{few} × {sizes.contexts[0][1]} tokens and a prompt", make.mixed(few, sizes.contexts[0][1])
    )
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    wide = config.shared_expert_size or config.expert_size
    for n in rows:
        yield Case("gated_mlp", f"{wide} wide, {n} rows", make.mlp(n, wide), streams=True)
    for name, (size_in, size_out) in {"qkv": (hidden, q + 2 * kv), "out": (q, hidden)}.items():
        for n in rows:
            yield Case("linear", f"{name}, {n} rows", make.linear(n, size_in, size_out), streams=True)
    for n in sizes.decode_rows:
        yield Case("output_logits", f"{n} rows", make.linear(n, hidden, config.vocab_size), streams=True)
    for n in (few, many):
        yield Case("rms_norm", f"{n} rows", make.norm(n))
        yield Case("add_rms_norm", f"{n} rows", make.add_norm(n), lambda out, args: [out, args[1]])
        yield Case("apply_rope", f"{n} rows", make.rope(n), lambda _, args: [args[0]])
        yield Case("store_kv", f"{n} rows", make.store(n), lambda _, args: [args[2], args[3]])
        yield Case("rotate_and_store", f"{n} rows", make.rotate_and_store(n), _rotated)
        yield Case("route", f"{n} rows", make.route(n))
        yield Case("router_scores", f"{n} rows", make.route(n), bind=lambda scores: lambda *args: scores(*args[:3]))
        yield Case("remap_experts", f"{n} rows", make.remap(n), _served)
        named = lambda function: lambda *args: function(*args[:5], united_slots=args[5])  # noqa: E731
        yield Case("remap_experts", f"8-way, theta 0, {n} rows", make.remap(n, 0.0, way=8), _served, bind=named)
        yield Case("select_experts", f"top_k, theta 0.5, {n} rows", make.remap(n, 0.5), _served)
    yield Case("sample", f"greedy, {few} rows", make.sample(few, SamplingParams(temperature=0.0)))
    yield Case("sample", f"temperature 1, {few} rows", make.sample(few, SamplingParams(temperature=1.0)))


def copies(args: Arguments) -> Arguments:
    """The same arguments once more, for what writes to them."""
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in args)


def in_float32(args: Arguments) -> Arguments:
    """The arguments for the reference: copies, with all 16-bit numbers widened."""
    return tuple(a.float() if _is_half(a) else a.clone() if isinstance(a, Tensor) else a for a in args)


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.element_size() == 2


def _tensors(returned: object) -> list[Tensor]:
    return list(returned) if isinstance(returned, tuple) else [returned]  # type: ignore[list-item]


def _rotated(_: object, args: Arguments) -> list[Tensor]:
    """Query heads and both caches; what key and value heads hold afterwards is not defined."""
    heads, _cos, _sin, k_cache, v_cache, _slots = args
    return [heads[:, : heads.shape[1] - 2 * k_cache.shape[2]], k_cache, v_cache]


def _served(returned: tuple[Tensor, Tensor], _: Arguments) -> list[Tensor]:
    """Slots, and the weights of those assignments that are computed: the others have none."""
    slots, weights = returned
    return [slots, torch.where(slots >= 0, weights, 0.0)]


class _Maker:
    """Builders of arguments."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, activation: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.activation, self.device = config, dtype, activation, device

    def _normal(self, generator: torch.Generator, *shape: int, dtype: torch.dtype | None = None, std: float = 1.0):
        values = torch.empty(shape, dtype=dtype or self.activation, device=self.device)
        return values.normal_(0.0, std, generator=generator)

    def _weight(self, generator: torch.Generator, *shape: int) -> Tensor:
        return self._normal(generator, *shape, dtype=self.dtype, std=shape[-1] ** -0.5)

    def _chosen(self, generator: torch.Generator, tokens: int, among: int) -> Tensor:
        scores = torch.rand(tokens, among, generator=generator, device=self.device)
        return scores.topk(self.config.top_k).indices

    def _gate_weights(self, generator: torch.Generator, tokens: int) -> Tensor:
        return torch.rand(tokens, self.config.top_k, generator=generator, device=self.device)

    def experts(self, tokens: int, active: int, shared: int = 0) -> Callable[[torch.Generator], Arguments]:
        """`shared`: further slots that every token has."""
        c = self.config
        num_slots = c.num_experts + shared

        def build(g: torch.Generator) -> Arguments:
            w13 = self._weight(g, num_slots, 2 * c.expert_size, c.hidden_size)
            w2 = self._weight(g, num_slots, c.hidden_size, c.expert_size)
            slots, weights = self._chosen(g, tokens, active), self._gate_weights(g, tokens)
            if shared:
                always = torch.arange(c.num_experts, num_slots, device=self.device).expand(tokens, shared)
                share = torch.rand(tokens, 1, generator=g, device=self.device).expand(tokens, shared)
                slots, weights = torch.cat([slots, always], 1), torch.cat([weights, share], 1)
            return self._normal(g, tokens, c.hidden_size), w13, w2, slots, weights

        return build

    def experts_and_norm(self, tokens: int, shared: int) -> Callable[[torch.Generator], Arguments]:
        experts, norm = self.experts(tokens, self.config.num_experts, shared), self.add_norm(tokens)
        return lambda g: (*experts(g), *norm(g)[1:])

    def shared(self, tokens: int, num_slots: int) -> Callable[[torch.Generator], Arguments]:
        c = self.config
        return lambda g: (
            self._normal(g, tokens, c.hidden_size),
            self._weight(g, 1, c.hidden_size),
            self._chosen(g, tokens, c.num_experts),
            self._gate_weights(g, tokens),
            c.num_experts,
            num_slots,
        )

    def _cache(self, g: torch.Generator, sequences: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and block tables of sequences whose blocks lie anywhere."""
        per_sequence = -(-context // BLOCK_SIZE)
        shape = (sequences * per_sequence, BLOCK_SIZE, self.config.num_kv_heads, self.config.head_dim)
        k, v = (self._normal(g, *shape, dtype=self.dtype) for _ in range(2))
        tables = torch.randperm(shape[0], generator=g, device=self.device).view(sequences, per_sequence).int()
        return k, v, tables

    def decode(self, sequences: int, context: int) -> Callable[[torch.Generator], Arguments]:
        c = self.config

        def build(g: torch.Generator) -> Arguments:
            lens = torch.full((sequences,), context, dtype=torch.int32, device=self.device)
            q = self._normal(g, sequences, c.num_heads, c.head_dim)
            return q, *self._cache(g, sequences, context), lens, c.head_dim**-0.5, c.sliding_windows[0]

        return build

    def prefill(self, sequences: int, length: int) -> Callable[[torch.Generator], Arguments]:
        c = self.config

        def build(g: torch.Generator) -> Arguments:
            q = self._normal(g, sequences * length, c.num_heads, c.head_dim)
            lens = [length] * sequences
            return q, *self._cache(g, sequences, length), lens, lens, c.head_dim**-0.5, c.sliding_windows[0]

        return build

    def mixed(self, decodes: int, context: int, prompt: int = 128) -> Callable[[torch.Generator], Arguments]:
        """Decoding sequences with that context and a prompt, in a table that has room for more."""
        c = self.config

        def build(g: torch.Generator) -> Arguments:
            k, v, tables = self._cache(g, decodes + 1, max(context, prompt))
            rows, sequences = decodes + prompt + 16, decodes + 4
            lens = torch.zeros(sequences, dtype=torch.int32, device=self.device)
            lens[:decodes] = context
            queries = tile_queries(c.num_heads // c.num_kv_heads, self.activation.itemsize)
            table = torch.from_numpy(query_tiles([prompt], [prompt], queries, decodes, decodes))
            tiles = torch.zeros(len(table) + 8, 4, dtype=torch.int32, device=self.device)
            tiles[: len(table)] = table.to(self.device)
            tables = torch.cat([tables, tables.new_zeros(sequences - len(tables), tables.shape[1])])
            q = self._normal(g, rows, c.num_heads, c.head_dim)
            return q, k, v, tables, lens, tiles, c.head_dim**-0.5, c.sliding_windows[0]

        return build

    def linear(self, rows: int, size_in: int, size_out: int) -> Callable[[torch.Generator], Arguments]:
        return lambda g: (self._normal(g, rows, size_in), self._weight(g, size_out, size_in))

    def mlp(self, rows: int, size: int) -> Callable[[torch.Generator], Arguments]:
        m = self.config.hidden_size
        return lambda g: (self._normal(g, rows, m), self._weight(g, 2 * size, m), self._weight(g, m, size))

    def norm(self, rows: int) -> Callable[[torch.Generator], Arguments]:
        m, eps = self.config.hidden_size, self.config.rms_norm_eps
        return lambda g: (self._normal(g, rows, m), self._normal(g, m), eps)

    def add_norm(self, rows: int) -> Callable[[torch.Generator], Arguments]:
        m, eps = self.config.hidden_size, self.config.rms_norm_eps
        return lambda g: (self._normal(g, rows, m), self._normal(g, rows, m), self._normal(g, m), eps)

    def rope(self, rows: int) -> Callable[[torch.Generator], Arguments]:
        c = self.config
        heads = c.num_heads + 2 * c.num_kv_heads

        def build(g: torch.Generator) -> Arguments:
            # As in the model: queries and keys are a part of each row.
            x = self._normal(g, rows, heads, c.head_dim)[:, : c.num_heads + c.num_kv_heads]
            angles = 6.28 * torch.rand(rows, c.head_dim // 2, generator=g, device=self.device)
            return x, angles.cos().to(self.activation), angles.sin().to(self.activation)

        return build

    def store(self, rows: int) -> Callable[[torch.Generator], Arguments]:
        c = self.config

        def build(g: torch.Generator) -> Arguments:
            k, v = (self._normal(g, rows, c.num_kv_heads, c.head_dim) for _ in range(2))
            blocks = -(-2 * rows // BLOCK_SIZE)
            caches = [
                torch.zeros(blocks, BLOCK_SIZE, c.num_kv_heads, c.head_dim, dtype=self.dtype, device=self.device)
                for _ in range(2)
            ]
            slots = torch.randperm(blocks * BLOCK_SIZE, generator=g, device=self.device)[:rows]
            return k, v, *caches, slots

        return build

    def rotate_and_store(self, rows: int) -> Callable[[torch.Generator], Arguments]:
        c = self.config

        def build(g: torch.Generator) -> Arguments:
            _, cos, sin = self.rope(rows)(g)
            _, _, *caches, slots = self.store(rows)(g)
            return self._normal(g, rows, c.num_heads + 2 * c.num_kv_heads, c.head_dim), cos, sin, *caches, slots

        return build

    def route(self, rows: int) -> Callable[[torch.Generator], Arguments]:
        c = self.config
        return lambda g: (
            self._normal(g, rows, c.hidden_size),
            self._weight(g, c.num_experts, c.hidden_size),
            None,
            c.top_k,
            c.norm_topk_prob,
        )

    def remap(
        self, rows: int, threshold: float = 1.0, way: int | None = None
    ) -> Callable[[torch.Generator], Arguments]:
        count = self.config.num_experts

        def build(g: torch.Generator) -> Arguments:
            experts = torch.arange(count, device=self.device)
            thresholds = torch.full((len(TOKEN_CLASSES),), threshold, device=self.device)
            classes = torch.ones(rows, dtype=torch.int8, device=self.device)
            args = (self._chosen(g, rows, count), self._gate_weights(g, rows), experts, thresholds, classes)
            return args if way is None else (*args, count + experts // way)

        return build

    def sample(self, rows: int, params: SamplingParams) -> Callable[[torch.Generator], Arguments]:
        described = [SampleRow(params, seed, position=0) for seed in range(rows)]
        return lambda g: (self._normal(g, rows, self.config.vocab_size, dtype=torch.float32), described)
