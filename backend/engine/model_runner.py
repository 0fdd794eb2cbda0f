"""The data plane: one model on one device with its paged KV cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from backend.brownout.layer_thresholds import LayerThresholds
from backend.brownout.profile import find_profile
from backend.brownout.settings import Available, Settings
from backend.config import EngineConfig
from backend.elastic.worker_pool import WorkerPool
from backend.engine.batch import BatchBuilder
from backend.engine.cuda_graphs import Graph, StepGraphs, cuda_graphs
from backend.engine.kv_memory import block_bytes, graph_bytes, num_kv_blocks
from backend.engine.scheduler import Schedule
from backend.engine.warm_up import warm_up
from backend.errors import ConfigError
from backend.experts.resident import ResidentPool
from backend.kernels import check_attention, has_triton
from backend.kernels.query_tiles import tile_queries
from backend.models import load_model
from backend.models.attention import KVCache

log = logging.getLogger(__name__)


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
        graphs_fit = config.pool.num_workers is None and config.attention_backend != "torch"
        use_graphs = graphs_fit and resolve_cuda_graphs(config.cuda_graphs, self.device)
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
        profile = find_profile(config.checkpoint, config.profile)
        levels = [level.settings() for level in profile.levels] if profile is not None else []
        reserved_bytes = graph_bytes(config, levels) if use_graphs else 0
        self.num_blocks = num_kv_blocks(config, self.model, self.max_model_len, reserved_bytes)
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
        self.set_layer_thresholds(profile.layer_thresholds if profile is not None else {})
        #: Steps as CUDA graphs; None: every step is launched kernel by kernel.
        self.graphs = self.make_graphs(config, cuda_graphs()) if use_graphs else None
        if self.device.type != "cpu":
            warm_up(self, config, levels)
        if self.device.type == "cpu":
            from backend.kernels.cpu.warm_up import warm_up as load_kernels

            load_kernels(self.model.dtype)  # loads machine code, or compiles it: not in the middle of a request
        log.info(
            "model on %s: weights %.2f GiB, united experts %.2f GiB (ways: %s), KV cache %.2f GiB (%d blocks of %d tokens), context %d tokens",
            self.device,
            self.model.weight_bytes() / 2**30,
            self.model.united_bytes() / 2**30,
            ", ".join(map(str, self.model.ways)) or "none",
            self.num_blocks * block_bytes(config, self.model) / 2**30,
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

    def forget_steps(self) -> None:
        """Have no last step and count none: those so far were for no request."""
        self.model.forget_step()
        if self.model.pool is not None:
            self.model.pool.forget_counts()

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
        graphs = self.graphs
        bucket = graphs.bucket_of(batch) if graphs is not None else None
        if (pool := self.model.pool) is not None:
            # A captured step cannot wait for weights.
            if pool.always_waits or any(sequence.never_browned for sequence in schedule.sequences):
                bucket = None
            pool.between_steps(captured=bucket is not None)
        if graphs is None or bucket is None:
            return self.model.forward(batch, self.kv_cache)
        return graphs.run(batch, bucket, self.model.variant)

    def make_graphs(self, config: EngineConfig, new_graph: Callable[[], Graph]) -> StepGraphs:
        """Graphs of this model's steps, not captured yet; the KV cache's last block is theirs."""
        model = self.model.config
        # Other attention backends, and experts that are waited for, are not made for prompts in graphs.
        mixed = config.attention_backend in ("auto", "triton") and self.model.pool is None
        group, size = model.num_heads // model.num_kv_heads, self.model.activation_dtype.itemsize
        return StepGraphs(
            lambda batch, logits: self.model.forward(batch, self.kv_cache, logits),
            vocab_size=model.vocab_size,
            max_rows=min(config.max_running, config.max_batch_tokens),
            max_tokens=config.max_batch_tokens,
            tile_queries=tile_queries(group, size) if mixed else None,
            max_blocks=-(-self.max_model_len // config.block_size),
            block_size=config.block_size,
            spare_block=self.kv_cache.num_blocks - 1,
            device=self.device,
            record=self.model.step_record,
            set_record=self.model.set_step_record,
            new_graph=new_graph,
        )

    @property
    def replaced(self) -> torch.Tensor:
        """[T] int32, of each token of the step just launched the assignments, over all layers, that others serve."""
        assert self.model.last_replaced is not None
        return self.model.last_replaced


def resolve_cuda_graphs(setting: str, device: torch.device) -> bool:
    """Whether steps are replayed as CUDA graphs, from the `cuda_graphs` parameter."""
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
