"""Dense linear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in] of any floating type, bias [out] of x's type -> [T, out] of x's type."""
    return F.linear(x, weight.to(x.dtype), bias)


def output_logits(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [R, in], weight [V, in] -> [R, V] float32; written to `out` if given."""
    logits = linear(x, weight)
    return logits.float() if out is None else out.copy_(logits)
