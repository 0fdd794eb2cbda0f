"""The GPU kernels on CPU tensors in Triton's interpreter: to see without a GPU that a benchmark runs to its end.

Its times say nothing about any device.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch

from backend.engine.model_runner import resolve_device
from backend.errors import ConfigError

#: Name of the device in options.
INTERPRETER = "interpreter"
_active = False


def interpreting() -> bool:
    """Whether the kernels in use are those of GPUs, interpreted."""
    return _active


@contextlib.contextmanager
def kernels_on(device: str) -> Iterator[torch.device]:
    """The device of that name; for `interpreter` the CPU, whose kernels are those of GPUs meanwhile. Raises ConfigError."""
    global _active
    if device != INTERPRETER:
        yield resolve_device(device)
        return
    if "backend.kernels.gpu" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    from backend.kernels import gpu
    from backend.kernels.gpu.common import INTERPRETED

    if not INTERPRETED:
        raise ConfigError("device interpreter: Triton has been imported as a compiler; set TRITON_INTERPRET=1 before")
    _active = True
    try:
        with patch("backend.kernels._device_kernels", lambda _: gpu):
            yield torch.device("cpu")
    finally:
        _active = False
