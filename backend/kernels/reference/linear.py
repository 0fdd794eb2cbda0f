"""Dense linear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in] of any floating type, bias [out] of x's type -> [T, out] of x's type."""
    return F.linear(x, weight.to(x.dtype), bias)
