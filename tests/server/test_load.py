"""Loads against a real server: the records add up and agree with its counters, a stall shows in every latency in it, and
Locust sends the same open-loop load over every interface.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from backend.serving.launch_client import RunningServer
from backend.serving.triton_server import PRODUCT_ROOT
from loadtest.bench.streams import STREAMS
from loadtest.clients import Clients
from loadtest.load_spec import build_schedule
from loadtest.open_loop import send_open_loop
from loadtest.record import RequestRecord, read_records
from loadtest.run import main
from loadtest.schedule import Arrival
from tests.server.observe import engine_process, read_metric, wait_idle
from tests.waiting import wait_until

pytestmark = pytest.mark.server

#: Of the engine, and the requests that are sent ten times a second before, in and after it.
STALL_S, NUMBER = 2.0, 40
ARRIVALS = "step:base=8,duration=3"
LOCUST = [sys.executable, "-m", "locust", "-f", str(PRODUCT_ROOT / "loadtest" / "locustfile.py")]
LOAD = ["--arrivals", ARRIVALS, "--seed", "5", "--input-tokens", "4-12", "--output-tokens", "2-9"]


def outcomes(server: RunningServer) -> Counter:
    return Counter(
        {name: read_metric(server, "moe_requests_total", outcome=name) for name in ("completed", "rejected", "failed")}
    )


def test_records_add_up_and_agree_with_the_servers_counters(server: RunningServer, tmp_path: Path) -> None:
    wait_idle(server)
    before = outcomes(server)
    runs = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.jsonl"
        arguments = ["--http", server.http, "--grpc", server.grpc, "--metrics", server.metrics, "--record", str(path)]
        # Status 1 is an invalid run: the generator may well be late on a machine that is busy with tests.
        assert main([*arguments, *LOAD, "--never-share", "0.5"]) in (0, 1)
        summary = json.loads(path.with_suffix(".summary.json").read_text())
        runs.append((read_records(path), summary))
        assert path.with_suffix(".telemetry.jsonl").stat().st_size > 0
    for records, summary in runs:
        counts = Counter(record.outcome for record in records)
        result = summary["result"]
        assert result["requests"] == len(records) == counts["completed"] == result["completed"]
        assert {record.protocol for record in records} == {"http_stream", "grpc_stream"}
        assert {record.brownout for record in records} == {"auto", "never"}
        assert all(2 <= record.output_tokens <= 9 for record in records)
    sent = sum(len(records) for records, _ in runs)
    wait_until(lambda: (outcomes(server) - before)["completed"] >= sent, 5, "counted by the server")
    assert outcomes(server) - before == Counter(completed=sent)
    # One seed: the same requests at the same intended times, and so the same answers.
    (first, first_summary), (second, second_summary) = runs
    assert first_summary["run"]["arrivals_sha256"] == second_summary["run"]["arrivals_sha256"]
    for a, b in zip(first, second, strict=True):
        shift = first_summary["run"]["started_monotonic_s"] - second_summary["run"]["started_monotonic_s"]
        assert a.intended_start_s == pytest.approx(b.intended_start_s + shift, abs=1e-6)
        assert (a.id, a.text, a.input_tokens, a.output_tokens) == (b.id, b.text, b.input_tokens, b.output_tokens)


def test_refused_and_failed_requests_add_up_too(small_server: RunningServer) -> None:
    """Two run, three may wait, all for far longer than it takes to send them; every fourth gives up soon, which to its client
    is a failure.
    """

    def counters() -> Counter:
        names = ("completed", "rejected", "timeout")
        return Counter({name: int(read_metric(small_server, "moe_requests_total", outcome=name)) for name in names})

    async def load() -> list[RequestRecord]:
        async with Clients(small_server.http, small_server.grpc) as clients:

            def send(number: int, arrival: Arrival, intended_s: float):
                sampling = {"max_tokens": arrival.output_tokens, "ignore_eos": True}
                if number % 4 == 3:
                    sampling["timeout_s"] = 0.05
                ask = clients.http_stream if number % 2 else clients.grpc_stream
                return ask(number, f"request {number}", sampling, intended_s)

            return await send_open_loop([(n, Arrival(0.01 * n, 4, 600)) for n in range(16)], send)

    before = counters()
    counts = Counter(record.outcome for record in asyncio.run(load()))
    assert counts.total() == 16 and min(counts[name] for name in ("completed", "rejected", "failed")) > 0, counts
    expected = Counter(completed=counts["completed"], rejected=counts["rejected"], timeout=counts["failed"])
    wait_until(lambda: (counters() - before).total() >= 16, 5, "counted by the server")
    assert counters() - before == expected


def test_a_stall_shows_in_the_latency_of_every_request_in_it(server: RunningServer) -> None:
    """A closed loop would send nothing during the stall and report one slow request."""
    engine = engine_process(server)
    stalled: dict[str, float] = {}

    def stall() -> None:
        engine.send_signal(signal.SIGSTOP)
        stalled["from"] = time.monotonic()
        time.sleep(STALL_S)
        stalled["until"] = time.monotonic()
        engine.send_signal(signal.SIGCONT)

    async def load() -> list[RequestRecord]:
        async with Clients(server.http, server.grpc) as clients:

            def send(number: int, arrival: Arrival, intended_s: float):
                sampling = {"max_tokens": arrival.output_tokens, "ignore_eos": True}
                return clients.http_stream(number, f"request {number}", sampling, intended_s)

            arrivals = [(number, Arrival(0.1 * number, 4, 2)) for number in range(NUMBER)]
            timer = threading.Timer(0.7, stall)
            timer.start()
            records = await send_open_loop(arrivals, send)
            timer.join()
            return records

    records = asyncio.run(load())
    assert [record.outcome for record in records] == ["completed"] * NUMBER
    caught = [r for r in records if stalled["from"] < r.intended_start_s < stalled["until"]]
    assert sum(r.start_s < stalled["until"] for r in caught) >= 10 * STALL_S - 4
    for record in caught:
        assert record.ttft_s > stalled["until"] - record.intended_start_s


def locust_command(server: RunningServer, path: Path, *options: str) -> list[str]:
    command = [*LOCUST, "--headless", "--host", f"http://{server.http}", "--grpc", server.grpc]
    return [*command, "--record", str(path), "--only-summary", *options]


def run_locust(command: list[str], folder: Path) -> None:
    """Status 1 is an invalid run: see above."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stdout + done.stderr


def test_locust_sends_the_schedule_over_every_interface(server: RunningServer, tmp_path: Path) -> None:
    """And its tables have an entry for every first token and every token after it."""
    path, table = tmp_path / "locust.jsonl", tmp_path / "table"
    run_locust(locust_command(server, path, *LOAD, "--csv", str(table), "--exit-code-on-error", "3"), tmp_path)
    records = read_records(path)
    assert [record.id for record in records] == list(range(len(records))) and len(records) > 20
    assert [record.error for record in records if record.outcome != "completed"] == []
    by_protocol = Counter(record.protocol for record in records)
    assert set(by_protocol) == {"http_stream", "grpc_stream", "http_infer"}
    lines = [line.split(",") for line in Path(f"{table}_stats.csv").read_text().splitlines()]
    counts = {(line[0], line[1]): int(line[2]) for line in lines[1:]}
    for protocol, number in by_protocol.items():
        tokens = sum(record.output_tokens for record in records if record.protocol == protocol)
        assert counts[protocol, "request"] == number
        if protocol != "http_infer":
            assert counts[protocol, "first token"] == number
            firsts = sum(record.responses[0][1] for record in records if record.protocol == protocol)
            assert counts[protocol, "between tokens"] == tokens - firsts


def test_locust_splits_the_schedule_between_workers(server: RunningServer, tmp_path: Path) -> None:
    """Together they send what one sender would, at the same intended times; of the server they know from the master."""
    load = ["--arrivals", "poisson:rate=15,duration=2", "--input-tokens", "4", "--output-tokens", "2"]
    port = str(free_port())
    path = tmp_path / "locust.jsonl"
    options = ["--master", "--master-bind-port", port, "--expect-workers", "2", "GrpcStreamUser", "HttpStreamUser"]
    worker = [*LOCUST, "--worker", "--master-port", port, "GrpcStreamUser", "HttpStreamUser"]
    workers = [
        subprocess.Popen(worker, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)
    ]
    try:
        run_locust(locust_command(server, path, *load, *options), tmp_path)
        assert [process.wait(20) for process in workers] == [0, 0]
    finally:
        for process in workers:
            process.kill()
    start_s = json.loads(path.with_suffix(".summary.json").read_text())["run"]["started_monotonic_s"]
    planned = build_schedule(load[1], input_tokens="4", output_tokens="2").arrivals
    records = read_records(path)
    assert [record.outcome for record in records] == ["completed"] * len(planned)
    for record, arrival in zip(records, planned, strict=True):
        # The workers' clocks are set by the wall clock, which is the same one here.
        assert record.intended_start_s - start_s == pytest.approx(arrival.at_s, abs=1e-3)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_locust_test_that_is_ended_early_writes_what_was_sent(server: RunningServer, tmp_path: Path) -> None:
    """And marks the run invalid: nobody shall take it for a whole one."""
    path, log = tmp_path / "locust.jsonl", tmp_path / "log"
    load = ["--arrivals", "poisson:rate=10,duration=60", "--output-tokens", "900", "--input-tokens", "4"]
    command = locust_command(server, path, *load, "GrpcStreamUser")
    with log.open("w") as file:
        locust = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: read_metric(server, "moe_requests_running") > 0, 60, "running")
        locust.send_signal(signal.SIGTERM)
        locust.wait(60)
    finally:
        locust.kill()
    records = read_records(path)
    assert 0 < len(records) < 600
    assert {record.outcome for record in records} <= {"completed", "failed"}
    assert all("stopped before" in record.error for record in records if record.outcome == "failed")
    assert json.loads(path.with_suffix(".summary.json").read_text())["valid"] is False
    wait_idle(server)


@pytest.mark.parametrize("protocol", sorted(STREAMS))
def test_the_benchmarks_streams_bring_every_token_or_say_why_not(server: RunningServer, protocol: str) -> None:
    prompts = [[5, 6, 7], [8, 9]]
    assert asyncio.run(STREAMS[protocol](server, prompts, 4)) > 0
    with pytest.raises(Exception, match="input_ids must be"):
        asyncio.run(STREAMS[protocol](server, [[5, 10**6]], 4))
