"""NVIDIA's perf_analyzer measures the streaming model over gRPC; skipped only where its binary cannot be had."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from backend.serving.launch_client import RunningServer
from loadtest.perf_analyzer import PerfAnalyzerUnavailable, find_or_fetch
from tests.server.observe import read_metric
from tests.server.talk import sampling
from tests.waiting import wait_until

pytestmark = pytest.mark.server


def test_perf_analyzer_measures_streams(server: RunningServer, tmp_path: Path) -> None:
    try:
        binary, env = find_or_fetch()
    except PerfAnalyzerUnavailable as reason:
        pytest.skip(str(reason))
    parameters = sampling(max_tokens=16)
    data = [
        {"text_input": [text], "stream": [True], "sampling_parameters": [parameters]} for text in ("Hello", "A tale")
    ]
    inputs = tmp_path / "inputs.json"
    inputs.write_text(json.dumps({"data": data}))
    completed = read_metric(server, "moe_requests_total", outcome="completed")
    command = [binary, "-m", "moe_llm", "-u", server.grpc, "-i", "grpc", "--streaming", "--async"]
    command += ["--input-data", str(inputs), "--concurrency-range", "4"]
    command += ["--measurement-mode", "count_windows", "--measurement-request-count", "20", "--max-trials", "3"]
    command += ["--stability-percentage", "999"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(re.search(r"Throughput: ([0-9.]+) infer/sec", done.stdout)[1]) > 0
    assert float(re.search(r"Response Throughput: ([0-9.]+) infer/sec", done.stdout)[1]) > 0
    wait_until(
        lambda: read_metric(server, "moe_requests_total", outcome="completed") >= completed + 20,
        5,
        "20 requests counted",
    )
