"""Norms, rotation, KV store and router against the reference, at sizes that are no powers of 2."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need Triton's compiler")

from backend.kernels import gpu, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (3, 2, 16)])
def test_rms_norm(run, assert_near, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[-1]).to(dtype)
    out, after = run(gpu.rms_norm, x, weight, 1e-5)
    assert_near(out, reference.rms_norm(x.double(), weight.double(), 1e-5))
    assert out.shape == shape and torch.equal(after[0], x)


def test_rms_norm_of_some_heads_of_a_fused_tensor(run, assert_near) -> None:
    torch.manual_seed(0)
    fused, weight = torch.randn(4, 7, 6), torch.rand(6)
    out, _ = run(lambda fused, weight: gpu.rms_norm(fused[:, 2:5], weight, 1e-5), fused, weight)
    assert_near(out, reference.rms_norm(fused[:, 2:5], weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_updates_the_residual(run, assert_near, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((5, 24), (5, 24), (24,)))
    out, after = run(gpu.add_rms_norm, x, residual, weight, 1e-6)
    total = x.double() + residual.double()
    assert_near(after[1], total)
    assert_near(out, reference.rms_norm(total, weight.double(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_rotates_only_the_given_heads(run, assert_near, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    fused, angles = torch.randn(3, 5, 12).to(dtype), torch.randn(3, 6)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    _, after = run(lambda fused, *angles: gpu.apply_rope(fused[:, :4], *angles), fused, cos, sin)
    expected = fused.double()
    reference.apply_rope(expected[:, :4], cos.double(), sin.double())
    assert_near(after[0], expected)
    assert torch.equal(after[0][:, 4], fused[:, 4])


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16])
def test_store_kv_writes_only_the_named_places(run, cache_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, slots = torch.randn(3, 7, 5), torch.tensor([11, 4, 7])
    caches = [torch.zeros(3, 4, 3, 5, dtype=cache_dtype) for _ in range(4)]
    _, after = run(lambda heads, *rest: gpu.store_kv(heads[:, 1:4], heads[:, 4:], *rest), heads, *caches[:2], slots)
    reference.store_kv(heads[:, 1:4], heads[:, 4:], *caches[2:], slots)
    for actual, expected in zip(after[1:3], caches[2:], strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim", "dtype"),
    [(4, 4, 8, torch.float32), (6, 2, 12, torch.bfloat16), (5, 1, 6, torch.float16)],
)
def test_rotate_and_store(run, assert_near, q_heads, kv_heads, head_dim, dtype, normalise) -> None:
    torch.manual_seed(0)
    heads = torch.randn(3, q_heads + 2 * kv_heads, head_dim).to(dtype)
    angles, slots = torch.randn(3, head_dim // 2), torch.tensor([5, 2, 8])
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    caches = [torch.zeros(3, 3, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    norms = [torch.rand(head_dim).to(dtype) for _ in range(2)] if normalise else [None, None]
    _, after = run(gpu.rotate_and_store, heads, cos, sin, *caches, slots, *norms, 1e-5)
    expected = [x.double() for x in (heads, cos, sin, *caches)]
    wide_norms = [norm if norm is None else norm.double() for norm in norms]
    reference.rotate_and_store(*expected, slots, *wide_norms, 1e-5)
    assert_near(after[0][:, :q_heads], expected[0][:, :q_heads])
    for actual, wide in zip(after[3:5], expected[3:], strict=True):
        assert_near(actual, wide)
        assert torch.equal(actual == 0, wide == 0), "only the named places are written"


@pytest.mark.parametrize(("bias", "renormalize"), [(False, True), (True, False)])
@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(1, 1, 1), (1, 7, 3), (37, 60, 4), (3, 5, 5)])
def test_router(run, assert_near, tokens, num_experts, top_k, bias, renormalize) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 16), torch.randn(num_experts, 16)
    skew = torch.randn(num_experts) if bias else None
    (experts, weights), _ = run(gpu.route, hidden, weight, skew, top_k, renormalize)
    expected_experts, expected_weights = reference.route(hidden, weight, skew, top_k, renormalize)
    assert experts.dtype == torch.int64 and torch.equal(experts, expected_experts)
    assert_near(weights, expected_weights)


def test_router_takes_equal_experts_by_index(run) -> None:
    (experts, weights), _ = run(gpu.route, torch.zeros(2, 4), torch.randn(6, 4), None, 3, True)
    assert experts.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_gone_wrong_is_sent_to_experts_that_exist(run) -> None:
    """Tables are read at their places: one beyond the end would end the process, with all requests."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 16), torch.randn(6, 16)
    expected, _ = run(gpu.route, hidden, weight, None, 3, True)
    hidden[1] = float("nan")
    (experts, _), _ = run(gpu.route, hidden, weight, None, 3, True)
    assert int(experts.min()) >= 0 and int(experts.max()) < 6
    assert torch.equal(experts[[0, 2]], expected[0][[0, 2]])
