"""Remap: the promises of brownout under random routing, and the compiled version bit for bit as the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backend.kernels import cpu, reference

SETTINGS = settings(max_examples=50)
KEPT_SET = ("united", "united_top_k", "reroute", "drop")
THETAS = st.one_of(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.8, 1.0]), st.floats(0, 1, width=32))


@dataclass
class Case:
    """One step of routing; see remap_experts."""

    experts: Tensor
    weights: Tensor
    token_class: Tensor
    thresholds: Tensor
    groups: Tensor
    scores: Tensor
    similarity: Tensor
    similarity_min: Tensor
    num_tokens: int
    #: [E] bool: experts that are not there.
    missing: Tensor

    @property
    def num_experts(self) -> int:
        return len(self.groups)

    @property
    def united_slots(self) -> Tensor:
        return self.num_experts + self.groups

    def with_thresholds(self, *thresholds: float) -> Case:
        return replace(self, thresholds=torch.tensor(thresholds))


@dataclass
class Result:
    slots: Tensor
    weights: Tensor
    replaced: Tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(2, 24))
    top_k = draw(st.integers(1, min(4, num_experts)))
    rows = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    popularity = rng.exponential(size=num_experts) ** draw(st.sampled_from([0, 1, 3]))
    scores = torch.from_numpy(rng.exponential(size=(rows, num_experts)) * popularity).float()
    if draw(st.booleans()):  # equal scores: ties
        scores = (scores * 4).round() / 4
    scores = torch.softmax(scores, 1)
    weights, experts = scores.sort(dim=1, descending=True, stable=True)
    way = draw(st.integers(2, 8))
    order = torch.from_numpy(rng.permutation(num_experts))
    similarity = torch.from_numpy(rng.random((num_experts, num_experts))).float()
    return Case(
        experts=experts[:, :top_k].contiguous(),
        weights=weights[:, :top_k].contiguous(),
        token_class=torch.from_numpy(rng.integers(0, draw(st.integers(1, 4)), rows, dtype=np.int8)),
        thresholds=torch.tensor([draw(THETAS), draw(THETAS), 1.0, 1.0]),
        groups=order // way,
        scores=scores,
        similarity=(similarity * 8).round() / 8 if draw(st.booleans()) else similarity,
        similarity_min=torch.tensor(draw(st.sampled_from([0.0, 0.5, 0.9]))),
        num_tokens=draw(st.integers(0, rows)) if draw(st.booleans()) else rows,
        missing=torch.zeros(num_experts, dtype=torch.bool),
    )


def remap(case: Case, mechanism: str, ranking: str = "count", renormalize: bool = False) -> Result:
    """The reference's answer, after checking that the compiled one is the same, bit for bit."""
    rows = len(case.experts)
    results = []
    for kernels in (reference, cpu):
        replaced = torch.zeros(rows, dtype=torch.int32)
        own_slots = torch.where(case.missing, -1, torch.arange(case.num_experts))
        tables = (own_slots, case.thresholds, case.token_class)
        num_tokens = torch.tensor(case.num_tokens) if case.num_tokens < rows else None
        if mechanism in KEPT_SET:
            slots, weights = kernels.remap_experts(
                case.experts,
                case.weights,
                *tables,
                num_tokens,
                united_slots=case.united_slots,
                mechanism=mechanism,
                ranking=ranking,
                similarity=case.similarity,
                similarity_min=case.similarity_min,
                renormalize=renormalize,
                replaced=replaced,
            )
        else:
            slots, weights = kernels.select_experts(
                case.experts,
                case.weights,
                *tables,
                num_tokens,
                scores=case.scores if mechanism == "piggyback" else None,
                renormalize=renormalize,
                replaced=replaced,
            )
        assert slots.dtype == torch.int64 and weights.dtype == torch.float32
        results.append(Result(slots, torch.where(slots >= 0, weights, 0.0), replaced))
    expected, compiled = results
    assert torch.equal(expected.slots, compiled.slots)
    assert torch.equal(expected.weights, compiled.weights)
    assert torch.equal(expected.replaced, compiled.replaced)
    return expected


def active(result: Result) -> set[int]:
    return set(result.slots[result.slots >= 0].tolist())


def by_definition(case: Case, ranking: str) -> tuple[set[int], dict[int, int]]:
    """Kept experts, and the slot of each active expert under `united`, in fractions and loops."""
    demand: dict[int, int] = {}
    theta: dict[int, Fraction] = {}
    for t in range(case.num_tokens):
        own = Fraction(int(case.thresholds[int(case.token_class[t])].item() * 2**16 + 0.5), 2**16)
        for e, weight in zip(case.experts[t].tolist(), case.weights[t].tolist(), strict=True):
            share = max(1, int(weight * 2**16 + 0.5)) if ranking == "gate_mass" else 1
            demand[e] = demand.get(e, 0) + share
            theta[e] = max(theta.get(e, Fraction(0)), own)
    total, before, kept = sum(demand.values()), 0, set()
    for e in sorted(demand, key=lambda e: (-demand[e], e)):
        if before < theta[e] * total:
            kept.add(e)
        before += demand[e]
    slots = {}
    for e in demand:
        others = [f for f in demand if f not in kept and case.groups[f] == case.groups[e]]
        slots[e] = e if e in kept or len(others) < 2 else case.num_experts + int(case.groups[e])
    return kept, slots


def example(thresholds: tuple[float, ...], token_class: tuple[int, ...] = (1, 1, 1, 1, 1)) -> Result:
    """Six experts in pairs; demand 2, 1, 3, 2, 1, 1 of 10, so before is 3, 7, 0, 5, 8, 9; united slots 6, 7, 8."""
    case = Case(
        experts=torch.tensor([[0, 2], [2, 3], [0, 2], [1, 4], [3, 5]]),
        weights=torch.tensor([[0.5, 0.25], [0.75, 0.125], [0.5, 0.5], [0.25, 0.25], [0.5, 0.125]]),
        token_class=torch.tensor(token_class, dtype=torch.int8),
        thresholds=torch.tensor(thresholds),
        groups=torch.arange(6) // 2,
        scores=torch.zeros(5, 6),
        similarity=torch.zeros(6, 6),
        similarity_min=torch.tensor(0.0),
        num_tokens=5,
        missing=torch.zeros(6, dtype=torch.bool),
    )
    return remap(case, "united")


def test_example_worked_out_by_hand() -> None:
    half = example((1.0, 0.5, 1.0, 1.0))
    assert half.slots.tolist() == [[0, 2], [2, 3], [0, 2], [1, 8], [3, 8]], "before(3) = 5 is not below 0.5 * 10"
    assert half.replaced.tolist() == [0, 0, 0, 1, 1]
    quarter = example((1.0, 0.25, 1.0, 1.0))
    assert quarter.slots.tolist() == [[6, 2], [2, 3], [6, 2], [6, 8], [3, 8]], "expert 3 would be alone: it stays"
    full = example((1.0, 0.0, 1.0, 1.0))
    assert full.slots.tolist() == [[6, 7], [7, -1], [6, 7], [6, 8], [7, 8]], "2 and 3 of the second token become one"
    assert full.weights.tolist() == [[0.5, 0.25], [0.875, 0.0], [0.5, 0.5], [0.25, 0.25], [0.5, 0.125]]
    assert full.replaced.tolist() == [2] * 5


def test_experts_of_a_never_token_serve_everybody() -> None:
    result = example((1.0, 0.0, 1.0, 1.0), token_class=(1, 1, 1, 1, 3))
    assert result.slots.tolist() == [[6, 2], [2, 3], [6, 2], [6, 4], [3, 5]]


@SETTINGS
@given(cases(), st.sampled_from(["count", "gate_mass"]))
def test_united_follows_the_definition(case: Case, ranking: str) -> None:
    result = remap(case, "united", ranking)
    kept, slots = by_definition(case, ranking)
    assert active(remap(case, "drop", ranking)) == kept
    for t in range(case.num_tokens):
        wanted: dict[int, float] = {}
        for e, weight in zip(case.experts[t].tolist(), case.weights[t].tolist(), strict=True):
            wanted[slots[e]] = wanted.get(slots[e], 0.0) + weight
        found = [(s, w) for s, w in zip(result.slots[t].tolist(), result.weights[t].tolist(), strict=True) if s >= 0]
        assert dict(found) == pytest.approx(wanted) and len(found) == len(wanted), "a token has a slot once"
        moved = sum(slots[e] != e for e in case.experts[t].tolist())
        assert result.replaced[t] == moved


@SETTINGS
@given(cases(), st.sampled_from(["count", "gate_mass"]))
def test_theta_one_is_no_brownout(case: Case, ranking: str) -> None:
    case = case.with_thresholds(1.0, 1.0, 1.0, 1.0)
    valid = (torch.arange(len(case.experts)) < case.num_tokens).unsqueeze(1)
    for mechanism in (*KEPT_SET, "top_k", "piggyback"):
        result = remap(case, mechanism, ranking, renormalize=True)
        assert torch.equal(result.slots, torch.where(valid, case.experts, -1))
        assert torch.equal(result.weights, torch.where(valid, case.weights, 0.0))
        assert result.replaced.sum() == 0


@SETTINGS
@given(cases(), st.integers(0, 3), THETAS, st.sampled_from(["count", "gate_mass"]))
def test_more_theta_keeps_more_and_activates_no_fewer_slots(case: Case, which: int, theta: float, ranking: str) -> None:
    low, high = case.thresholds.tolist(), case.thresholds.tolist()
    low[which], high[which] = sorted([low[which], theta])
    dim, bright = case.with_thresholds(*low), case.with_thresholds(*high)
    assert active(remap(dim, "drop", ranking)) <= active(remap(bright, "drop", ranking))
    assert len(active(remap(dim, "united", ranking))) <= len(active(remap(bright, "united", ranking)))


@SETTINGS
@given(cases(), st.sampled_from(["united", "reroute"]), st.sampled_from(["count", "gate_mass"]))
def test_gate_weight_of_a_token_is_kept(case: Case, mechanism: str, ranking: str) -> None:
    result = remap(case, mechanism, ranking)
    n = case.num_tokens
    torch.testing.assert_close(result.weights[:n].sum(1), case.weights[:n].sum(1))


@SETTINGS
@given(cases(), st.sampled_from([*KEPT_SET, "top_k", "piggyback"]))
def test_never_tokens_are_left_alone(case: Case, mechanism: str) -> None:
    result = remap(case, mechanism, renormalize=True)
    never = (case.token_class >= 2) & (torch.arange(len(case.experts)) < case.num_tokens)
    assert torch.equal(result.slots[never], case.experts[never])
    assert torch.equal(result.weights[never], case.weights[never])
    assert result.replaced[never].sum() == 0


@SETTINGS
@given(cases(), st.sampled_from([*KEPT_SET, "top_k", "piggyback"]), st.sampled_from(["count", "gate_mass"]))
def test_padding_counts_nowhere(case: Case, mechanism: str, ranking: str) -> None:
    n = case.num_tokens
    padded = remap(case, mechanism, ranking)
    assert (padded.slots[n:] == -1).all() and padded.replaced[n:].sum() == 0
    if n:
        parts = {name: getattr(case, name)[:n] for name in ("experts", "weights", "token_class", "scores")}
        alone = remap(replace(case, **parts), mechanism, ranking)
        assert torch.equal(padded.slots[:n], alone.slots) and torch.equal(padded.weights[:n], alone.weights)


@SETTINGS
@given(cases())
def test_reroute_takes_the_most_similar_kept_expert_or_none(case: Case) -> None:
    result = remap(case, "reroute")
    kept, _ = by_definition(case, "count")
    for t in range(case.num_tokens):
        wanted = set()
        for e in case.experts[t].tolist():
            similarity = {f: case.similarity[e, f].item() for f in sorted(kept)}
            best = max(similarity, key=similarity.__getitem__, default=e)
            near = e not in kept and bool(kept) and similarity[best] >= case.similarity_min.item()
            wanted.add(best if near else e)
        assert set(result.slots[t].tolist()) - {-1} == wanted


@SETTINGS
@given(cases(), st.booleans())
def test_top_k_keeps_the_best_of_each_token(case: Case, renormalize: bool) -> None:
    result = remap(case, "top_k", renormalize=renormalize)
    top_k = case.experts.shape[1]
    for t in range(case.num_tokens):
        theta = np.float32(case.thresholds[int(case.token_class[t])].item())
        sure = max(1, int(theta * np.float32(top_k) + np.float32(0.5)))
        assert result.slots[t].tolist() == case.experts[t, :sure].tolist() + [-1] * (top_k - sure)
        expected = case.weights[t, :sure] / (case.weights[t, :sure].sum() if renormalize and sure < top_k else 1)
        torch.testing.assert_close(result.weights[t, :sure], expected)
        assert result.replaced[t] == top_k - sure


@SETTINGS
@given(cases(), st.booleans())
def test_piggyback_loads_the_sure_experts_and_uses_them_for_all(case: Case, renormalize: bool) -> None:
    result = remap(case, "piggyback", renormalize=renormalize)
    loaded = active(remap(case, "top_k"))
    top_k = case.experts.shape[1]
    assert active(result) == loaded
    for t in range(case.num_tokens):
        best = sorted(loaded, key=lambda e: (-case.scores[t, e].item(), e))[:top_k]
        if case.thresholds[int(case.token_class[t])] == 1:
            best = case.experts[t].tolist()
        assert result.slots[t].tolist() == best + [-1] * (top_k - len(best))
        weights = case.scores[t, best]
        if renormalize and set(best) != set(case.experts[t].tolist()):
            weights = weights / weights.sum()
            torch.testing.assert_close(result.weights[t, : len(best)], weights)
        assert result.replaced[t] == len(set(case.experts[t].tolist()) - set(best))


@SETTINGS
@given(cases())
def test_weights_that_are_not_numbers_do_not_change_the_choice_of_others(case: Case) -> None:
    spoilt = replace(case, weights=case.weights.clone())
    spoilt.weights[0] = float("nan")
    tiny = replace(case, weights=case.weights.clone())
    tiny.weights[0] = 0.0
    assert torch.equal(remap_slots(spoilt, cpu), remap_slots(tiny, cpu))
    assert torch.equal(remap_slots(spoilt, reference), remap_slots(tiny, reference))


def remap_slots(case: Case, kernels) -> Tensor:
    tables = (torch.arange(case.num_experts), case.thresholds, case.token_class)
    return kernels.remap_experts(
        case.experts, case.weights, *tables, united_slots=case.united_slots, ranking="gate_mass"
    )[0]


@pytest.mark.parametrize("mechanism", [*KEPT_SET, "top_k", "piggyback"])
@pytest.mark.parametrize("ranking", ["count", "gate_mass"])
def test_reference_never_reads_the_device(mechanism: str, ranking: str) -> None:
    """Tensors without contents: a read, or a size that depends on contents, is an error."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tables = (tensor(5, dtype=torch.int64), tensor(4), tensor(7, dtype=torch.int8), tensor(dtype=torch.int32))
    more: dict[str, object] = {"replaced": tensor(7, dtype=torch.int32)}
    if mechanism in KEPT_SET:
        more |= {"mechanism": mechanism, "ranking": ranking, "united_slots": tensor(5, dtype=torch.int64)}
        more |= {"similarity": tensor(5, 5), "similarity_min": tensor()}
    else:
        more |= {"scores": tensor(7, 5) if mechanism == "piggyback" else None, "renormalize": ranking == "gate_mass"}
    function = reference.remap_experts if mechanism in KEPT_SET else reference.select_experts
    slots, weights = function(tensor(7, 2, dtype=torch.int64), tensor(7, 2), *tables, **more)
    assert slots.shape == weights.shape == (7, 2) and slots.dtype == torch.int64


def test_without_united_experts_nothing_is_replaced() -> None:
    experts, weights = torch.tensor([[0, 2], [1, 0], [2, 1]]), torch.rand(3, 2)
    for kernels in (reference, cpu):
        for theta in (0.0, 1.0):
            tables = (torch.tensor([5, 3, 4]), torch.full((4,), theta), torch.zeros(3, dtype=torch.int8))
            slots, out = kernels.remap_experts(experts, weights, *tables)
            assert slots.tolist() == [[5, 4], [3, 5], [4, 3]]
            assert torch.equal(out, weights)


@SETTINGS
@given(cases(), st.integers(0, 2**32), st.sampled_from(["count", "gate_mass"]))
def test_united_experts_serve_missing_ones_and_the_others_stay_at_theta_one(
    case: Case, seed: int, ranking: str
) -> None:
    missing = torch.from_numpy(np.random.default_rng(seed).random(case.num_experts) < 0.4)
    case = replace(case.with_thresholds(1.0, 1.0, 1.0, 1.0), missing=missing)
    result = remap(case, "united", ranking)
    here = torch.arange(len(case.experts)).unsqueeze(1) < case.num_tokens
    absent = missing[case.experts] & here
    assert torch.equal(result.replaced.long(), absent.sum(1))
    assert torch.equal(result.slots[here & ~absent], case.experts[here & ~absent])
    for t in range(case.num_tokens):
        served = {case.united_slots[e].item() for e in case.experts[t].tolist() if missing[e]}
        assert {slot for slot in result.slots[t].tolist() if slot >= case.num_experts} == served
        torch.testing.assert_close(result.weights[t].sum(), case.weights[t].sum(), rtol=1e-6, atol=1e-6)


@SETTINGS
@given(cases(), st.integers(0, 2**32), st.sampled_from(KEPT_SET))
def test_no_assignment_goes_to_a_missing_expert_under_any_threshold(case: Case, seed: int, mechanism: str) -> None:
    missing = torch.from_numpy(np.random.default_rng(seed).random(case.num_experts) < 0.4)
    plain, result = remap(case, mechanism), remap(replace(case, missing=missing), mechanism)
    assert active(result).isdisjoint(torch.nonzero(missing).flatten().tolist())
    rows = torch.arange(len(case.experts)) < case.num_tokens
    absent = missing[case.experts].any(1) & rows
    assert (result.replaced[absent] > 0).all()
    if not missing[case.experts[rows]].any():
        assert torch.equal(result.slots, plain.slots) and torch.equal(result.weights, plain.weights)


@SETTINGS
@given(cases(), st.booleans(), st.sampled_from(["count", "gate_mass"]))
def test_united_top_k_is_united_of_the_best_of_each_token(case: Case, renormalize: bool, ranking: str) -> None:
    """Each number of experts apart: what `united` makes of a step whose tokens were routed to their best only."""
    result = remap(case, "united_top_k", ranking, renormalize)
    top_k = case.experts.shape[1]
    theta = (case.thresholds.double() * 2**16 + 0.5).floor() / 2**16
    best = ((1 + theta) * top_k / 2 + 0.5).floor().long()[case.token_class.long()]
    assert (best >= (top_k + 1) // 2).all() and (best <= top_k).all()
    if len(set(best[: case.num_tokens].tolist())) != 1:
        return
    (count,) = set(best[: case.num_tokens].tolist())
    weights = case.weights[:, :count]
    plain = remap(
        replace(case, experts=case.experts[:, :count].contiguous(), weights=weights.contiguous()), "united", ranking
    )
    if renormalize and count < top_k:
        plain.weights /= weights.sum(1, keepdim=True)
    assert torch.equal(result.slots[:, :count], plain.slots) and (result.slots[:, count:] == -1).all()
    torch.testing.assert_close(result.weights[:, :count], plain.weights)
    assert torch.equal(result.replaced[: case.num_tokens], plain.replaced[: case.num_tokens] + top_k - count)


def test_united_top_k_halves_the_assignments_by_and_by() -> None:
    for theta, count in ((1.0, 4), (0.75, 4), (0.74, 3), (0.4, 3), (0.25, 3), (0.24, 2), (0.0, 2)):
        routing = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0.4, 0.3, 0.2, 0.1]])
        tables = (torch.arange(4), torch.tensor([theta, 0.0, 1.0, 1.0]), torch.zeros(1, dtype=torch.int8))
        for kernels in (reference, cpu):
            slots, weights = kernels.remap_experts(
                *routing, *tables, united_slots=4 + torch.arange(4), mechanism="united_top_k", renormalize=True
            )
            assert slots.tolist() == [[0, 1, 2, 3][:count] + [-1] * (4 - count)], "each alone in its group: it stays"
            assert weights[0, :count].sum() == pytest.approx(1.0)
