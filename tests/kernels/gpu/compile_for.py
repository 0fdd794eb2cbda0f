"""Compile every kernel that some calls launch for a GPU that is not there.

with CompileOnly(90) as compiled:
    rms_norm(torch.empty(4, 2048, dtype=torch.bfloat16, device="meta"), ...)
print(compiled)
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target. `stack_bytes` per thread are what does not fit into registers."""

    name: str
    architecture: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int


class _NoDevice:
    """A driver that knows its target and launches nothing."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # caches of kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


class CompileOnly:
    """While it is entered, launches compile for compute capability `architecture` (80, 90 …) and do not run."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture
        self._compiled: dict[str, Compiled] = {}

    def __enter__(self) -> list[Compiled]:
        self._run, self.compiled = JITFunction.run, []
        driver.set_active(_NoDevice(self._architecture))

        def run(function, *args, grid, warmup, **kwargs):
            kernel = self._run(function, *args, grid=grid, warmup=True, **kwargs)
            self.compiled.append(self._describe(kernel))

        JITFunction.run = run
        return self.compiled

    def __exit__(self, *exception: object) -> None:
        JITFunction.run = self._run

    def _describe(self, kernel) -> Compiled:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            text = subprocess.run(
                [_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        return Compiled(
            kernel.metadata.name,
            self._architecture,
            usage["REG"],
            usage["STACK"] + usage["LOCAL"],
            kernel.metadata.shared,
            kernel.metadata.num_warps,
        )
