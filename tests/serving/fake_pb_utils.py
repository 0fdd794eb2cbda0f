"""The part of Triton's `triton_python_backend_utils` that request parsing sees."""

from __future__ import annotations

import json

import numpy as np


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name = name
        self._array = array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceRequest:
    """A request with input tensors, Triton parameters (a JSON string, as the real one gives) and a timeout in µs."""

    def __init__(self, inputs: list[Tensor], parameters: str = "", timeout_us: int = 0) -> None:
        self._inputs = inputs
        self._parameters = parameters
        self._timeout_us = timeout_us

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def parameters(self) -> str:
        return self._parameters

    def timeout(self) -> int:
        return self._timeout_us


def strings(*values: str | bytes) -> np.ndarray:
    return np.array([v.encode() if isinstance(v, str) else v for v in values], dtype=np.object_)


def request(
    text: str | bytes | None = "Hello",
    *,
    sampling: object = None,
    parameters: dict[str, object] | str = "",
    timeout_us: int = 0,
    **inputs: object,
) -> InferenceRequest:
    """A request: `sampling` becomes sampling_parameters (JSON unless a string), booleans and arrays become tensors."""
    tensors = [] if text is None else [Tensor("text_input", strings(text))]
    if sampling is not None:
        tensors.append(
            Tensor(
                "sampling_parameters", strings(sampling if isinstance(sampling, str | bytes) else json.dumps(sampling))
            )
        )
    for name, value in inputs.items():
        tensors.append(Tensor(name, value if isinstance(value, np.ndarray) else np.array([value])))
    return InferenceRequest(tensors, parameters if isinstance(parameters, str) else json.dumps(parameters), timeout_us)
