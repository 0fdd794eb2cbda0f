"""Layers that every decoder has: linear maps, norms, the gated MLP, rotary angles.

A layer owns its tensors and `weights(prefix)` lists them under their checkpoint names, as views into the (often fused)
tensors that kernels read, so that a loader fills them in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from backend.models.config import ModelConfig
from backend.models.rope import rope_frequencies

#: Checkpoint name and the tensor that receives it.
NamedWeight = tuple[str, Tensor]


@dataclass(frozen=True)
class Backing:
    """Where a model's tensors live, of which type they are, and the kernels that work on them."""

    dtype: torch.dtype
    #: Type of hidden states and of the vectors that act on them elementwise: norms, biases.
    activation_dtype: torch.dtype
    device: torch.device
    kernels: ModuleType

    def matrix(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def vector(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self.activation_dtype, device=self.device)


class Linear:
    """One matrix [sum(out_sizes), in_size] that stacks several projections of the same input."""

    def __init__(self, backing: Backing, in_size: int, out_sizes: Sequence[int], bias: bool = False) -> None:
        self.kernels = backing.kernels
        self.out_sizes = list(out_sizes)
        self.weight = backing.matrix(sum(out_sizes), in_size)
        self.bias = backing.vector(sum(out_sizes)) if bias else None

    def weights(self, *names: str) -> Iterator[NamedWeight]:
        """One name per stacked projection, without `.weight`."""
        for name, part in zip(names, self.weight.split(self.out_sizes), strict=True):
            yield f"{name}.weight", part
        if self.bias is not None:
            for name, part in zip(names, self.bias.split(self.out_sizes), strict=True):
                yield f"{name}.bias", part

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return self.kernels.linear(x, self.weight, self.bias)


class RMSNorm:
    """Root mean square norm over the last dimension."""

    def __init__(self, backing: Backing, size: int, eps: float) -> None:
        self.kernels = backing.kernels
        self.weight = backing.vector(size)
        self.eps = eps

    def weights(self, name: str) -> Iterator[NamedWeight]:
        yield f"{name}.weight", self.weight

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add x to `residual` in place; returns the norm of the sum."""
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)


class GatedMLP:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, backing: Backing, hidden_size: int, size: int) -> None:
        self.kernels, self.size = backing.kernels, size
        self.gate_up = Linear(backing, hidden_size, (size, size))
        self.down = Linear(backing, size, (hidden_size,))

    def weights(self, prefix: str) -> Iterator[NamedWeight]:
        yield from self.gate_up.weights(f"{prefix}.gate_proj", f"{prefix}.up_proj")
        yield from self.down.weights(f"{prefix}.down_proj")

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.gated_mlp(x, self.gate_up.weight, self.down.weight)


class RotaryAngles:
    """Cosines and sines of a step's positions; the same for every layer."""

    def __init__(self, backing: Backing, config: ModelConfig) -> None:
        inv_freq, self.scaling = rope_frequencies(config.rope, config.head_dim)
        self.inv_freq = inv_freq.to(backing.device)
        self.dtype = backing.activation_dtype

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] -> cos, sin [T, head_dim / 2] in the activations' type, computed in float32."""
        angles = positions.float().unsqueeze(1) * self.inv_freq
        return (angles.cos() * self.scaling).to(self.dtype), (angles.sin() * self.scaling).to(self.dtype)
