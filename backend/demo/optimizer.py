"""Muon for matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

#: Parameters that are no matrices of the trunk although they have two dimensions.
_NOT_MUON = ("embedding", "router", "shared_gate", "qkv_bias")


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices of [..., R, C] by Newton–Schulz iterations (Jordan et al., Muon, 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x.transpose(-1, -2) if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.transpose(-1, -2)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.transpose(-1, -2) if tall else x).reshape(matrices.shape)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized; leading dimensions of a parameter are a stack of matrices."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])
                scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalized(update), alpha=-group["lr"] * scale)


def make_optimizers(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the trunk's matrices, AdamW on embedding, router, gates, biases and norms."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        plain = parameter.dim() < 2 or name.rsplit(".", 1)[-1] in _NOT_MUON
        (others if plain else matrices).append(parameter)
    return [Muon(matrices, muon_lr), torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]
