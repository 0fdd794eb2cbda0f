"""Divergence is that of whole distributions, token by token, whatever the order in which sequences are computed."""

import numpy as np
import pytest
import torch

from backend.brownout.divergence import Divergence
from backend.errors import ConfigError


def test_passes_are_compared_with_the_first_one():
    generator = torch.Generator().manual_seed(0)
    full, dimmed = (torch.randn(5, 11, generator=generator) * 3 for _ in range(2))
    owners = [0, 1, 1, 0, 1]
    divergence = Divergence([2, 3], 11)
    divergence.observe(owners[:3], full[:3])
    divergence.observe(owners[3:], full[3:])
    assert divergence.finish().tolist() == [0, 0]
    divergence.observe(owners, dimmed)
    p, q = full.log_softmax(1), dimmed.log_softmax(1)
    by_token = (p.exp() * (p - q)).sum(1).numpy()
    wanted = [by_token[[0, 3]].sum(), by_token[[1, 2, 4]].sum()]
    np.testing.assert_allclose(divergence.finish(), wanted, rtol=2e-3)
    divergence.observe(owners, full)
    assert divergence.finish() == pytest.approx([0, 0], abs=1e-3)


def test_too_much_text_is_refused_before_it_is_kept():
    with pytest.raises(ConfigError, match="fewer --text-tokens"):
        Divergence([10**12], 1000)
