"""A launch's private directory (BROWNOUT_RUNTIME_DIR) and the name its shared memory goes by; both go when it ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

_PREFIX = "brownout-run-"
_LOCK = "launcher.lock"
_SHM = Path("/dev/shm")
#: Unix sockets live in the directory and their path has about 107 bytes; a longer temporary directory is not used.
_MAX_PARENT_BYTES = 48
#: A younger directory may belong to a launcher that has not locked it yet.
_STALE_AFTER_S = 10.0


class Workspace:
    """Made with mode 0700 and locked while the launcher lives; leftovers of killed launchers are swept on the way."""

    def __init__(self) -> None:
        parent = tempfile.gettempdir()
        if len(os.fsencode(parent)) > _MAX_PARENT_BYTES:
            parent = "/tmp"
        _sweep(Path(parent))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = open(self.path / _LOCK, "w")  # noqa: SIM115 - held until remove()
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    @property
    def name(self) -> str:
        """Unique on this machine: the prefix of the launch's shared memory and the server's id."""
        return self.path.name

    def clear(self) -> None:
        """Remove what one run of the server left, before the next one starts."""
        for entry in self.path.iterdir():
            if entry.name == _LOCK:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        _remove_shared_memory(self.name)

    def remove(self) -> None:
        _remove_shared_memory(self.name)
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _sweep(parent: Path) -> None:
    """Remove the leftovers of launchers that were killed: directories whose lock nobody holds."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            if time.time() - lock.stat().st_mtime < _STALE_AFTER_S:
                continue
            with open(lock, "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_shared_memory(lock.parent.name)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:
            continue  # it is in use, another user's, or gone already


def _remove_shared_memory(name: str) -> None:
    for region in _SHM.glob(f"{name}*"):
        region.unlink(missing_ok=True)
