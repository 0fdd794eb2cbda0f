"""Which experts share a united expert: groups of at most `way`, as few groups as there can be."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GROUPINGS = ("index", "output", "coactivation")
#: Calibration tokens on which the outputs of all experts are compared.
SHARED_TOKENS = 1024


def group_by_index(num_experts: int, way: int) -> Tensor:
    """Neighbours by number, the paper's grouping: groups [E] int64."""
    return torch.arange(num_experts) // way


def group_by_affinity(affinity: Tensor, way: int) -> Tensor:
    """Groups [E] int64 with much affinity [E, E] (symmetric) inside them.

    Hierarchical clustering (average linkage) puts related experts side by side; the order of its leaves is cut into runs of
    `way`; then pairs of experts change places while that raises the affinity inside groups.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    table = affinity.double().cpu().numpy().copy()
    np.fill_diagonal(table, 0.0)
    count = len(table)
    groups = np.zeros(count, np.int64)
    if count > 2:
        distance = table.max() - table
        np.fill_diagonal(distance, 0.0)
        condensed = squareform(distance, checks=False)
        order = leaves_list(optimal_leaf_ordering(linkage(condensed, "average"), condensed))
    else:
        order = np.arange(count)
    groups[order] = np.arange(count) // way
    _exchange(table, groups)
    return _renumbered(torch.from_numpy(groups))


def _exchange(table: np.ndarray, groups: np.ndarray) -> None:
    """Exchange pairs across groups, the best pair first, until none raises the affinity inside groups; in place."""
    member = np.eye(int(groups.max()) + 1)[groups]  # [E, G]
    experts = np.arange(len(groups))
    for _ in range(20 * len(groups)):
        to_group = table @ member  # [E, G] affinity of each expert to each group
        own = to_group[experts, groups]
        moved = to_group[:, groups]  # [E, E]: of expert i to the group of expert j
        gain = moved + moved.T - own[:, None] - own[None, :] - 2 * table
        gain[groups[:, None] == groups[None, :]] = 0.0
        i, j = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[i, j] <= 1e-9 * max(1.0, np.abs(table).max()):
            return
        groups[i], groups[j] = groups[j], groups[i]
        member[[i, j]] = member[[j, i]]


def _renumbered(groups: Tensor) -> Tensor:
    """The same groups, numbered in the order of their first experts."""
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(int(group), len(numbers)) for group in groups])


@torch.no_grad()
def output_similarity(inputs: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Cosine similarity [E, E] float32 of the experts' outputs on the same tokens, inputs [S, M] float32."""
    outputs = torch.stack([expert_output(inputs, w13[e], w2[e]).flatten() for e in range(len(w13))])
    outputs = F.normalize(outputs, dim=1)
    return outputs @ outputs.T


def coactivation(experts: Tensor, num_experts: int) -> Tensor:
    """How many tokens chose both of two experts, [E, E] float32 with a zero diagonal; experts [N, K]."""
    chosen = torch.zeros(len(experts), num_experts, device=experts.device).scatter_(1, experts, 1.0)
    return (chosen.T @ chosen).fill_diagonal_(0.0)


def expert_output(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """One expert in x's type: x [n, M], w13 [2 I, M], w2 [M, I] -> [n, M]."""
    gate, up = F.linear(x, w13.to(x.dtype)).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w2.to(x.dtype))
