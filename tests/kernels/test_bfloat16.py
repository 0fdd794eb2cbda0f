"""Dot products by the processor's bfloat16 instruction."""

import numpy as np
import pytest
import torch

from backend.kernels.cpu import bfloat16
from backend.kernels.cpu.compiled import as_array, kernel

needs_instruction = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no AVX-512 BF16"
)


@kernel
def _narrow_all(values):
    out = np.empty(values.shape[0], np.uint16)
    for i in range(values.shape[0]):
        out[i] = bfloat16.narrow(values[i])
    return out


def test_narrowing_rounds_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[values.isfinite()]
    found = torch.from_numpy(_narrow_all(values.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found, values.to(torch.bfloat16))


@needs_instruction
@pytest.mark.parametrize("length", [32, 64, 352])
@pytest.mark.parametrize(("begin", "end"), [(0, 0), (0, 1), (2, 5), (1, 9), (0, 15), (3, 20)])
def test_two_rows_against_a_range_of_rows(length, begin, end):
    generator = torch.Generator().manual_seed(length + end)
    v, w, x = (torch.randn(*size, length, generator=generator).bfloat16() for size in ((), (), (20,)))
    a, b = np.full(20, np.nan, np.float32), np.full(20, np.nan, np.float32)
    bfloat16.two_bfloat16_rows(as_array(v), as_array(w), as_array(x), begin, end, a, b)
    for found, row in ((a, v), (b, w)):
        expected = x[begin:end].double() @ row.double()
        torch.testing.assert_close(torch.from_numpy(found[: end - begin]).double(), expected, rtol=1e-5, atol=1e-4)
        assert np.isnan(found[end - begin :]).all()
