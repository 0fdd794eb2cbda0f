"""What every test module shares."""

import os

import pytest
from hypothesis import settings

# Before torch is imported: test processes share few cores, and OpenMP threads that spin hold each other up.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# Before anything imports Triton: without a GPU its kernels are tested in the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# How long an example takes says something about the machine's load only.
settings.register_profile("suite", deadline=None, max_examples=60)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where torch sees no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))
