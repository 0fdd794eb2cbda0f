"""An engine process that cannot start says why, and whether another start could help."""

from __future__ import annotations

import io
import signal
import types
from pathlib import Path

import pytest

from backend.errors import ConfigError, UnreachableError
from backend.serving import engine_process
from backend.serving.protocol import EXIT_CONFIG, EngineRecord


@pytest.mark.parametrize(("kind", "status"), [(ConfigError, EXIT_CONFIG), (UnreachableError, 1)])
def test_only_what_may_come_back_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[ConfigError], status: int
) -> None:
    """The supervisor gives an engine up that ends with EXIT_CONFIG, and starts one again that was ready and ends with 1."""

    def fail(*_: object) -> None:
        raise kind("the cluster is not there")

    monkeypatch.setattr(engine_process, "Engine", fail)
    monkeypatch.setattr(engine_process, "signal", types.SimpleNamespace(**{**vars(signal), "signal": lambda *_: None}))
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b'{"checkpoint": "dummy:tiny"}')))
    found = engine_process.main(
        ["--runtime-dir", str(tmp_path), "--index", "0", "--generation", "2", "--server-pid", "1"]
    )
    record = EngineRecord.read(tmp_path, 0)
    assert (found, record.error) == (status, "the cluster is not there")
