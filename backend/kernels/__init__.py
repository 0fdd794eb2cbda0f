"""Kernels of the model: one op a file, the same signatures for every device.

`reference/` is plain torch, what the others are compared with and what runs where there is nothing better; `cpu/` is the
CPU path and `gpu/` that of GPUs. Kernels take tensors and scalars, never configuration objects. Letters used in shapes:
T tokens (rows) of a step, S sequences, B blocks in the longest block table, N blocks in the KV cache, C block size (tokens),
H query heads, G key/value heads, D head dimension, M hidden size, E logical experts, P weight slots, I intermediate size of
an expert, K experts per token.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType, SimpleNamespace

import torch

from backend.errors import ConfigError

_ATTENTION = ("decode_attention", "prefill_attention")


def kernels_for(device: torch.device, attention: str = "auto") -> ModuleType | SimpleNamespace:
    """The kernels for a device, under the names that `backend.kernels.reference` lists.

    `attention` replaces the attention kernels by those of another backend; see `check_attention`.
    """
    kernels = _device_kernels(device)
    if attention == "auto" or (attention == "triton" and has_triton()):
        return kernels
    if attention == "flash_attn":
        from backend.kernels import flash as chosen
    else:
        from backend.kernels import reference as chosen
    replaced = {name: getattr(chosen, name) for name in _ATTENTION}
    return SimpleNamespace(**{name: getattr(kernels, name) for name in kernels.__all__} | replaced)


def _device_kernels(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        # oneDNN keeps machine code and buffers for the last 1024 shapes of matrices, hundreds of MiB once the rows of each
        # expert have varied for a while; 128 shapes are as fast. Read when the first product is computed.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
        from backend.kernels import cpu

        return cpu
    if device.type == "cuda" and has_triton():
        from backend.kernels import gpu

        return gpu
    from backend.kernels import reference

    return reference


def has_triton() -> bool:
    """Whether Triton's compiler is installed."""
    return importlib.util.find_spec("triton") is not None


def check_attention(backend: str, device: torch.device, block_size: int, dtype: str) -> None:
    """Raise ConfigError if the `attention_backend` cannot serve this device, KV block size and dtype parameter."""

    def check(ok: bool, problem: str) -> None:
        if not ok:
            raise ConfigError(f"parameter attention_backend is {backend}, {problem}")

    if backend in ("triton", "flash_attn"):
        check(device.type == "cuda", f"which needs a CUDA device, but the device is {device}; use auto or torch")
    if backend == "triton":
        check(has_triton(), "but the package triton is not installed; install it, or use auto or torch")
    if backend == "flash_attn":
        installed = importlib.util.find_spec("flash_attn") is not None
        check(installed, "but the package flash-attn is not installed; install it, or use auto, triton or torch")
        from backend.kernels.flash import BLOCK_MULTIPLE

        rule = f"which needs block_size to be a multiple of {BLOCK_MULTIPLE}, but it is {block_size}"
        check(block_size % BLOCK_MULTIPLE == 0, rule)
        check(dtype != "float32", "which needs dtype bfloat16 or float16, but it is float32")
