"""The control plane and the controller against a real server with two engines."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest
import tritonclient.grpc as grpc

from backend.brownout import block as layout
from backend.serving.launch_client import RunningServer, running_server
from backend.serving.triton_server import PRODUCT_ROOT
from controller.client import BrownoutClient, Held, Refused, Unreachable
from controller.config import EXIT_CONFIG
from tests.server.conftest import TINY
from tests.server.observe import descendants, engine_processes, read_metric
from tests.server.talk import HttpStream, ServerError, generate, get, grpc_infer, post, sampling
from tests.waiting import wait_until

pytestmark = pytest.mark.server

TOKEN = "for-tests"
SHED_TTFT_S = 3
#: These tests are not about how soon the model answers on two cores that another test process uses, too.
PATIENCE_S = 20.0
TWO_ENGINES = TINY | {
    "MOE_LLM_DEVICE": "cpu,cpu:0",
    "MOE_LLM_MAX_RUNNING": "2",
    "MOE_LLM_SHED_TTFT_S": str(SHED_TTFT_S),
    "BROWNOUT_CONTROL_TOKEN": TOKEN,
}
HALF_RESIDENT = TINY | {
    "MOE_LLM_DEVICE": "cpu,cpu:0",
    "BROWNOUT_CONTROL_TOKEN": TOKEN,
    "MOE_LLM_EXPERT_POOL": "resident",
    "MOE_LLM_EXPERT_MISS": "wait",
}
#: Needs no united experts, so that every checkpoint can follow.
DIM = {"threshold_prefill": 0.5, "threshold_decode": 0.25, "mechanism": "drop"}
LONG = {"text_input": "for long", "sampling_parameters": sampling(max_tokens=700)}


class Clock:
    """The time of day of every process that is started with `env`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._code = PRODUCT_ROOT / "tests" / "server" / "skewed_clock"
        self.env = {"TEST_CLOCK": str(path), "PYTHONPATH": str(self._code)}
        self.set(0)

    def repository(self, folder: Path) -> Path:
        """The models, as a stub is to load them: it takes no notice of PYTHONPATH."""
        shutil.copytree(PRODUCT_ROOT / "model_repository", folder, ignore=shutil.ignore_patterns("__pycache__"))
        for file in folder.glob("*/1/model.py"):
            paths = [str(PRODUCT_ROOT), str(self._code)]
            file.write_text(f"import sys\n\nsys.path[:0] = {paths}\nimport sitecustomize\n{file.read_text()}")
        return folder

    def set(self, offset_s: float) -> None:
        """From now on it is so many seconds off."""
        with open(self._path, "r+b" if self._path.exists() else "wb") as file:
            file.write(struct.pack("d", offset_s))

    def followed_by(self, pid: int) -> bool:
        return self._path.with_name(f"{self._path.name}.{pid}").exists()


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    return Clock(tmp_path_factory.mktemp("clock") / "clock")


@pytest.fixture(scope="module")
def controlled(clock: Clock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    models = clock.repository(tmp_path_factory.mktemp("models") / "models")
    with running_server(env=TWO_ENGINES | clock.env, model_repository=models, drain_timeout_s=1) as running:
        yield running


@pytest.fixture
def plane(controlled: RunningServer) -> Iterator[BrownoutClient]:
    client = BrownoutClient(controlled.grpc, TOKEN, timeout_s=PATIENCE_S)
    wait_until(lambda: owner_of(client) is None, 20, "free of leases")
    yield client
    client.close()


def settings_of(client: BrownoutClient) -> dict:
    return client.call()["settings"]


def owner_of(client: BrownoutClient) -> str | None:
    return settings_of(client)["owner"]


def followed(client: BrownoutClient, version: int) -> bool:
    """Whether every engine runs with this version."""
    telemetry = client.call()["telemetry"]
    return len(telemetry) == 2 and all(entry["settings_version"] == version for entry in telemetry)


def mode_in(log: Path) -> str:
    """What the controller that writes this event log is doing."""
    lines = log.read_text().splitlines() if log.exists() else []
    return json.loads(lines[-1])["mode"] if lines else ""


@contextlib.contextmanager
def controller(
    server: RunningServer, *arguments: str, token: str = TOKEN, env: Mapping[str, str] = MappingProxyType({})
) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "controller", "--triton", server.grpc, "--ttft-slo", "0.5", "--itl-slo", "0.1"]
    command += ["--owner", "sidecar", "--mechanism", "drop", "--metrics-port", "0", "--period", "0.1", "--lease", "1"]
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=PRODUCT_ROOT,
        env=os.environ | {"BROWNOUT_CONTROL_TOKEN": token} | env,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_settings_reach_every_engine_between_two_steps_and_end_with_their_lease(
    controlled: RunningServer, plane: BrownoutClient
) -> None:
    streams = [HttpStream(controlled, LONG) for _ in range(2)]
    wait_until(lambda: all(e["requests_running"] for e in plane.call()["telemetry"]), 10, "busy on both engines")
    version = plane.call(**DIM, owner="test", lease_s=2)["settings"]["version"]
    wait_until(lambda: followed(plane, version), 5, "followed")
    for entry in plane.call()["telemetry"]:
        thetas = [tuple(step[3:]) for step in entry["steps"]]
        assert set(thetas) <= {(1.0, 1.0), (0.5, 0.25)}
        assert thetas == sorted(thetas, reverse=True)  # from one step on, and for good
    wait_until(lambda: followed(plane, version + 1), 5, "back at the baseline")
    assert settings_of(plane)["threshold_decode"] == 1.0
    for stream in streams:
        assert sum(1 for _ in stream) > 0
        stream.close()


def test_the_share_of_resident_experts_is_a_setting_like_the_thresholds() -> None:
    with running_server(env=HALF_RESIDENT, drain_timeout_s=1) as server:
        plane = BrownoutClient(server.grpc, TOKEN, timeout_s=PATIENCE_S)
        status = plane.call()
        assert status["available"]["resident_share"] and status["settings"]["resident_share"] == 1
        wait_until(lambda: len(plane.call()["telemetry"]) == 2, 5, "telemetry of both engines")
        assert [entry["resident_share"] for entry in plane.call()["telemetry"]] == [0.5, 0.5]
        with pytest.raises(Refused, match="resident_share must be a number from 0 to 1"):
            plane.call(resident_share=1.5, threshold_prefill=0.5, owner="test")
        version = plane.call(resident_share=0.3, owner="test", lease_s=30)["settings"]["version"]
        wait_until(lambda: followed(plane, version), 5, "followed")
        assert [entry["resident_share"] for entry in plane.call()["telemetry"]] == [0.25, 0.25]
        stalls = sum(entry["expert_stalls"] for entry in plane.call()["telemetry"])
        inputs = {"text_input": "more than there are", "sampling_parameters": sampling(max_tokens=20)}
        with ThreadPoolExecutor(4) as pool:
            assert all(answer.text for answer in pool.map(lambda _: generate(server, inputs), range(4)))
        wait_until(lambda: sum(e["expert_stalls"] for e in plane.call()["telemetry"]) > stalls, 5, "waited for experts")
        with controller(server, "--owner", "test", "--law", "off", "--resident-share", "0.8"):
            wait_until(lambda: settings_of(plane)["resident_share"] == 0.8, 20, "set by the controller")
        wait_until(lambda: settings_of(plane)["resident_share"] == 1, 5, "back at the baseline")
        wait_until(lambda: read_metric(server, "moe_expert_slot_byte_seconds_total") > 0, 5, "counted")
        plane.close()


def test_settings_act_in_the_very_next_step_of_every_engine(controlled: RunningServer, plane: BrownoutClient) -> None:
    """No step after the answer runs with the old ones."""
    wait_until(lambda: not any(e["requests_running"] for e in plane.call()["telemetry"]), 10, "idle")
    before = {entry["engine"]: entry["num_steps"] for entry in plane.call()["telemetry"]}
    plane.call(**DIM, owner="test", lease_s=30)
    streams = [HttpStream(controlled, LONG) for _ in range(2)]
    wait_until(lambda: all(e["num_steps"] > before[e["engine"]] for e in plane.call()["telemetry"]), 10, "stepping")
    for entry in plane.call()["telemetry"]:
        # Of a long time the last steps only; the first one after the change is among them if that was soon enough.
        new = entry["steps"][before[entry["engine"]] - entry["num_steps"] :]
        assert {tuple(step[3:]) for step in new} == {(0.5, 0.25)}
    for stream in streams:
        stream.close()
    plane.call(owner="test", lease_s=0)


def test_changes_need_the_token(controlled: RunningServer, plane: BrownoutClient) -> None:
    stranger = BrownoutClient(controlled.grpc, "guessed", timeout_s=PATIENCE_S)
    with pytest.raises(Refused, match="the token is wrong"):
        stranger.call(threshold_prefill=0.5)
    assert settings_of(stranger)["threshold_prefill"] == 1.0
    status, answer = post(controlled.http, "/v2/models/brownout/generate", {"threshold_prefill": 0.5})
    assert status == 400
    assert "the token is missing" in answer["error"]
    with controller(controlled, token="guessed") as process:
        assert process.wait(30) == EXIT_CONFIG
        assert "the token is wrong" in process.stderr.read()


def test_a_killed_controllers_settings_end_and_another_takes_over(
    controlled: RunningServer, plane: BrownoutClient
) -> None:
    stream = HttpStream(controlled, LONG)
    with controller(controlled) as process:
        wait_until(lambda: owner_of(plane) == "sidecar", 20, "in charge")
        with pytest.raises(Held, match="held by 'sidecar' for another"):
            plane.call(**DIM, owner="test")
        process.kill()
        wait_until(lambda: owner_of(plane) is None, 5, "ended")
    assert plane.call(**DIM, owner="test", lease_s=5)["settings"]["owner"] == "test"
    plane.call(owner="test", lease_s=0)
    assert sum(response.get("text_output") is not None for response in stream) > 0
    stream.close()


def test_of_two_controllers_one_is_in_charge_and_the_other_takes_over(
    controlled: RunningServer, plane: BrownoutClient, tmp_path: Path
) -> None:
    log = tmp_path / "events.jsonl"
    with controller(controlled) as first:
        wait_until(lambda: owner_of(plane) == "sidecar", 20, "in charge")
        with controller(controlled, "--owner", "second", "--log", str(log)):
            wait_until(lambda: mode_in(log) == "standby", 20, "standing by")
            assert owner_of(plane) == "sidecar"
            first.kill()
            wait_until(lambda: owner_of(plane) == "second", 5, "taken over")


def test_a_frozen_engine_is_held_for_then_handed_back_and_taken_up_again(
    controlled: RunningServer, plane: BrownoutClient, tmp_path: Path
) -> None:
    log = tmp_path / "events.jsonl"
    engine = engine_processes(controlled)[0]
    with controller(controlled, "--stale-after", "0.5", "--hand-back-after", "1", "--log", str(log)):
        wait_until(lambda: owner_of(plane) == "sidecar", 20, "in charge")
        engine.suspend()
        try:
            wait_until(lambda: mode_in(log) == "hold", 5, "held")
            assert owner_of(plane) == "sidecar"
            wait_until(lambda: mode_in(log) == "handed_back", 5, "handed back")
            assert owner_of(plane) is None
        finally:
            engine.resume()
        wait_until(lambda: owner_of(plane) == "sidecar", 5, "in charge again")


def test_a_suspended_controller_finds_its_lease_gone_and_starts_from_what_holds(
    controlled: RunningServer, plane: BrownoutClient, tmp_path: Path
) -> None:
    """Whatever it thought of the time, the server's lease decides."""
    log = tmp_path / "events.jsonl"
    with controller(controlled, "--log", str(log)) as process:
        wait_until(lambda: owner_of(plane) == "sidecar", 20, "in charge")
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: owner_of(plane) is None, 5, "ended")
        plane.call(**DIM, owner="test", lease_s=1)
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: mode_in(log) == "standby", 5, "standing by")
        wait_until(lambda: owner_of(plane) == "sidecar", 5, "in charge again")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert max(event["dt_s"] for event in events) <= 0.2 + 1e-9
    assert next(event["resumed"] for event in events if event.get("resumed")) == [1.0, 1.0]


def test_a_clock_that_jumps_changes_nothing(
    controlled: RunningServer, plane: BrownoutClient, clock: Clock, tmp_path: Path
) -> None:
    """Leases, timeouts and the age of telemetry go by monotonic time, in the server as in the controller."""
    log = tmp_path / "events.jsonl"
    patient = {"text_input": "patient", "sampling_parameters": sampling(max_tokens=400, timeout_s=300)}
    arguments = ["--lease", "5", "--stale-after", "5", "--log", str(log)]
    with controller(controlled, *arguments, env=clock.env) as process:
        wait_until(lambda: owner_of(plane) == "sidecar", 20, "in charge")
        engines = [engine.pid for engine in engine_processes(controlled)]
        stubs = [p.pid for p in descendants(controlled) if p.name() == "triton_python_backend_stub"]
        assert len(stubs) == 3
        assert all(map(clock.followed_by, [*engines, *stubs, process.pid]))
        streams = [HttpStream(controlled, patient) for _ in range(4)]
        for offset_s in (3600.0, -86400.0, 0.0):
            clock.set(offset_s)
            until_s = time.monotonic() + 0.5
            while time.monotonic() < until_s:
                status = plane.call()
                assert status["settings"]["owner"] == "sidecar"
                assert 0 < status["settings"]["lease_left_s"] <= 5
                assert all(0 <= status["time_s"] - entry["time_s"] < 5 for entry in status["telemetry"])
        clock.set(-86400.0)
        process.kill()
        wait_until(lambda: owner_of(plane) is None, 10, "ended")
    for stream in streams:
        assert sum(response.get("text_output") is not None for response in stream) > 0
        stream.close()
    assert generate(controlled, {"text_input": "Hi", "sampling_parameters": sampling(max_tokens=3)}).text
    clock.set(0)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    modes = [event["mode"] for event in events]
    assert set(modes[modes.index("control") :]) == {"control"}
    clocks = [event["unix_s"] for event in events]
    assert max(clocks) - min(clocks) > 86400  # the controller's own clock did jump


def test_a_controller_hands_back_when_told_to_end(
    controlled: RunningServer, plane: BrownoutClient, tmp_path: Path
) -> None:
    log = tmp_path / "events.jsonl"
    with controller(controlled, "--lease", "60", "--log", str(log)) as process:
        wait_until(lambda: owner_of(plane) == "sidecar", 20, "in charge")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert owner_of(plane) is None
    modes = [json.loads(line)["mode"] for line in log.read_text().splitlines()]
    assert modes[-1] == "control"


def test_a_dry_run_changes_nothing(controlled: RunningServer, plane: BrownoutClient, tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    version = settings_of(plane)["version"]
    with controller(controlled, "--dry-run", "--log", str(log)):
        wait_until(lambda: log.exists() and '"dry_run"' in log.read_text(), 20, "decided")
    assert settings_of(plane)["version"] == version


def test_far_too_many_requests_are_refused_early_and_each_ends_once(
    controlled: RunningServer, plane: BrownoutClient
) -> None:
    """Two run at once on each engine: of a crowd, those are refused that would wait for longer than the limit."""
    inputs = {"text_input": "crowd", "sampling_parameters": sampling(max_tokens=800)}

    def ask(_: int) -> str:
        try:
            return f"{grpc_infer(controlled, inputs | {'return_num_output_tokens': True}).last['num_output_tokens']} tokens"
        except ServerError as error:
            assert error.code == "UNAVAILABLE"
            return error.message

    with ThreadPoolExecutor(60) as pool:
        list(pool.map(ask, range(2)))  # so that the engines know their own speed
        answers = list(pool.map(ask, range(60)))
    served = answers.count("800 tokens")
    refused = [answer for answer in answers if "overloaded" in answer]
    assert served + len(refused) == 60, set(answers)
    assert served >= 4
    assert refused
    assert all(f"too late for {SHED_TTFT_S} s (shed_ttft_s); retry in about" in answer for answer in refused)
    wait_until(
        lambda: sum(entry["requests_shed"] for entry in plane.call()["telemetry"]) == len(refused), 5, "all counted"
    )


@pytest.mark.parametrize("fault", ["torn", "rubbish", "truncated", "removed"])
def test_a_damaged_block_stops_nobody_and_is_mended(
    controlled: RunningServer, plane: BrownoutClient, fault: str
) -> None:
    engines = {process.pid for process in engine_processes(controlled)}
    path = Path(engine_processes(controlled)[0].environ()["BROWNOUT_BLOCK"])
    plane.call(**DIM, owner="test", lease_s=30)
    if fault == "torn":
        with open(path, "r+b") as file:
            file.seek(layout._SETTINGS_AT)
            file.write((7).to_bytes(8, "little"))
    elif fault == "rubbish":
        with open(path, "r+b") as file:
            file.write(os.urandom(200_000))
    elif fault == "truncated":
        os.truncate(path, 10)
    else:
        path.unlink()
    assert generate(controlled, {"text_input": "Hi", "sampling_parameters": sampling(max_tokens=3)}).text
    settings = settings_of(plane)
    assert (settings["owner"], settings["threshold_decode"]) == ("test", 0.25)
    version = plane.call(**DIM | {"threshold_decode": 0.5}, owner="test", lease_s=30)["settings"]["version"]
    wait_until(lambda: followed(plane, version), 5, "followed again")
    plane.call(owner="test", lease_s=0)
    assert {process.pid for process in engine_processes(controlled)} == engines


def test_the_baseline_is_changed_by_loading_the_model_with_another_configuration(
    controlled: RunningServer, plane: BrownoutClient
) -> None:
    config = json.loads(get(controlled.http, "/v2/models/brownout/config")[1])

    def load(threshold: str) -> None:
        config["parameters"]["threshold_decode"] = {"string_value": threshold}
        config["parameters"]["mechanism"] = {"string_value": "drop"}
        with grpc.InferenceServerClient(controlled.grpc) as client:
            client.load_model("brownout", config=json.dumps(config))

    load("0.75")
    settings = settings_of(plane)
    assert settings["threshold_decode"] == settings["baseline"]["threshold_decode"] == 0.75
    wait_until(lambda: followed(plane, settings["version"]), 5, "followed")
    load("1.0")
    assert settings_of(plane)["threshold_decode"] == 1.0


def test_a_controller_goes_on_after_the_server_was_restarted(controlled: RunningServer, plane: BrownoutClient) -> None:
    """The server dies under it, the launcher brings it back on the same ports."""
    with controller(controlled, "--lease", "2") as process:
        wait_until(lambda: owner_of(plane) == "sidecar", 20, "in charge")
        (triton,) = [p for p in descendants(controlled) if p.name() == "tritonserver"]
        triton.kill()
        psutil.wait_procs([triton], timeout=5)

        def in_charge_again() -> bool:
            try:
                return owner_of(plane) == "sidecar"
            except Unreachable:
                return False

        time.sleep(0.2)
        wait_until(in_charge_again, 120, "in charge again")
        assert process.poll() is None
