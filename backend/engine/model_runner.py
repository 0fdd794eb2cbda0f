"""The data plane: one model on one device with its paged KV cache."""

from __future__ import annotations

import logging

import torch

from backend.brownout.settings import Available, Settings
from backend.config import EngineConfig
from backend.engine.batch import build_batch
from backend.engine.scheduler import Schedule
from backend.errors import ConfigError
from backend.models import load_model
from backend.models.attention import KVCache

log = logging.getLogger(__name__)

_CPU_KV_LIMIT_BYTES = 2**30
_GPU_FREE_SHARE = 0.85


class ModelRunner:
    """Loads the model, sizes the KV cache, and turns a schedule into logits."""

    def __init__(self, config: EngineConfig, device: str) -> None:
        if config.cpu_threads is not None:
            torch.set_num_threads(config.cpu_threads)
        self.device = resolve_device(device)
        self.model = load_model(config.checkpoint, routing=config.routing, device=self.device, dtype=config.dtype)
        #: Brownout settings that the model can follow.
        self.available = Available()
        limit = self.model.config.max_position_embeddings
        self.max_model_len = limit if config.max_model_len is None else config.max_model_len
        if self.max_model_len > limit:
            raise ConfigError(
                f"parameter max_model_len must be at most the checkpoint's {limit}, got {self.max_model_len}"
            )
        self.block_size = config.block_size
        self.num_blocks = self._num_blocks(config)
        self.kv_cache = KVCache(
            self.model.config, self.num_blocks, config.block_size, dtype=self.model.dtype, device=self.device
        )
        self.apply(Settings())
        if self.device.type == "cpu":
            from backend.kernels.cpu.warm_up import warm_up

            warm_up(self.model.dtype)  # loads machine code, or compiles it: not in the middle of a request
        log.info(
            "model on %s: weights %.2f GiB, KV cache %.2f GiB (%d blocks of %d tokens), context %d tokens",
            self.device,
            self.model.weight_bytes() / 2**30,
            self.num_blocks * self._block_bytes(config) / 2**30,
            self.num_blocks,
            config.block_size,
            self.max_model_len,
        )

    def apply(self, settings: Settings) -> None:
        """Write the thresholds into the model's device tables; they act from the next step on."""
        self.model.set_thresholds([settings.by_class()] * self.model.config.num_layers)

    @torch.inference_mode()
    def run(self, schedule: Schedule) -> torch.Tensor:
        """Logits [R, vocab] in float32, one row per sequence whose known tokens are computed by this step, in order."""
        return self.model.forward(build_batch(schedule, self.block_size, self.device), self.kv_cache)

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
            free, _ = torch.cuda.mem_get_info(self.device)
            return int(free * _GPU_FREE_SHARE)
        return _CPU_KV_LIMIT_BYTES


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
    return device
