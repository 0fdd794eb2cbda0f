"""Pools: where the experts of a layer are computed, behind one interface."""

from __future__ import annotations

from types import ModuleType
from typing import Protocol

from torch import Tensor

from backend.experts.weight_store import ExpertWeights


class ExpertPool(Protocol):
    """The experts of one MoE layer. A step calls `admit`, lets the tables choose the slots, and calls `forward`."""

    def admit(self, hidden: Tensor, experts: Tensor, token_class: Tensor, num_tokens: Tensor | None) -> None:
        """The router has chosen: the tables may be brought up to date.

        hidden [T, M], experts [T, K], token_class [T]; with `num_tokens` the step is captured, or replayed with padding rows:
        the host may then neither read the device nor change anything.
        """

    def forward(self, hidden: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, M], slots [T, K] (-1: skip), weights [T, K] -> the weighted sum of the slots' outputs [T, M]."""


class LocalExperts:
    """All experts on the model's device."""

    def __init__(self, kernels: ModuleType, weights: ExpertWeights) -> None:
        self._kernels, self._weights = kernels, weights

    def admit(self, hidden: Tensor, experts: Tensor, token_class: Tensor, num_tokens: Tensor | None) -> None:
        """Every expert is there."""

    def forward(self, hidden: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """See ExpertPool."""
        experts = self._weights
        return self._kernels.grouped_experts_forward(hidden, experts.w13, experts.w2, slots, weights, experts.scales)

    def forward_add_norm(
        self, hidden: Tensor, slots: Tensor, weights: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
    ) -> Tensor:
        """Add `forward` to `residual` [T, M] in place; returns the RMSNorm of the sum."""
        experts = self._weights
        then = (residual, norm_weight, eps, experts.scales)
        return self._kernels.experts_add_rms_norm(hidden, experts.w13, experts.w2, slots, weights, *then)
