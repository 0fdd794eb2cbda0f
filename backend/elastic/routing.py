"""Which experts the simulated requests' tokens are routed to: recorded from an engine, or generated with stated skew.

A pool holds sequences of tokens with their experts in every layer. A simulated request follows one sequence, token by token
and round again if it is longer, so tokens of a request keep the affinity that the sequence has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backend.errors import ConfigError

#: How strongly the domain in season outweighs the others: its share of arrivals over the share of its opposite is e^(2 c).
_SEASON = 1.5


@dataclass(frozen=True)
class RoutingPool:
    """N tokens of S sequences in G domains; L layers with experts, K experts per token, E experts in all."""

    num_experts: int
    experts: NDArray[np.int16]  # [N, L, K]
    #: [N, L, K] what the predictor says; -1 in layers that are too early for a prediction.
    predicted: NDArray[np.int16]
    starts: NDArray[np.int64]  # [S + 1] first token of each sequence; last entry N
    domains: NDArray[np.int64]  # [S] domain of each sequence
    source: str
    #: [N, L, E] expected assignments of each token where a predictor gives probabilities; else they are those of `predicted`.
    expected: NDArray[np.float16] | None = None

    @property
    def num_layers(self) -> int:
        return self.experts.shape[1]

    @property
    def num_domains(self) -> int:
        return int(self.domains.max()) + 1

    def counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Assignments [L, E] of the tokens `rows` [T]."""
        return _count(self.experts[rows], self.num_experts)

    def predicted_counts(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Expected assignments [L, E] of the tokens `rows` [T]; rows of -1 in layers without a prediction."""
        if self.expected is not None:
            counts = self.expected[rows].sum(0, dtype=np.float64)
        else:
            counts = _count(self.predicted[rows], self.num_experts).astype(np.float64)
        counts[self.predicted[0, :, 0] < 0] = -1
        return counts

    def recall(self) -> list[float]:
        """Share of each layer's chosen experts that were predicted; NaN in layers without a prediction."""
        hits = (self.experts[..., None] == self.predicted[..., None, :]).any(-1).mean((0, 2))
        return [float("nan") if self.predicted[0, layer, 0] < 0 else float(hit) for layer, hit in enumerate(hits)]

    def choose_sequences(
        self, arrivals: NDArray[np.float64], drift_s: float, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """A sequence for each request. Domains come in season one after the other, each once in `drift_s` seconds (0: never)."""
        groups = self.num_domains
        angles = 2 * np.pi * np.arange(groups) / groups
        phase = 2 * np.pi * arrivals / drift_s if drift_s else np.zeros_like(arrivals)
        weights = np.exp(_SEASON * np.cos(phase[:, None] - angles)) if drift_s else np.ones((len(arrivals), groups))
        edges = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)
        domain = np.minimum((rng.random(len(arrivals))[:, None] > edges).sum(1), groups - 1)
        picks = rng.random(len(arrivals))
        members = [np.flatnonzero(self.domains == group) for group in range(groups)]
        return np.array([members[g][int(u * len(members[g]))] for g, u in zip(domain, picks, strict=True)], np.int64)


def generate(
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    skew: float,
    domains: int,
    recall: float,
    distance: int,
    seed: int,
    sequences: int = 64,
    length: int = 256,
) -> RoutingPool:
    """Routing in which a domain's tokens choose experts with probability near rank^-skew, in an order of its own per layer.

    About `recall` of the chosen experts are predicted; where a prediction is wrong, it is a draw from the same popularity.
    """
    if not (skew >= 0 and domains >= 1 and 0 <= recall <= 1 and distance >= 1):
        raise ConfigError(
            "generated routing needs skew >= 0, domains >= 1, recall between 0 and 1 and distance >= 1, got "
            f"{skew}, {domains}, {recall} and {distance}"
        )
    rng = np.random.default_rng(seed)
    owner = np.arange(sequences) % domains
    ranks = np.stack(
        [[rng.permutation(num_experts) + 1 for _ in range(num_layers)] for _ in range(domains)]
    )  # [G, L, E]
    log_weight = (-skew * np.log(ranks)).astype(np.float32)
    weights = log_weight[np.repeat(owner, length)]  # [N, L, E]
    experts = _best(_noisy(weights, rng), top_k)
    predicted = _predict(experts, _noisy(weights, rng), recall, rng)
    predicted[:, :distance] = -1
    return RoutingPool(
        num_experts,
        experts,
        predicted,
        np.arange(sequences + 1) * length,
        owner,
        f"generated: Zipf {skew:g}, {domains} domains, recall {recall:g} at distance {distance}",
    )


def _noisy(log_weight: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Gumbel noise added: the largest of a row are draws without repetition with those weights."""
    return log_weight + rng.gumbel(size=log_weight.shape).astype(np.float32)


def _best(scores: NDArray[np.float32], top_k: int) -> NDArray[np.int16]:
    return np.argpartition(-scores, top_k - 1, axis=-1)[..., :top_k].astype(np.int16)


def _predict(
    experts: NDArray[np.int16], scores: NDArray[np.float32], recall: float, rng: np.random.Generator
) -> NDArray[np.int16]:
    """Predictions [N, L, K]: some chosen experts for certain, the rest by `scores` [N, L, E], of which some hit by chance."""
    luck = rng.random(experts.shape)
    keep, predicted = recall, experts
    for _ in range(4):
        kept = scores.copy()
        sure = np.where(luck < keep, np.inf, np.take_along_axis(scores, experts.astype(np.int64), -1))
        np.put_along_axis(kept, experts.astype(np.int64), sure.astype(np.float32), -1)
        predicted = _best(kept, experts.shape[-1])
        found = (experts[..., None] == predicted[..., None, :]).any(-1).mean()
        # Recall is nearly linear in `keep`, from the hits by chance at 0 to 1 at 1.
        keep = float(np.clip(1 - (1 - keep) * (1 - recall) / max(1 - found, 1e-9), 0, 1))
    return predicted


def _count(experts: NDArray[np.int16], num_experts: int) -> NDArray[np.int64]:
    layers = experts.shape[1]
    flat = experts + np.arange(layers, dtype=np.int64)[:, None] * num_experts
    known = flat[experts >= 0]
    return np.bincount(known, minlength=layers * num_experts).reshape(layers, num_experts)
