"""A tiny checkpoint with token ids to calibrate on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.brownout.build import main as build
from tests.models.tiny_checkpoints import build_synthetic_tokenizer, make_checkpoint


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


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory) -> Path:
    """A random model with 8 experts, a tokenizer with a token per byte, united experts 2- and 4-way, and similarities."""
    folder = tmp_path_factory.mktemp("text")
    make_checkpoint(folder, num_experts=8, vocab_size=300, num_hidden_layers=2)
    build_synthetic_tokenizer(300).save_pretrained(folder)
    text = folder / "calibration.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    arguments = ["--way", "2,4", "--group", "coactivation", "--steps", "20", "--rows", "32", "--window", "64"]
    assert build([str(folder), *arguments, "--calibration", str(text)]) == 0
    return folder
