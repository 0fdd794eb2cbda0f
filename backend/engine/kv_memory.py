"""How much memory the KV cache may have."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backend.brownout.settings import Settings
from backend.config import EngineConfig
from backend.engine.cuda_graphs import buckets_for, mixed_buckets_for
from backend.errors import ConfigError
from backend.models.attention import KVCache
from backend.models.model import MoeModel

_CPU_LIMIT_BYTES = 2**30
#: Of a GPU's free memory the KV cache leaves this share, at least what steps, libraries and sampling take, and what a
#: captured graph takes beside its tensors.
_LEFT_SHARE = 0.15
_LEFT_BYTES = 2 * 2**30
_GRAPH_BYTES = 24 * 2**20


def block_bytes(config: EngineConfig, model: MoeModel) -> int:
    """Bytes of one KV block."""
    return KVCache.block_bytes(model.config, config.block_size, model.dtype)


def graph_bytes(config: EngineConfig, levels: Sequence[Settings]) -> int:
    """Bytes that the CUDA graphs of steps at these levels of brownout take, beside the tensors of a step."""
    variants = {("united", "count"), *((level.mechanism, level.ranking) for level in levels if level.dims)}
    buckets = len(buckets_for(min(config.max_running, config.max_batch_tokens)))
    return len(variants) * (buckets + len(mixed_buckets_for(config.max_batch_tokens))) * _GRAPH_BYTES


def num_kv_blocks(config: EngineConfig, model: MoeModel, max_model_len: int, reserved_bytes: int) -> int:
    """Blocks that the parameters ask for, or that there is memory for beside `reserved_bytes` for graphs.

    Raises ConfigError if one sequence of `max_model_len` tokens would not fit.
    """
    least, size = -(-max_model_len // config.block_size), block_bytes(config, model)
    if config.kv_cache_blocks is not None:
        name, blocks = "kv_cache_blocks", config.kv_cache_blocks
    else:
        name = "kv_cache_memory"
        memory = config.kv_cache_memory
        if memory is None:
            memory = min(_memory_limit(model.device, reserved_bytes), config.max_running * least * size)
        blocks = memory // size
    if blocks < least:
        raise ConfigError(
            f"parameter {name} gives {blocks} KV blocks of {config.block_size} tokens, but one sequence of max_model_len "
            f"{max_model_len} needs {least} ({least * size} bytes): raise {name} or lower max_model_len"
        )
    return blocks


def _memory_limit(device: torch.device, reserved_bytes: int) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading has left over
        free, _ = torch.cuda.mem_get_info(device)
        return max(0, free - max(int(free * _LEFT_SHARE), _LEFT_BYTES + reserved_bytes))
    return _CPU_LIMIT_BYTES
