"""Kernel tests run on every implementation that works without a GPU."""

from types import ModuleType

import pytest

from backend.kernels import cpu, reference


@pytest.fixture(params=[reference, cpu], ids=["reference", "cpu"])
def kernels(request) -> ModuleType:
    return request.param
