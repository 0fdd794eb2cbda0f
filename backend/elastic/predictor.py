"""Load predictor (MoEless): which experts of layer l a step will need, from what layer l - d saw.

The predictor of layer l at distance d is the router of layer l applied to the input of the expert layer l - d: neighbouring
layers see nearly the same residual stream. Where that finds fewer than 80 % of the experts, the matrix is fine-tuned on
recorded activations (`backend.elastic.train_predictor`); where even that is not enough, as in a model of few layers of which
each changes much, a narrow hidden layer beside the matrix learns what the layers between add. On the step path a predictor
is one small matmul per layer, with a hidden layer two.

A fine-tuned predictor's logits are the log-odds of each expert being chosen, so that a step's expected load is a sum of
probabilities. Counting only each token's most probable experts would favour those that are often nearly chosen.

Beside it stand the baselines, which know only loads of the past: `LastWindow` and `Ewma`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backend.errors import ConfigError

FORMAT = 3
FILE_NAME = "load-predictor.safetensors"
#: Names of a hidden layer's tensors in the file.
_HIDDEN = ("hidden_inner", "hidden_bias", "hidden_outer")


class HiddenLayer(NamedTuple):
    """Adds `outer @ silu(inner @ x + bias)` to the logits; H units."""

    inner: Tensor  # [H, M] float32
    bias: Tensor  # [H] float32
    outer: Tensor  # [E, H] float32

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [T, E] to add for inputs x [T, M]."""
        return F.linear(F.silu(F.linear(x, self.inner, self.bias)), self.outer)


@dataclass(frozen=True)
class LoadPredictor:
    """One matrix and bias per (layer, distance); layers are counted among those with experts."""

    weights: dict[tuple[int, int], Tensor]  # [E, M] float32
    biases: dict[tuple[int, int], Tensor]  # [E] float32
    top_k: int
    fingerprint: str
    #: (layer, distance) pairs whose matrix was fine-tuned to give log-odds; the others are the routers themselves.
    tuned: frozenset[tuple[int, int]] = frozenset()
    #: What a hidden layer adds to the logits of some pairs.
    hidden: dict[tuple[int, int], HiddenLayer] = field(default_factory=dict)

    @property
    def pairs(self) -> Collection[tuple[int, int]]:
        """(layer, distance) that the predictor was made for."""
        return self.weights.keys()

    def choose(self, hidden: Tensor, layer: int, distance: int) -> Tensor:
        """Experts [T, K] expected in `layer` for the inputs [T, M] of the expert layer `distance` before it.

        Raises ConfigError for a pair that the predictor was not made for.
        """
        return self._logits(hidden, layer, distance).topk(self.top_k, dim=-1).indices

    def expected(self, hidden: Tensor, layer: int, distance: int) -> Tensor:
        """Expected assignments [T, E] of each token, K in all: probabilities if fine-tuned, else 0 or 1; see `choose`."""
        logits = self._logits(hidden, layer, distance)
        if (layer, distance) not in self.tuned:
            return torch.zeros_like(logits).scatter_(-1, logits.topk(self.top_k, dim=-1).indices, 1.0)
        chances = logits.sigmoid()
        return chances * (self.top_k / chances.sum(-1, keepdim=True))

    def loads(self, hidden: Tensor, layer: int, distance: int) -> Tensor:
        """Expected assignments [E] of a step with inputs `hidden` [T, M]; see `choose`."""
        return self.expected(hidden, layer, distance).sum(0)

    def _logits(self, hidden: Tensor, layer: int, distance: int) -> Tensor:
        if (layer, distance) not in self.pairs:
            raise ConfigError(f"the load predictor has no matrix for layer {layer} at distance {distance}")
        x = hidden.float()
        logits = F.linear(x, self.weights[layer, distance], self.biases[layer, distance])
        if (layer, distance) in self.hidden:
            logits = logits + self.hidden[layer, distance](x)
        return logits

    def write(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all; in float16, which is as good for choosing experts."""
        header = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "top_k": self.top_k,
            "tuned": sorted(self.tuned),
        }
        tensors = {}
        for layer, distance in self.pairs:
            tensors[f"{layer}.{distance}.weight"] = self.weights[layer, distance]
            tensors[f"{layer}.{distance}.bias"] = self.biases[layer, distance]
        for (layer, distance), added in self.hidden.items():
            for name, tensor in zip(_HIDDEN, added, strict=True):
                tensors[f"{layer}.{distance}.{name}"] = tensor
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".new")
        # Copies: a router that serves at two distances is one tensor, and safetensors takes none twice.
        halves = {name: tensor.to(torch.float16, copy=True) for name, tensor in tensors.items()}
        save_file(halves, unfinished, {"load_predictor": json.dumps(header)})
        unfinished.replace(path)

    @classmethod
    def read(cls, path: Path, fingerprint: str | None = None) -> LoadPredictor:
        """Raises ConfigError naming the file if it is unreadable, or (with `fingerprint`) of another checkpoint."""
        found: dict[str, dict[tuple[int, int], Tensor]] = {name: {} for name in ("weight", "bias", *_HIDDEN)}
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["load_predictor"])
                if header["format"] != FORMAT:
                    raise ConfigError(
                        f"load predictor {path} has format {header['format']}, this version reads {FORMAT}"
                    )
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    layer, distance, kind = name.split(".")
                    found[kind][int(layer), int(distance)] = file.get_tensor(name).float()
            tuned = frozenset((layer, distance) for layer, distance in header["tuned"])
            added = {pair: HiddenLayer(*(found[name][pair] for name in _HIDDEN)) for pair in found[_HIDDEN[0]]}
            predictor = cls(found["weight"], found["bias"], header["top_k"], header["fingerprint"], tuned, added)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is not a readable load predictor: {error!r}") from None
        if predictor.weights.keys() != predictor.biases.keys():
            raise ConfigError(f"load predictor {path} lacks tensors")
        if fingerprint is not None and predictor.fingerprint != fingerprint:
            raise ConfigError(
                f"load predictor {path} was trained for another checkpoint (fingerprint {predictor.fingerprint}, this one has "
                f"{fingerprint}); train it again with backend.elastic.train_predictor"
            )
        return predictor


class LastWindow:
    """Expects the shares of the last `steps` steps."""

    def __init__(self, num_experts: int, steps: int = 16) -> None:
        self._steps = steps
        self._window: list[Tensor] = []
        self._uniform = torch.full((num_experts,), 1 / num_experts)

    def predict(self, assignments: float) -> Tensor:
        """Expected assignments [E] of a step with so many in all."""
        if not self._window:
            return self._uniform * assignments
        total = torch.stack(self._window).sum(0)
        return total / total.sum().clamp(min=1) * assignments

    def observe(self, loads: Tensor) -> None:
        """A step's true loads [E]."""
        self._window = [*self._window, loads.float()][-self._steps :]


class Ewma:
    """Expects exponentially weighted shares; `decay` is the weight of the past at each step."""

    def __init__(self, num_experts: int, decay: float = 0.9) -> None:
        self._decay = decay
        self._shares = torch.full((num_experts,), 1 / num_experts)

    def predict(self, assignments: float) -> Tensor:
        """Expected assignments [E] of a step with so many in all."""
        return self._shares * assignments

    def observe(self, loads: Tensor) -> None:
        """A step's true loads [E]."""
        self._shares = self._decay * self._shares + (1 - self._decay) * loads.float() / loads.sum().clamp(min=1)


def recall(chosen: Tensor, experts: Tensor) -> float:
    """Share of the true experts [T, K] among the chosen [T, K]."""
    return (experts.long()[..., None] == chosen[:, None, :]).any(-1).float().mean().item()


def load_error(expected: Tensor, loads: Tensor) -> float:
    """Share of assignments expected on the wrong expert: half the L1 distance of loads [E] over their sum."""
    return ((expected - loads).abs().sum() / (2 * loads.sum().clamp(min=1))).item()
