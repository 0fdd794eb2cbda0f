"""Remap decides exactly as the reference, assignment by assignment."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the GPU kernels need Triton's compiler")

from backend.kernels import gpu, reference
from backend.kernels.reference.remap import remap_experts

#: Tokens, experts, top_k, way and padding; thresholds; whether half of the experts are missing. The last two are more than one
#: program looks at, those before are just what it does.
CASES = [
    (1, 6, 2, 2, 0, (0.0, 0.0), False),
    (1, 6, 2, 2, 0, (0.3, 0.7), True),
    (19, 60, 4, 8, 3, (0.3, 0.7), False),
    (19, 60, 4, 8, 3, (1.0, 1.0), True),
    (40, 9, 3, 4, 0, (0.5, 0.0), True),
    (40, 9, 3, 4, 0, (0.0, 0.0), False),
    (128, 60, 8, 8, 5, (0.3, 0.7), False),
    (130, 12, 5, 3, 100, (1.0, 1.0), False),
    (130, 12, 5, 3, 100, (0.5, 0.0), True),
]


def make(tokens: int, num_experts: int, top_k: int, way: int, seed: int) -> tuple[tuple, dict]:
    generator = torch.Generator().manual_seed(seed)
    skew = torch.rand(num_experts, generator=generator) * 2
    scores = torch.rand(tokens, num_experts, generator=generator) + skew
    weights, experts = scores.softmax(1).topk(top_k, dim=1)
    token_class = torch.randint(0, 4, (tokens,), generator=generator).to(torch.int8)
    united = num_experts + torch.randperm(num_experts, generator=generator) // way
    return (experts, weights, torch.randperm(num_experts, generator=generator)), {
        "token_class": token_class,
        "united": united,
    }


@pytest.mark.parametrize(
    ("mechanism", "ranking", "renormalize"),
    [
        ("united", "count", False),
        ("united", "gate_mass", True),
        ("drop", "count", False),
        ("united_top_k", "count", True),
        ("united_top_k", "gate_mass", False),
    ],
)
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "way", "padding", "thetas", "missing"), CASES)
def test_slots_and_weights_are_the_references(
    run, tokens, num_experts, top_k, way, padding, mechanism, ranking, renormalize, thetas, missing
) -> None:
    (experts, weights, slots), more = make(tokens, num_experts, top_k, way, seed=tokens)
    if missing:
        slots[::2] = -1
    thresholds = torch.tensor([*thetas, 1.0, 1.0] if thetas[0] else [*thetas, 0.0, 0.0])
    num_tokens = torch.tensor(tokens - padding) if padding else None
    args = (experts, weights, slots, thresholds, more["token_class"], num_tokens)
    options = {"united_slots": more["united"], "mechanism": mechanism, "ranking": ranking, "renormalize": renormalize}
    counts = [torch.arange(tokens, dtype=torch.int32) for _ in range(2)]

    def counted(replaced: torch.Tensor, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gpu.remap_experts(*args, **options_there, replaced=replaced)

    options_there = {**options, "united_slots": more["united"].to(run.device)}
    (actual_slots, actual_weights), after = run(counted, counts[0], *args)
    expected_slots, expected_weights = remap_experts(*args, **options, replaced=counts[1])
    assert torch.equal(actual_slots, expected_slots)
    used = expected_slots >= 0
    assert torch.equal(actual_weights[used], expected_weights[used])
    assert torch.equal(after[0], counts[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU each example would be compiled")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_step_is_the_references_in_one_launch_and_in_two(data: st.DataObject) -> None:
    """The bound between them is moved, so that the same small steps go both ways."""
    tokens, way, seed = (data.draw(st.integers(*bounds)) for bounds in ((1, 24), (2, 8), (0, 2**31)))
    num_experts = data.draw(st.integers(2, 12))
    top_k = data.draw(st.integers(1, min(6, num_experts)))
    (experts, weights, slots), more = make(tokens, num_experts, top_k, way, seed)
    for value in data.draw(st.lists(st.sampled_from([float("nan"), 0.0, 1e-9, 2000.0, -1.0]), max_size=3)):
        weights[seed % tokens, -1] = value
    slots[: data.draw(st.integers(0, num_experts // 2))] = -1
    theta = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32))
    thresholds = torch.tensor([data.draw(theta), data.draw(theta), 0.5, 1.0])
    num_tokens = data.draw(st.one_of(st.none(), st.integers(0, tokens).map(torch.tensor)))
    options = {
        "united_slots": more["united"],
        "mechanism": data.draw(st.sampled_from(["united", "united_top_k", "drop"])),
        "ranking": data.draw(st.sampled_from(["count", "gate_mass"])),
        "renormalize": data.draw(st.booleans()),
    }

    def results(function: Callable) -> tuple[torch.Tensor, ...]:
        replaced = torch.zeros(tokens, dtype=torch.int32)
        args = (experts, weights, slots, thresholds, more["token_class"], num_tokens)
        new_slots, new_weights = function(*args, **options, replaced=replaced)
        return new_slots, torch.where(new_slots >= 0, new_weights, 0.0), replaced

    expected = results(remap_experts)
    for few in (0, 2**10):
        with mock.patch.object(gpu.remap, "_FEW", few):
            found = results(gpu.remap_experts)
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def test_without_united_experts_everything_stays(run) -> None:
    (experts, weights, slots), more = make(7, 6, 2, 2, seed=1)
    args = (experts, weights, slots, torch.zeros(4), more["token_class"])
    (actual_slots, actual_weights), _ = run(gpu.remap_experts, *args)
    assert torch.equal(actual_slots, slots[experts]) and torch.equal(actual_weights, weights)


@pytest.mark.parametrize("mechanism", ["reroute", "top_k", "piggyback"])
def test_other_mechanisms_are_those_of_the_reference(run, mechanism: str) -> None:
    (experts, weights, slots), more = make(12, 8, 3, 2, seed=2)
    args = (experts, weights, slots, torch.tensor([0.4, 0.5, 1.0, 1.0]), more["token_class"])
    if mechanism != "reroute":
        options = {"renormalize": True}
        if mechanism == "piggyback":
            options["scores"] = torch.rand(12, 8, generator=torch.Generator().manual_seed(3))
        actual, _ = run(gpu.select_experts, *args, **options)
        expected = reference.remap.select_experts(*args, **options)
    else:
        options = {"similarity": torch.rand(8, 8), "similarity_min": torch.tensor(0.5)}
        actual, _ = run(gpu.remap_experts, *args, mechanism=mechanism, **options)
        expected = remap_experts(*args, mechanism=mechanism, **options)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])
