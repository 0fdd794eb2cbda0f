"""What binds files made for a checkpoint to it: united experts, similarities, profiles, predictors."""

from __future__ import annotations

import hashlib
from pathlib import Path

from backend.errors import ConfigError

#: Bytes read from both ends of every weight file: headers, and enough weights to tell models apart.
_SAMPLE_BYTES = 1 << 20


def checkpoint_fingerprint(folder: Path) -> str:
    """Hex digest of a checkpoint's configuration and of samples of its weight files; raises ConfigError if there are none."""
    digest = hashlib.sha256()
    files = [folder / "config.json", *sorted(folder.glob("model*.safetensors"))]
    if len(files) < 2:
        raise ConfigError(f"checkpoint {folder} has no model*.safetensors")
    try:
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE_BYTES))
                file.seek(max(0, size - _SAMPLE_BYTES))
                digest.update(file.read())
    except OSError as error:
        raise ConfigError(f"checkpoint file {error.filename} cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:32]
