"""Kernels of the model: one op a file, the same signatures for every device.

`reference/` is plain torch: it is the CPU path and what the tests of other implementations compare with. Kernels take
tensors and scalars, never configuration objects. Letters used in shapes: T tokens (rows) of a step, S sequences, B blocks in
the longest block table, N blocks in the KV cache, C block size (tokens), H query heads, G key/value heads, D head
dimension, M hidden size, E logical experts, P weight slots, I intermediate size of an expert, K experts per token.
"""

from __future__ import annotations

from types import ModuleType

import torch

from backend.kernels import reference


def kernels_for(device: torch.device) -> ModuleType:
    """The kernels module for a device; modules have the functions that `backend.kernels.reference` lists."""
    del device  # every device runs the reference
    return reference
