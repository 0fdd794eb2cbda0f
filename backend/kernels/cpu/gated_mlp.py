"""The gated MLP of dense layers and shared experts."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backend.kernels.cpu import bfloat16
from backend.kernels.cpu.grouped_experts import slot_outputs
from backend.kernels.cpu.linear import linear


def gated_mlp(
    x: Tensor,  # [T, M]
    w13: Tensor,  # [2 * I, M] of any floating type, gate rows above up rows
    w2: Tensor,  # [M, I]
) -> Tensor:
    """w2 @ (silu(gate) * up); returns [T, M] of x's type, rounding as `grouped_experts_forward` does."""
    if bfloat16.multiplies(w13) and bfloat16.multiplies(w2):
        # As an expert that serves every token, activations stay in the type and the place where they are needed next.
        order = np.arange(len(x))
        span = np.array([0, len(x)])
        y, _ = slot_outputs(x, w13.unsqueeze(0), w2.unsqueeze(0), np.zeros(1, np.int64), span, order, 1)
        return torch.from_numpy(y[: len(x)]).to(x.dtype)
    size = w2.shape[1]
    gate_up = linear(x, w13)
    return linear(F.silu(gate_up[:, :size]).mul_(gate_up[:, size:]), w2)
