"""Time of day that a test can set: Python imports this at start-up where this folder is on PYTHONPATH.

The file that TEST_CLOCK names holds the seconds by which it is off, as a double. Each process that goes by it leaves a file
with its number beside that one.
"""

import mmap
import os
import struct
import time
from pathlib import Path


def _follow(path: Path) -> None:
    with open(path, "rb") as file:
        offset = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + struct.unpack("d", offset[:8])[0]
    time.time_ns = lambda: real_ns() + int(struct.unpack("d", offset[:8])[0] * 1e9)
    path.with_name(f"{path.name}.{os.getpid()}").touch()


if "TEST_CLOCK" in os.environ:
    _follow(Path(os.environ["TEST_CLOCK"]))
