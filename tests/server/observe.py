"""What tests look at besides answers: the server's metrics, its processes, and whether something comes true in time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from backend.serving.launch_client import RunningServer
from tests.server.talk import get


def read_families(server: RunningServer) -> dict:
    """The metric families of this product by name (prometheus_client's, without a counter's `_total`)."""
    _, text = get(server.metrics, "/metrics")
    return {f.name: f for f in text_string_to_metric_families(text) if f.name.startswith("moe_")}


def read_metric(server: RunningServer, name: str, **labels: str) -> float:
    """Sum of a metric's samples with these labels over all models, 0 if there is none."""
    samples = [sample for family in read_families(server).values() for sample in family.samples]
    return sum(
        sample.value for sample in samples if sample.name == name and labels.items() <= dict(sample.labels).items()
    )


def wait_idle(server: RunningServer) -> None:
    """Until the metrics say that no request is left and every KV block is free."""
    names = ("moe_requests_running", "moe_requests_waiting", "moe_kv_cache_usage_ratio")
    deadline = time.monotonic() + 15
    while True:
        samples = [sample for family in read_families(server).values() for sample in family.samples]
        busy = {(s.name, s.labels["model"]): s.value for s in samples if s.name in names}
        if busy and not any(busy.values()):
            return
        assert time.monotonic() < deadline, f"not idle after 15 s: {busy}"
        time.sleep(0.05)


def descendants(server: RunningServer) -> list[psutil.Process]:
    """The server, its stubs and engines: everything below the launcher."""
    return psutil.Process(server.pid).children(recursive=True)


def engine_process(server: RunningServer) -> psutil.Process:
    engines = engine_processes(server)
    assert len(engines) == 1, engines
    return engines[0]


def engine_processes(server: RunningServer) -> list[psutil.Process]:
    return [process for process in descendants(server) if "backend.serving.engine_process" in command_of(process)]


def stub_process(server: RunningServer, model: str) -> psutil.Process:
    """The stub that serves a model, by the mark it leaves in the runtime directory."""
    marks = [json.loads(path.read_bytes()) for path in runtime_dir(server).glob("stub-*.json")]
    (pid,) = [mark["pid"] for mark in marks if mark["model"] == model]
    return psutil.Process(pid)


def resident_bytes(server: RunningServer) -> dict[str, int]:
    """Memory of the stubs and of the engines."""
    stubs = [p for p in descendants(server) if "triton_python_backend_stub" in " ".join(command_of(p))]
    parts = {"stubs": stubs, "engines": engine_processes(server)}
    return {name: sum(process.memory_info().rss for process in part) for name, part in parts.items()}


def launch_name(server: RunningServer) -> str:
    """What this launch's runtime directory and shared memory are called; the server's id."""
    return json.loads(get(server.http, "/v2")[1])["name"]


def runtime_dir(server: RunningServer) -> Path:
    return Path(engine_processes(server)[0].environ()["BROWNOUT_RUNTIME_DIR"])


def command_of(process: psutil.Process) -> list[str]:
    """Its command line; empty if it has ended."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
