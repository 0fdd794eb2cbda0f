"""Linear layers, norms and rotary embedding against their definitions."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from backend.errors import ConfigError
from backend.kernels import check_attention, cpu, kernels_for, reference
from backend.kernels.reference import apply_rope


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 6, 40, 63, 64, 130])
def test_linear_is_the_same_for_every_number_of_rows(kernels: ModuleType, rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    x, weight, b = torch.randn(rows, 19), torch.randn(23, 19), torch.randn(23) if bias else None
    expected = (x.double() @ weight.double().T + (0 if b is None else b.double())).float()
    torch.testing.assert_close(kernels.linear(x, weight, b), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_products_meet_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each that it meets the library keeps code."""
    met, product = set(), torch.mm
    monkeypatch.setattr(sys.modules["backend.kernels.cpu.linear"], "_has_bfloat16_units", lambda: True)
    monkeypatch.setattr(torch, "mm", lambda x, y: met.add(len(x)) or product(x, y))
    weight = torch.randn(24, 16).bfloat16()
    for rows in (49, 64, 65, 96, 97, 120, 128, 200, 224):
        x = torch.randn(rows, 16)
        out = cpu.linear(x, weight)
        torch.testing.assert_close(out, x.bfloat16().float() @ weight.float().t(), rtol=1e-2, atol=1e-2)
    assert met == {64, 96, 128, 224}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 50, 120])
def test_linear_widens_sixteen_bit_weights_in_pieces(kernels: ModuleType, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 700), torch.randn(1600, 700).to(dtype)
    out = kernels.linear(x, weight)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x @ weight.float().T, rtol=0.02, atol=0.6)
    if rows > 2 and not torch.cpu._is_avx512_bf16_supported():
        torch.testing.assert_close(out, x @ weight.float().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 17, 130])
@pytest.mark.parametrize(("hidden", "size"), [(19, 7), (64, 96)])
def test_gated_mlp_is_its_definition(
    kernels: ModuleType, hidden: int, size: int, rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(rows)
    x, w13, w2 = torch.randn(rows, hidden), torch.randn(2 * size, hidden) / 4, torch.randn(hidden, size) / 4
    w13, w2 = w13.to(dtype), w2.to(dtype)
    gate, up = (x.double() @ w13.double().T).chunk(2, dim=1)
    expected = (torch.nn.functional.silu(gate) * up) @ w2.double().T
    found = kernels.gated_mlp(x, w13, w2)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < (8e-3 if dtype == torch.bfloat16 else 1e-5) * expected.norm()


@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (4, 3, 16), (300, 256)])
def test_rms_norm_is_its_definition(kernels: ModuleType, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.rand(shape[-1])
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), expected)


@pytest.mark.parametrize("rows", [5, 9000])
def test_add_rms_norm_updates_the_residual_and_norms_the_sum(kernels: ModuleType, rows: int) -> None:
    x, residual, weight = torch.randn(rows, 8), torch.randn(rows, 8), torch.rand(8)
    total = x + residual
    out = kernels.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    torch.testing.assert_close(out, kernels.rms_norm(total, weight, 1e-6))


def test_rope_rotates_each_pair_in_place_and_only_the_given_heads() -> None:
    fused = torch.randn(3, 5, 8)
    before, angles = fused.clone(), torch.randn(3, 4)
    apply_rope(fused[:, :4], angles.cos(), angles.sin())
    for t in range(3):
        for head in range(4):
            pairs = torch.complex(before[t, head, :4], before[t, head, 4:])
            turned = pairs * torch.polar(torch.ones(4), angles[t])
            torch.testing.assert_close(fused[t, head], torch.cat((turned.real, turned.imag)))
    assert torch.equal(fused[:, 4], before[:, 4])


def test_every_device_has_kernels() -> None:
    assert kernels_for(torch.device("cpu")) is cpu


def test_the_attention_backend_replaces_attention_only() -> None:
    kernels = kernels_for(torch.device("cpu"), "torch")
    assert kernels.decode_attention is reference.decode_attention
    assert kernels.linear is cpu.linear


@pytest.mark.parametrize(
    ("backend", "device", "block_size", "installed", "message"),
    [
        ("triton", "cpu", 16, True, "triton, which needs a CUDA device, but the device is cpu"),
        ("triton", "cuda", 16, False, "the package triton is not installed"),
        ("flash_attn", "cpu", 256, True, "flash_attn, which needs a CUDA device"),
        ("flash_attn", "cuda", 256, False, "the package flash-attn is not installed"),
        ("flash_attn", "cuda", 16, True, "block_size to be a multiple of 256, but it is 16"),
    ],
)
def test_attention_backends_that_cannot_serve_are_named(
    monkeypatch, backend: str, device: str, block_size: int, installed: bool, message: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    with pytest.raises(ConfigError, match=message):
        check_attention(backend, torch.device(device), block_size, "auto")


def test_flash_attention_takes_blocks_of_its_size_and_sixteen_bits(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_attention("flash_attn", torch.device("cuda"), 256, "bfloat16")
    with pytest.raises(ConfigError, match="dtype bfloat16 or float16"):
        check_attention("flash_attn", torch.device("cuda"), 256, "float32")
