"""Pinned copies, with ordinary memory in place of pinned memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from backend.kernels import transfer


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is allocated; a piece is 64 bytes."""
    made: list[Tensor] = []

    def host_buffer(shape, dtype) -> Tensor:
        made.append(torch.empty(shape, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(transfer, "host_buffer", host_buffer)
    monkeypatch.setattr(transfer, "_PINNED_BYTES", 64)
    return made


def test_pinned_copies_are_packed_and_equal(pieces: list[Tensor]) -> None:
    tensors = {str(i): torch.randn(2 + i % 2, 3) for i in range(10)}
    copies = transfer.pinned(tensors, torch.bfloat16)
    assert list(copies) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(copies[name], tensor.bfloat16()) and copies[name].is_contiguous()
    assert [piece.nbytes for piece in pieces[:-1]] == [64] * (len(pieces) - 1) and pieces[-1].nbytes <= 64
    assert len(pieces) == 3, "150 bytes, of which each piece holds whole tensors"
    places = sorted((copy.data_ptr(), copy.nbytes) for copy in copies.values())
    assert all(begin + size <= following for (begin, size), (following, _) in itertools.pairwise(places))


def test_a_tensor_larger_than_a_piece_has_one_of_its_own(pieces: list[Tensor]) -> None:
    large = torch.randn(5, 20)
    assert torch.equal(transfer.pinned({"a": large, "b": torch.ones(2)}, torch.float32)["a"], large)
    assert [piece.numel() for piece in pieces] == [100, 2]


def test_nothing_to_pin_is_nothing(pieces: list[Tensor]) -> None:
    assert transfer.pinned({}, torch.float32) == {} and pieces == []
