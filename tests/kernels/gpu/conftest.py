"""GPU kernels in Triton's interpreter on CPU tensors; the same tests on a GPU, alone and in a CUDA graph, with `-m gpu`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


class Run:
    """Calls a function where kernels are under test: in the interpreter, on a GPU, or by replaying a captured CUDA graph."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.device = torch.device("cpu" if where == "interpreter" else "cuda")

    @torch.inference_mode()  # as in the engine: graphs of both kinds of tensors do not get along in one process
    def __call__(self, function: Callable, *args: object, **options: object) -> tuple:
        """Returns what the function returns and its positional arguments afterwards, tensors on the CPU."""
        static, result = _map(lambda x: x.to(self.device, copy=True), args), None
        options = _map(lambda x: x.to(self.device, copy=True), options)
        if self.where == "graph":
            function(*_map(Tensor.clone, static), **options)  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = function(*static, **options)
            graph.replay()
        else:
            result = function(*static, **options)
        return _map(Tensor.cpu, result), _map(Tensor.cpu, static)


def _map(change: Callable[[Tensor], Tensor], value):
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map(change, item) for item in value)
    if isinstance(value, dict):
        return {key: _map(change, item) for key, item in value.items()}
    return value


@pytest.fixture(
    params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("graph", marks=pytest.mark.gpu)]
)
def run(request) -> Run:
    if request.param == "interpreter" and torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are compiled for it: run these tests with -m gpu")
    return Run(request.param)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """The relative error (root mean square) is at most 1e-4 for float32 and 1e-2 for 16-bit types."""
    limit = 1e-4 if actual.dtype == torch.float32 else 1e-2
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
    assert error <= limit, f"relative error {error:.2e}"


@pytest.fixture(name="assert_near")
def assert_near_fixture() -> Callable[[Tensor, Tensor], None]:
    return assert_near


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter leans on a conversion that numpy discourages, at every program."""
    for item in items:
        if "run" in getattr(item, "fixturenames", ()) or item.path.name == "test_model.py":
            item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"))
