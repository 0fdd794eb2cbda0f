"""The mixture-of-experts block: route, remap to weight slots, run the slots, add the shared expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from backend.experts.expert_map import ExpertMap
from backend.experts.weight_store import ExpertWeights
from backend.models.config import ModelConfig
from backend.models.layers import Backing, GatedMLP, Linear, NamedWeight


class MoeBlock:
    """One layer's router, experts and, in some families, shared expert behind a sigmoid gate."""

    def __init__(self, backing: Backing, config: ModelConfig, thresholds: Tensor) -> None:
        """`thresholds` [classes] is this layer's row of the model's table, which is updated in place."""
        self.kernels = backing.kernels
        self.top_k, self.renormalize = config.top_k, config.norm_topk_prob
        self.names = config.names
        self.thresholds = thresholds
        self.router = backing.matrix(config.num_experts, config.hidden_size)
        #: [E] float32 added to the router's logits; dummy models skew their routing with it.
        self.router_bias: Tensor | None = None
        self.expert_map = ExpertMap(config.num_experts, config.num_experts, backing.device)
        self.experts = ExpertWeights(
            config.num_experts, config.hidden_size, config.expert_size, backing.dtype, backing.device
        )
        #: [T, K] slots that served the last step's assignments, for telemetry.
        self.last_slots: Tensor | None = None
        self.shared_expert: GatedMLP | None = None
        self.shared_gate: Linear | None = None
        if config.shared_expert_size:
            self.shared_expert = GatedMLP(backing, config.hidden_size, config.shared_expert_size)
            self.shared_gate = Linear(backing, config.hidden_size, (1,))

    def weights(self, layer_prefix: str) -> Iterator[NamedWeight]:
        prefix = f"{layer_prefix}.{self.names.moe_block}"
        yield f"{prefix}.gate.weight", self.router
        for expert in range(self.expert_map.num_experts):
            name = f"{prefix}.experts.{expert}"
            yield f"{name}.{self.names.gate}.weight", self.experts.gate(expert)
            yield f"{name}.{self.names.up}.weight", self.experts.up(expert)
            yield f"{name}.{self.names.down}.weight", self.experts.down(expert)
        if self.shared_expert is not None and self.shared_gate is not None:
            yield from self.shared_expert.weights(f"{prefix}.shared_expert")
            yield from self.shared_gate.weights(f"{prefix}.shared_expert_gate")

    def __call__(self, x: Tensor, token_class: Tensor, num_tokens: Tensor | None = None) -> Tensor:
        """x [T, M], token_class [T] -> [T, M]; rows from `num_tokens` on are padding."""
        experts, weights = self.kernels.route(x, self.router, self.router_bias, self.top_k, self.renormalize)
        slots, weights = self.kernels.remap_experts(
            experts, weights, self.expert_map.expert_slots, self.thresholds, token_class, num_tokens
        )
        self.last_slots = slots
        out = self.kernels.grouped_experts_forward(x, self.experts.w13, self.experts.w2, slots, weights)
        if self.shared_expert is not None and self.shared_gate is not None:
            out.addcmul_(torch.sigmoid(self.shared_gate(x)), self.shared_expert(x))
        return out
