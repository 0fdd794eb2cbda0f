"""The gated MLP of dense layers and shared experts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from backend.kernels.reference.linear import linear


def gated_mlp(
    x: Tensor,  # [T, M]
    w13: Tensor,  # [2 * I, M] of any floating type, gate rows above up rows
    w2: Tensor,  # [M, I]
) -> Tensor:
    """w2 @ (silu(gate) * up); returns [T, M] of x's type."""
    size = w2.shape[1]
    gate_up = linear(x, w13)
    return linear(F.silu(gate_up[:, :size]).mul_(gate_up[:, size:]), w2)
