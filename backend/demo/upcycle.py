"""From a dense model to experts that compute the same at first.

The dense FFN is cut into K slices; every expert is a copy of one slice plus noise, and the experts of one copy of the
whole FFN share a router direction (virtual groups: He et al., Upcycling Large Language Models into Mixture of Experts,
2024). The K best experts of a token are then one group, that is, one whole FFN, each with weight 1/K: down projections
are multiplied by K. Without noise the function is unchanged; with it, and with training, the groups dissolve.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from backend.demo.model import DemoModel, Shape

#: Differences of the router's rows within a group, relative to the rows themselves.
_ROUTER_NOISE = 0.1


def upcycle(dense: DemoModel, shape: Shape, noise: float, seed: int) -> DemoModel:
    """A model with experts made of a dense one; `noise` is relative to each weight matrix's own spread.

    Raises ValueError if the sizes do not fit: the dense FFN must be `top_k` experts wide, the experts whole groups.
    """
    _check(dense, shape)
    generator = torch.Generator().manual_seed(seed)
    model = DemoModel(replace(shape, dense_size=dense.shape.dense_size), moe=True)
    own = model.state_dict()
    for name, value in dense.state_dict().items():
        if name in own:
            own[name] = value.clone()
    for layer in range(shape.layers):
        prefix = f"feed.{layer}"
        w_in, w_out = dense.feed[layer].dense_in.data, dense.feed[layer].dense_out.data
        slices_in = w_in.view(2, shape.top_k, shape.expert_size, -1).transpose(0, 1)  # [K, 2, I, H]
        slices_out = w_out.view(shape.hidden, shape.top_k, shape.expert_size).transpose(0, 1) * shape.top_k  # [K, H, I]
        groups = shape.experts // shape.top_k
        own[f"{prefix}.expert_in"] = _noisy(slices_in.repeat(groups, 1, 1, 1), noise, generator)
        own[f"{prefix}.expert_out"] = _noisy(slices_out.repeat(groups, 1, 1), noise, generator)
        rows = torch.randn(groups, shape.hidden, generator=generator) * shape.hidden**-0.5
        router = rows.repeat_interleave(shape.top_k, dim=0)
        own[f"{prefix}.router"] = _noisy(router, _ROUTER_NOISE if noise else 0.0, generator)
    model.load_state_dict(own)
    return model


def _noisy(values: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    return values + torch.randn(values.shape, generator=generator) * values.std() * noise


def _check(dense: DemoModel, shape: Shape) -> None:
    if dense.moe:
        raise ValueError("upcycling starts from a dense model, this one has experts")
    if dense.shape.dense_size != shape.top_k * shape.expert_size:
        raise ValueError(
            f"the dense FFN ({dense.shape.dense_size}) must be {shape.top_k} experts of {shape.expert_size} wide"
        )
    if shape.experts % shape.top_k:
        raise ValueError(f"the number of experts ({shape.experts}) must be a multiple of {shape.top_k}")
    for name in ("vocab_size", "hidden", "layers", "heads", "shared_size"):
        if getattr(dense.shape, name) != getattr(shape, name):
            raise ValueError(
                f"{name}: the dense model has {getattr(dense.shape, name)}, the new one {getattr(shape, name)}"
            )
