"""Muon for matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

#: Parameters that are no matrices of the trunk although they have two dimensions.
_NOT_MUON = ("embedding", "router", "shared_gate", "qkv_bias")
_EXPERTS = ("expert_in", "expert_out")


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly the semi-orthogonal matrices next to [..., R, C], by Newton–Schulz iterations (Jordan et al., Muon, 2024).

    They run in bfloat16, as there: the iteration forgives its rounding.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x.transpose(-1, -2) if tall else x
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        square = x @ x.transpose(-1, -2)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.transpose(-1, -2) if tall else x).reshape(matrices.shape).to(matrices.dtype)


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


def make_optimizers(
    model: nn.Module, muon_lr: float, adam_lr: float, expert_lr_scale: float = 1.0
) -> list[torch.optim.Optimizer]:
    """Muon on the trunk's matrices, AdamW on embedding, router, gates, biases and norms.

    Every group keeps its learning rate at full speed as "full_lr". Routed experts get Muon's times `expert_lr_scale`: an
    expert sees few tokens of a batch, and Muon's step has the same length however little the gradient knows.
    """
    matrices, experts, others = [], [], []
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        plain = parameter.dim() < 2 or last in _NOT_MUON
        (others if plain else experts if last in _EXPERTS else matrices).append(parameter)
    muon = Muon(matrices, muon_lr)
    if experts:
        muon.add_param_group({"params": experts, "lr": muon_lr * expert_lr_scale})
    optimizers = [muon, torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers
