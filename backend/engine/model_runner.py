"""The data plane: one model on one device with its paged KV cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from backend.brownout.layer_thresholds import LayerThresholds
from backend.brownout.profile import find_profile
from backend.brownout.settings import Available, Settings
from backend.config import EngineConfig
from backend.elastic.worker_pool import WorkerPool
from backend.engine.batch import BatchBuilder, build_batch
from backend.engine.cuda_graphs import DecodeGraphs, Graph, cuda_graphs
from backend.engine.request import Request
from backend.engine.sampler import SampleRow, sample
from backend.engine.sampling_params import SamplingParams
from backend.engine.scheduler import Schedule
from backend.errors import ConfigError
from backend.experts.resident import ResidentPool
from backend.kernels import check_attention, has_triton
from backend.kernels.transfer import HostCopy
from backend.models import load_model
from backend.models.attention import KVCache
from backend.models.forward_batch import ForwardBatch

log = logging.getLogger(__name__)

_CPU_KV_LIMIT_BYTES = 2**30
_GPU_FREE_SHARE = 0.85
#: Tokens of the prefill steps that are run at the start, beside the largest: kernels differ with sizes and divisibility.
_WARM_UP_TOKENS = (5, 20, 40, 100, 200, 300, 400, 600)
#: Shortest context of the single tokens that are computed at the start; attention splits longer ones into more parts.
_WARM_UP_CONTEXT = 256


class ModelRunner:
    """Loads the model, sizes the KV cache, and turns a schedule into logits."""

    def __init__(self, config: EngineConfig, device: str) -> None:
        if config.cpu_threads is not None:
            torch.set_num_threads(config.cpu_threads)
        self.device = resolve_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # where Triton launches
        check_attention(config.attention_backend, self.device, config.block_size, config.dtype)
        check_expert_dtype(config.expert_dtype, self.device)
        use_graphs = config.pool.num_workers is None and resolve_cuda_graphs(config.cuda_graphs, self.device)
        self.model = load_model(
            config.checkpoint,
            routing=config.routing,
            device=self.device,
            dtype=config.dtype,
            attention=config.attention_backend,
            united=config.united,
            similarity=config.similarity,
            pool=config.pool,
        )
        #: Brownout settings that the model can follow.
        self.available = Available(
            self.model.ways,
            all(block.similarity is not None for block in self.model.moe_blocks),
            self.model.pool is not None and not self.model.pool.always_waits,
            isinstance(self.model.pool, ResidentPool),
        )
        self._prepare_experts(config)
        self.max_model_len = self._max_model_len(config)
        self.block_size = config.block_size
        self.batches = BatchBuilder(self.block_size, self.device)
        self.num_blocks = self._num_blocks(config)
        # Graphs need a block that no sequence has.
        self.kv_cache = KVCache(
            self.model.config,
            self.num_blocks + use_graphs,
            config.block_size,
            dtype=self.model.dtype,
            device=self.device,
        )
        self._layer_thresholds: dict[int, LayerThresholds] = {}
        self.apply(Settings())
        profile = find_profile(config.checkpoint, config.profile)
        self.set_layer_thresholds(profile.layer_thresholds if profile is not None else {})
        #: Decode steps as CUDA graphs; None: every step is launched kernel by kernel.
        self.graphs = self.make_graphs(config, cuda_graphs()) if use_graphs else None
        if self.device.type != "cpu":
            self._warm_up(config, [level.settings() for level in profile.levels] if profile is not None else [])
        if self.device.type == "cpu":
            from backend.kernels.cpu.warm_up import warm_up

            warm_up(self.model.dtype)  # loads machine code, or compiles it: not in the middle of a request
        log.info(
            "model on %s: weights %.2f GiB, united experts %.2f GiB (ways: %s), KV cache %.2f GiB (%d blocks of %d tokens), context %d tokens",
            self.device,
            self.model.weight_bytes() / 2**30,
            self.model.united_bytes() / 2**30,
            ", ".join(map(str, self.model.ways)) or "none",
            self.num_blocks * self._block_bytes(config) / 2**30,
            self.num_blocks,
            config.block_size,
            self.max_model_len,
        )

    def _prepare_experts(self, config: EngineConfig) -> None:
        """Bring the experts' weights into the form in which they are computed, before anything holds on to them."""
        if config.widen_experts > 1:
            self.model.widen_experts(config.widen_experts)
        elif self.device.type != "cpu":
            self.model.fold_shared_experts()
        if config.expert_dtype == "fp8":
            self.model.quantize_experts()
        if isinstance(self.model.pool, WorkerPool):
            self.model.pool.start()

    def _max_model_len(self, config: EngineConfig) -> int:
        limit = self.model.config.max_position_embeddings
        length = limit if config.max_model_len is None else config.max_model_len
        if length > limit:
            raise ConfigError(f"parameter max_model_len must be at most the checkpoint's {limit}, got {length}")
        return length

    @torch.inference_mode()
    def _warm_up(self, config: EngineConfig, levels: Sequence[Settings]) -> None:
        """Run prefill steps of several sizes, single tokens in contexts of several lengths, capture the decode steps, and sample.

        Kernels are compiled here and not in the middle of a request, those of all `levels` of brownout too, and if the memory
        does not suffice, that shows now.
        """
        most = min(config.max_batch_tokens, self.num_blocks * self.block_size)
        done = set()
        for settings in (Settings(), *levels):
            try:
                self.apply(settings)
            except ConfigError:
                continue  # whoever asks for this level will be told what is lacking
            if self.model.variant in done:
                continue
            done.add(self.model.variant)
            for tokens in sorted({min(most, size) for size in (*_WARM_UP_TOKENS, most)}, reverse=True):
                self.model.forward(self._prompts(tokens), self.kv_cache)
            for length in _doubling(_WARM_UP_CONTEXT, self.max_model_len):
                self.model.forward(self._last_token(length), self.kv_cache)
            if self.graphs is not None:
                self.graphs.capture_all(self.model.variant)
        self.apply(Settings())
        rows = min(config.max_running, config.max_batch_tokens)
        logits = torch.zeros(rows, self.model.config.vocab_size, device=self.device)
        sample(logits, [SampleRow(SamplingParams(top_p=0.9), seed=0, position=0)] * rows)
        self.forget_steps()
        for part in (*self.kv_cache.k, *self.kv_cache.v):
            part.zero_()

    def forget_steps(self) -> None:
        """Have no last step and count none: those so far were for no request."""
        self.model.forget_step()
        if self.model.pool is not None:
            self.model.pool.forget_counts()

    def _prompts(self, num_tokens: int) -> ForwardBatch:
        """A step that computes prompts of `num_tokens` tokens in all, in the first blocks."""
        most = self.max_model_len // self.block_size * self.block_size or num_tokens
        schedule, block = Schedule(), 0
        for start in range(0, num_tokens, most):
            length = min(most, num_tokens - start)
            sequence = Request("warm-up", [0] * length, SamplingParams()).sequences[0]
            needed = -(-length // self.block_size)
            sequence.blocks.extend(range(block, block + needed))
            block += needed
            schedule.sequences.append(sequence)
            schedule.num_tokens.append(length)
        # Sequences of one token come first; here that can only be the last one.
        if schedule.num_tokens[-1] == 1:
            for entries in (schedule.sequences, schedule.num_tokens):
                entries.insert(0, entries.pop())
            schedule.num_decodes = 1
        return build_batch(schedule, self.block_size, self.device)

    def _last_token(self, length: int) -> ForwardBatch:
        """A step that computes the last token of one sequence, as it stands beside prompts in a step."""
        sequence = Request("warm-up", [0] * length, SamplingParams()).sequences[0]
        sequence.num_computed = length - 1
        sequence.blocks.extend(range(-(-length // self.block_size)))
        schedule = Schedule()
        schedule.sequences.append(sequence)
        schedule.num_tokens.append(1)
        schedule.num_decodes = 1
        return build_batch(schedule, self.block_size, self.device)

    def close(self) -> None:
        """End the expert workers, if there are any."""
        if isinstance(self.model.pool, WorkerPool):
            self.model.pool.close()

    def apply(self, settings: Settings) -> None:
        """Write the settings into the model's device tables; they act from the next step on.

        Raises ConfigError, and changes nothing, if they need united experts or similarities that are not loaded.
        """
        way = self.available.way_of(settings)
        pool = self.model.pool
        if pool is not None and not settings.dims and not settings.way:
            way = min(self.model.ways, default=0)  # only missing experts are replaced: by the most exact ones
        table = self._thresholds_table(settings, way)
        if isinstance(pool, ResidentPool):
            pool.use_share(settings.resident_share)
        self.model.set_thresholds(table)
        #: For each token class whether experts may be replaced in some layer.
        self.browned_classes = tuple(min(column) < 1.0 for column in zip(*table, strict=True))
        if pool is not None:
            self.browned_classes = tuple(
                browned or not waits for browned, waits in zip(self.browned_classes, pool.waits, strict=True)
            )
        # With every threshold at 1 all mechanisms do nothing; this one does it most cheaply.
        mechanism = settings.mechanism if settings.dims else "united"
        self.model.set_replacement(mechanism, settings.ranking, way, settings.similarity_min)

    def set_layer_thresholds(self, tables: Mapping[int, LayerThresholds]) -> None:
        """Thresholds by layer, by way of the united experts that they are for, from the next `apply` on.

        Raises ConfigError for a table of another number of MoE layers.
        """
        layers = sum(self.model.config.moe_layers)
        for way, table in tables.items():
            if table.num_layers != layers:
                raise ConfigError(
                    f"thresholds by layer for way {way} are for {table.num_layers} MoE layers, the model has {layers}"
                )
        self._layer_thresholds = dict(tables)

    def _thresholds_table(self, settings: Settings, way: int) -> list[tuple[float, ...]]:
        """Threshold of each layer and token class."""
        by_class = settings.by_class()
        table: list[tuple[float, ...]] = [by_class] * self.model.config.num_layers
        own = self._layer_thresholds.get(way) if settings.mechanism == "united" else None
        if own is not None:
            moe_layers = (i for i, has_experts in enumerate(self.model.config.moe_layers) if has_experts)
            columns = [own.at(theta) for theta in by_class]
            for layer, *row in zip(moe_layers, *columns, strict=True):
                table[layer] = tuple(row)
        return table

    @torch.inference_mode()
    def run(self, schedule: Schedule, previous: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [R, vocab] in float32, one row per sequence whose known tokens are computed by this step, in order.

        `previous` [R] are the tokens of the step before, for a schedule made ahead. Does not wait for the device; the logits
        hold until the next call.
        """
        batch = self.batches.build(schedule, previous)
        replays = self.graphs is not None and self.graphs.accepts(batch)
        if (pool := self.model.pool) is not None:
            # A captured step cannot wait for weights.
            replays = replays and not pool.always_waits and not any(s.never_browned for s in schedule.sequences)
            pool.between_steps(captured=replays)
        if replays:
            assert self.graphs is not None
            return self.graphs.run(batch, self.model.variant)
        return self.model.forward(batch, self.kv_cache)

    def make_graphs(self, config: EngineConfig, new_graph: Callable[[], Graph]) -> DecodeGraphs:
        """Graphs of this model's decode steps, not captured yet; the KV cache's last block is theirs."""
        return DecodeGraphs(
            lambda batch, logits: self.model.forward(batch, self.kv_cache, logits),
            vocab_size=self.model.config.vocab_size,
            max_rows=min(config.max_running, config.max_batch_tokens),
            max_blocks=-(-self.max_model_len // config.block_size),
            block_size=config.block_size,
            spare_block=self.kv_cache.num_blocks - 1,
            device=self.device,
            record=self.model.step_record,
            set_record=self.model.set_step_record,
            new_graph=new_graph,
        )

    def copy_replaced(self) -> HostCopy:
        """Of the step just launched: each token's assignments, over all layers, that their own experts do not serve."""
        assert self.model.last_replaced is not None
        return HostCopy(self.model.last_replaced)

    def replaced_assignments(self, schedule: Schedule, replaced: HostCopy) -> list[int]:
        """The sums of `copy_replaced` after the step of `schedule`, sequence by sequence. Waits for the device."""
        starts = np.cumsum([0, *schedule.num_tokens[:-1]])
        return np.add.reduceat(replaced.numpy(), starts).tolist()

    def _block_bytes(self, config: EngineConfig) -> int:
        return KVCache.block_bytes(self.model.config, config.block_size, self.model.dtype)

    def _num_blocks(self, config: EngineConfig) -> int:
        least = -(-self.max_model_len // config.block_size)
        if config.kv_cache_blocks is not None:
            name, blocks = "kv_cache_blocks", config.kv_cache_blocks
        else:
            name = "kv_cache_memory"
            memory = config.kv_cache_memory
            if memory is None:
                memory = min(self._memory_limit(), config.max_running * least * self._block_bytes(config))
            blocks = memory // self._block_bytes(config)
        if blocks < least:
            raise ConfigError(
                f"parameter {name} gives {blocks} KV blocks of {config.block_size} tokens, but one sequence of max_model_len "
                f"{self.max_model_len} needs {least} ({least * self._block_bytes(config)} bytes): raise {name} or lower "
                "max_model_len"
            )
        return blocks

    def _memory_limit(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what loading has left over
            free, _ = torch.cuda.mem_get_info(self.device)
            return int(free * _GPU_FREE_SHARE)
        return _CPU_KV_LIMIT_BYTES


def _doubling(first: int, last: int) -> list[int]:
    """first, 2 * first, … below `last`, and `last`."""
    return [*(first << i for i in range(64) if first << i < last), last]


def resolve_cuda_graphs(setting: str, device: torch.device) -> bool:
    """Whether decode steps are replayed as CUDA graphs, from the `cuda_graphs` parameter."""
    possible = device.type == "cuda" and has_triton()
    if setting == "on" and not possible:
        lacking = "a CUDA device" if device.type != "cuda" else "the package triton"
        raise ConfigError(f"parameter cuda_graphs is on, which needs {lacking}; use auto or off")
    return setting != "off" and possible


def check_expert_dtype(expert_dtype: str, device: torch.device) -> None:
    """Raise ConfigError if the device cannot multiply experts of this type."""
    if expert_dtype == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"parameter expert_dtype is fp8, which needs compute capability 8.9, but {name} has less; use auto"
        )


def resolve_async_scheduling(config: EngineConfig, device: torch.device) -> bool:
    """Whether steps are launched ahead, from the `async_scheduling` parameter.

    A CPU has nothing to gain from it, nor has the resident pool: between its steps it reads the device.
    """
    setting = config.async_scheduling
    return setting == "on" or (setting == "auto" and device.type == "cuda" and config.expert_pool == "local")


def resolve_device(name: str) -> torch.device:
    """A torch device from the `device` parameter; unusable ones are ConfigErrors."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"parameter device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"parameter device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f"parameter device is {name!r}, but this machine has {count} usable CUDA devices")
        # Always with its number: some of torch's functions take no other.
        device = torch.device("cuda", device.index or 0)
    return device
