"""The mixture-of-experts block: route, remap to weight slots, run the slots, add the shared expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.experts.expert_map import ExpertMap
from backend.experts.pool import ExpertPool, LocalExperts
from backend.experts.weight_store import ExpertWeights
from backend.kernels.reference.remap import BY_TOKEN
from backend.kernels.reference.shared_slots import SharedSlots
from backend.models.config import ModelConfig
from backend.models.layers import Backing, GatedMLP, Linear, NamedWeight, RMSNorm

#: Rows up to which a folded shared expert runs as slots: then launches matter. Many rows belong to plain matrix products.
FOLDED_ROWS = 256


@dataclass
class Replacement:
    """How all MoE blocks of a model replace experts where a threshold is below 1; see `backend.kernels.reference.remap`.

    `mechanism` and `ranking` are plain values, so a captured graph belongs to one pair of them; the rest, and all tables, are
    tensors that change in place.
    """

    #: [] float32, for `reroute`.
    similarity_min: Tensor
    mechanism: str = "united"
    ranking: str = "count"


def num_folded(config: ModelConfig) -> int:
    """Slots that a folded shared expert takes; 0 if there is none or its size is not a multiple of an expert's."""
    size = config.shared_expert_size
    return 0 if size % config.expert_size else size // config.expert_size


class MoeBlock:
    """One layer's router, experts and, in some families, shared expert behind a sigmoid gate.

    Slots of the expert weights: the originals (or as many of them as there is room for), then the united experts of each way,
    ascending, then the shared expert if it is folded.
    """

    def __init__(
        self,
        backing: Backing,
        config: ModelConfig,
        thresholds: Tensor,
        replacement: Replacement,
        groups: Mapping[int, Tensor],
        num_resident: int,
    ) -> None:
        """`thresholds` [classes] is this layer's row of the model's table; `groups` [E] by way of united experts;
        `num_resident` slots for originals."""
        self.kernels = backing.kernels
        self.top_k, self.renormalize = config.top_k, config.norm_topk_prob
        self.names = config.names
        self.thresholds = thresholds
        self.replacement = replacement
        #: [E, E] float32, how well one expert stands in for another; None: not known.
        self.similarity: Tensor | None = None
        self.router = backing.matrix(config.num_experts, config.hidden_size)
        #: [E] float32 added to the router's logits; dummy models skew their routing with it.
        self.router_bias: Tensor | None = None
        num_slots = num_resident
        self._united: dict[int, slice] = {}
        for way in sorted(groups):
            self._united[way] = slice(num_slots, num_slots + int(groups[way].max()) + 1)
            num_slots = self._united[way].stop
        self.expert_map = ExpertMap(config.num_experts, num_slots, backing.device, num_resident)
        for way, slots in self._united.items():
            self.expert_map.add_way(way, groups[way], slots.start)
        self.experts = ExpertWeights(num_slots, config.hidden_size, config.expert_size, backing.dtype, backing.device)
        #: What computes the experts.
        self.pool: ExpertPool = LocalExperts(backing.kernels, self.experts)
        #: [T, K] slots that served the last step's assignments, for telemetry.
        self.last_slots: Tensor | None = None
        self.shared_expert: GatedMLP | None = None
        self.shared_gate: Linear | None = None
        if config.shared_expert_size:
            self.shared_expert = GatedMLP(backing, config.hidden_size, config.shared_expert_size)
            self.shared_gate = Linear(backing, config.hidden_size, (1,))
        #: Slots that hold a copy of the shared expert, see `fold_shared`.
        self.shared_slots: slice | None = None

    def weights(self, layer_prefix: str) -> Iterator[NamedWeight]:
        """Without a slot for every expert, those of the experts stand there as tensors without storage (device `meta`)."""
        prefix = f"{layer_prefix}.{self.names.moe_block}"
        yield f"{prefix}.gate.weight", self.router
        local = self.expert_map.num_resident == self.expert_map.num_experts
        sizes = self.experts.expert_size, self.router.shape[1]
        absent = torch.empty(sizes, dtype=self.router.dtype, device="meta")
        absent_down = torch.empty(sizes[::-1], dtype=self.router.dtype, device="meta")
        for expert in range(self.expert_map.num_experts):
            parts = (absent, absent, absent_down)
            if local:
                parts = (self.experts.gate(expert), self.experts.up(expert), self.experts.down(expert))
            yield from zip(self.expert_names(layer_prefix, expert), parts, strict=True)
        if self.shared_expert is not None and self.shared_gate is not None:
            yield from self.shared_expert.weights(f"{prefix}.shared_expert")
            yield from self.shared_gate.weights(f"{prefix}.shared_expert_gate")

    @property
    def num_shared_slots(self) -> int:
        """Slots that every token of a small step has."""
        return 0 if self.shared_slots is None else self.shared_slots.stop - self.shared_slots.start

    def fold_shared(self) -> None:
        """Copy the shared expert, if its size is a multiple of an expert's, into slots that every token of a small step has.

        A slice of its intermediate neurons is a gated MLP like an expert, and the sum of the slices' outputs is its own. Belongs
        after loading and before anything holds on to the expert weights. Nothing is done where another pool than LocalExperts
        has charge of the slots.
        """
        shared, size = self.shared_expert, self.experts.expert_size
        local = isinstance(self.pool, LocalExperts)
        if shared is None or not local or shared.size % size or self.shared_slots is not None:
            return
        num_slots, hidden_size = shared.size // size, self.experts.w2.shape[1]
        w13 = shared.gate_up.weight.view(2, num_slots, size, hidden_size).transpose(0, 1).flatten(1, 2)
        w2 = shared.down.weight.view(hidden_size, num_slots, size).transpose(0, 1)
        self.shared_slots = self.experts.append(w13, w2)

    def expert_names(self, layer_prefix: str, expert: int) -> tuple[str, str, str]:
        """Checkpoint names of an expert's gate, up and down."""
        name = f"{layer_prefix}.{self.names.moe_block}.experts.{expert}"
        return tuple(f"{name}.{part}.weight" for part in (self.names.gate, self.names.up, self.names.down))  # type: ignore[return-value]

    def original_weights(self) -> tuple[Tensor, Tensor]:
        """w13 [E, 2 * I, M] and w2 [E, M, I] of the experts, not widened; a copy if not all of them have slots."""
        if isinstance(self.pool, LocalExperts):
            num_experts = self.expert_map.num_experts
            return self.experts.w13[:num_experts], self.experts.w2[:num_experts]
        return self.pool.original_weights()

    def united_weights(self, way: int) -> tuple[Tensor, Tensor]:
        """Views w13 [G, 2 * I, M] and w2 [G, M, I] of the united experts of a way, by group."""
        return self.experts.w13[self._united[way]], self.experts.w2[self._united[way]]

    def __call__(
        self, x: Tensor, token_class: Tensor, replaced: Tensor | None = None, num_tokens: Tensor | None = None
    ) -> Tensor:
        """x [T, M], token_class [T] -> [T, M]; adds each token's replaced assignments to `replaced` [T] int32.

        Rows from `num_tokens` on are padding.
        """
        slots, weights = self._choose(x, token_class, replaced, num_tokens)
        return self._outputs(x, slots, weights)

    def add_to(
        self,
        residual: Tensor,
        x: Tensor,
        token_class: Tensor,
        replaced: Tensor,
        num_tokens: Tensor | None,
        next_norm: RMSNorm,
    ) -> Tensor:
        """Add what a call returns to `residual` [T, M] in place; returns `next_norm` of the sum."""
        slots, weights = self._choose(x, token_class, replaced, num_tokens)
        if isinstance(self.pool, LocalExperts) and not self._shared_is_dense(len(x)):
            return self.pool.forward_add_norm(x, slots, weights, residual, next_norm.weight, next_norm.eps)
        return next_norm.after_add(self._outputs(x, slots, weights), residual)

    def _shared_is_dense(self, num_rows: int) -> bool:
        """Whether there is a shared expert that is computed beside the slots and not as some of them."""
        return self.shared_expert is not None and (self.shared_slots is None or num_rows > FOLDED_ROWS)

    def _choose(
        self, x: Tensor, token_class: Tensor, replaced: Tensor | None, num_tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Slots and weights of each token, those of a folded shared expert included."""
        experts, weights = self.kernels.route(x, self.router, self.router_bias, self.top_k, self.renormalize)
        self.pool.admit(x, experts, token_class, num_tokens)
        shared = None
        if self.shared_slots is not None and self.shared_gate is not None and len(x) <= FOLDED_ROWS:
            shared = SharedSlots(x, self.shared_gate.weight, self.shared_slots.start, self.num_shared_slots)
        slots, weights = self._remap(x, experts, weights, token_class, replaced, num_tokens, shared)
        self.last_slots = slots[:, : self.top_k]
        return slots, weights

    def _outputs(self, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        out = self.pool.forward(x, slots, weights)
        if self._shared_is_dense(len(x)):
            assert self.shared_expert is not None and self.shared_gate is not None
            out.addcmul_(torch.sigmoid(self.shared_gate(x)), self.shared_expert(x))
        return out

    def _remap(
        self,
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        token_class: Tensor,
        replaced: Tensor | None,
        num_tokens: Tensor | None,
        shared: SharedSlots | None,
    ) -> tuple[Tensor, Tensor]:
        how = self.replacement
        tables = (self.expert_map.expert_slots, self.thresholds, token_class)
        if how.mechanism in BY_TOKEN:
            piggyback = how.mechanism == "piggyback"
            slots, weights = self.kernels.select_experts(
                experts,
                weights,
                *tables,
                scores=self.kernels.router_scores(x, self.router, self.router_bias) if piggyback else None,
                renormalize=self.renormalize,
                num_tokens=num_tokens,
                replaced=replaced,
            )
            if shared is None:
                return slots, weights
            return shared.added_to(slots, weights, num_tokens, self.kernels.add_shared_slots)
        return self.kernels.remap_experts(
            experts,
            weights,
            *tables,
            united_slots=self.expert_map.united_slots,
            mechanism=how.mechanism,
            ranking=how.ranking,
            similarity=self.similarity,
            similarity_min=how.similarity_min,
            renormalize=self.renormalize,
            num_tokens=num_tokens,
            replaced=replaced,
            shared=shared,
        )
