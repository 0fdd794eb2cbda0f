"""Kernels of the model: one op a file, the same signatures for every device.

`reference/` is plain torch, what the others are compared with and what runs where there is nothing better; `cpu/` is the
CPU path. Kernels take tensors and scalars, never configuration objects. Letters used in shapes: T tokens (rows) of a step, S sequences, B blocks in
the longest block table, N blocks in the KV cache, C block size (tokens), H query heads, G key/value heads, D head
dimension, M hidden size, E logical experts, P weight slots, I intermediate size of an expert, K experts per token.
"""

from __future__ import annotations

from types import ModuleType

import torch


def kernels_for(device: torch.device) -> ModuleType:
    """The kernels module for a device; modules have the functions that `backend.kernels.reference` lists."""
    if device.type == "cpu":
        from backend.kernels import cpu

        return cpu
    from backend.kernels import reference

    return reference
