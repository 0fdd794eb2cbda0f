"""Whether a kernel computes what its reference computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from backend.kernels import reference
from loadtest.bench.kernel_cases import Arguments, Case, copies, implementation_of, in_float32, reference_of
from loadtest.bench.timing import replayed

#: Largest relative error of a row, by the type of weights and KV cache.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}


def compare(case: Case, kernels: ModuleType | SimpleNamespace, generator: torch.Generator) -> float:
    """The worst relative error of any row of any output; infinite where whole numbers differ or something is not finite.

    On a GPU the kernel is launched once and replayed once from a CUDA graph.
    """
    args = case.make(generator)
    wide = in_float32(args)
    function = implementation_of(case, kernels)
    ways = [(function, args)]
    if generator.device.type == "cuda" and case.captures:
        ways.append((replayed(function), copies(args)))
    with torch.inference_mode():
        if case.kernel == "route":
            return max(_route_error(function, args, wide) for function, args in ways)
        expected = case.outputs(reference_of(case)(*wide), wide)
        outputs = [case.outputs(function(*args), args) for function, args in ways]
    return max(error(a, e) for actual in outputs for a, e in zip(actual, expected, strict=True))


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the expected norm, of the row (last dimensions) for which it is largest.

    Rows far smaller than the others are measured against a hundredth of the typical row.
    """
    if actual.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else math.inf
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).reshape(actual.shape[0], -1).norm(dim=1)
    norms = expected.double().reshape(actual.shape[0], -1).norm(dim=1)
    worst = (difference / norms.clamp(min=max(1e-2 * norms.mean().item(), 1e-30))).max().item()
    return worst if math.isfinite(worst) else math.inf


def _route_error(route: Callable, args: Arguments, wide: Arguments) -> float:
    """Two nearly equal experts may be chosen either way, so a choice is held against the true probabilities.

    The error is that of the weights, given the chosen experts, and that of the chosen experts' probabilities against the
    best ones'.
    """
    experts, weights = route(*args)
    hidden, matrix, bias, top_k, renormalize = wide
    ranked, probabilities = reference.route(hidden, matrix, bias, matrix.shape[0], False)
    dense = torch.zeros_like(probabilities).scatter_(1, ranked, probabilities)
    chosen = dense.gather(1, experts)
    if (experts.sort(dim=1).values.diff(dim=1) == 0).any():
        return math.inf
    own = chosen / chosen.sum(dim=1, keepdim=True) if renormalize else chosen
    return max(error(weights, own), error(chosen, probabilities[:, :top_k]))
