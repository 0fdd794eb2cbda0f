"""A tiny checkpoint with token ids to calibrate on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.tiny_checkpoints import make_checkpoint


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random model of three layers with 8 experts, 2 per token, without a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, num_experts=8)
    return folder


@pytest.fixture(scope="session")
def calibration(tmp_path_factory) -> Path:
    """3000 random token ids."""
    path = tmp_path_factory.mktemp("calibration") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 199, 3000, dtype=np.uint16))
    return path
