"""Groups: full, at most `way` each, and related experts together."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.brownout.grouping import coactivation, group_by_affinity, group_by_index


@settings(max_examples=15)
@given(st.integers(2, 20), st.integers(2, 8), st.integers(0, 1000))
def test_there_are_as_few_groups_as_possible_and_none_is_too_large(experts, way, seed):
    noise = torch.rand(experts, experts, generator=torch.Generator().manual_seed(seed))
    for groups in (group_by_affinity(noise + noise.T, way), group_by_index(experts, way)):
        sizes = torch.bincount(groups)
        assert len(groups) == experts and len(sizes) == -(-experts // way)
        assert sizes.min() >= 1 and sizes.max() <= way


def test_planted_groups_are_found():
    planted = torch.randperm(24, generator=torch.Generator().manual_seed(1)) % 6
    affinity = (planted.unsqueeze(1) == planted).float() + 0.3 * torch.rand(24, 24)
    groups = group_by_affinity((affinity + affinity.T) / 2, 4)
    assert torch.equal(groups.unsqueeze(1) == groups, planted.unsqueeze(1) == planted)


def test_coactivation_counts_the_tokens_that_chose_both():
    counts = coactivation(torch.tensor([[0, 1], [1, 0], [1, 2]]), 3)
    assert counts.tolist() == [[0, 2, 0], [2, 0, 1], [0, 1, 0]]
