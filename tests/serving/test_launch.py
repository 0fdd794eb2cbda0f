"""The launcher with a real Triton server and a trivial model: life, supervision and end."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from backend.errors import ConfigError
from backend.serving.launch_client import RunningServer, running_server
from backend.serving.launch_options import ADMIN_TOKEN_ENV, choose_admin_token
from backend.serving.protocol import RUNTIME_DIR_ENV
from backend.serving.triton_server import PRODUCT_ROOT
from tests.serving.launch_echo import make_repository
from tests.waiting import wait_until

pytestmark = pytest.mark.server

ADMIN_TOKEN = "an-admin-token-of-the-tests"
TEXTS = ["", "plain", "多字节 ü", "x" * 3000]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return make_repository(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(repository):
    """A server that tests use without harming it."""
    with running_server(model_repository=repository, env={ADMIN_TOKEN_ENV: ADMIN_TOKEN}) as server:
        yield server


def echo(server: RunningServer, texts: list[str], client_module=tritonclient.http, address: str = "") -> list[str]:
    client = client_module.InferenceServerClient(address or server.http)
    tensor = client_module.InferInput("text", [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode() for text in texts], np.object_))
    result = client.infer("echo", [tensor]).as_numpy("echo")
    client.close()
    return [item.decode() for item in result]


def triton(server: RunningServer) -> psutil.Process:
    return next(child for child in psutil.Process(server.pid).children() if child.name() == "tritonserver")


def stub(server: RunningServer) -> psutil.Process:
    return next(child for child in triton(server).children() if child.name().startswith("triton_python"))


def runtime_dir(server: RunningServer) -> Path:
    return Path(triton(server).environ()[RUNTIME_DIR_ENV])


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher that is expected to end by itself."""
    command = [sys.executable, "-m", "backend.serving.launch", *arguments]
    return subprocess.run(command, cwd=PRODUCT_ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_serves_bytes_over_both_protocols_and_metrics(server):
    assert echo(server, TEXTS) == TEXTS
    assert echo(server, TEXTS, tritonclient.grpc, server.grpc) == TEXTS
    with urllib.request.urlopen(f"http://{server.metrics}/metrics") as response:
        assert 'nv_inference_request_success{model="echo",version="1"}' in response.read().decode()


def test_administration_needs_the_token(server):
    http = tritonclient.http.InferenceServerClient(server.http)
    grpc = tritonclient.grpc.InferenceServerClient(server.grpc)
    for client, header in ((http, "admin-token"), (grpc, "triton-grpc-protocol-admin-token")):
        for headers in ({}, {header: ADMIN_TOKEN[:-1]}):
            for call in (
                partial(client.load_model, "echo"),
                client.get_model_repository_index,
                client.get_system_shared_memory_status,
                client.get_trace_settings,
                client.get_log_settings,
            ):
                with pytest.raises(InferenceServerException, match="restricted, expecting header"):
                    call(headers=headers)
        assert "echo" in str(client.get_model_repository_index(headers={header: ADMIN_TOKEN}))
        client.close()
    assert ADMIN_TOKEN not in Path(server.log_path).read_text()


@pytest.mark.parametrize(("host", "closed"), [("127.0.0.1", False), ("0.0.0.0", True), ("192.0.2.1", True)])
def test_administration_is_closed_to_other_machines(host, closed):
    tokens = {choose_admin_token(host, "") for _ in range(2)}
    assert len(tokens) == 2 if closed else tokens == {None}
    assert choose_admin_token(host, ADMIN_TOKEN) == ADMIN_TOKEN
    with pytest.raises(ConfigError, match="BROWNOUT_ADMIN_TOKEN must be at least 16 letters"):
        choose_admin_token(host, "with=a:delimiter,or,two")


def test_runtime_directory_is_private_and_short_enough_for_sockets(server):
    path = runtime_dir(server)
    assert path.stat().st_mode & 0o777 == 0o700
    assert len(str(path)) < 70
    assert list(Path("/dev/shm").glob(f"{path.name}*"))


def test_second_start_names_the_taken_port_and_leaves_the_first_alone(server, repository, tmp_path):
    port = server.http.rpartition(":")[2]
    log = tmp_path / "second.log"
    second = launch("--http-port", port, "--log", str(log), "--model-repository", str(repository))
    assert (second.returncode, second.stdout) == (1, "")
    assert f"http port {port} on 127.0.0.1 is taken" in second.stderr
    assert second.stderr.count("\n") == 1
    assert not log.exists()
    assert echo(server, TEXTS) == TEXTS


def test_sigterm_leaves_nothing(repository):
    with running_server(model_repository=repository) as server:
        directory = runtime_dir(server)
        processes = psutil.Process(server.pid).children(recursive=True)
        assert len(processes) >= 2
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert not any(process.is_running() for process in processes)
        assert not directory.exists()
        assert not list(Path("/dev/shm").glob(f"{directory.name}*"))


def test_a_dead_stub_or_server_is_replaced(repository):
    with running_server(model_repository=repository) as server:
        directory = runtime_dir(server)
        for number, victim in enumerate((stub, triton), start=1):
            old = psutil.Process(server.pid).children(recursive=True)
            victim(server).kill()
            wait_until(lambda number=number: server.messages().count("ready again") == number, 30)
            assert not any(process.is_running() for process in old)
            assert echo(server, TEXTS) == TEXTS
        assert "the stub of echo (pid " in server.messages()
        assert "the Triton server was killed by SIGKILL" in server.messages()
        assert runtime_dir(server) == directory
        assert len(list(directory.glob("stub-*.json"))) == 1


def test_engines_end_before_the_models_are_unloaded(repository, tmp_path):
    events = tmp_path / "events"
    env = {"ECHO_ENGINE": "polite", "ECHO_EVENTS": str(events)}
    with running_server(env=env, model_repository=repository):
        pass
    assert events.read_text() == "engine stub "


def test_an_engine_that_ignores_sigterm_is_killed_in_time(repository):
    env = {"ECHO_ENGINE": "stubborn"}
    with running_server(env=env, model_repository=repository, drain_timeout_s=0.5) as server:
        processes = psutil.Process(server.pid).children(recursive=True)
        started = time.monotonic()
        server.process.terminate()
        assert server.process.wait(10) == 0
        assert 1.0 < time.monotonic() - started < 6.0
        assert not any(process.is_running() for process in processes)


def test_a_second_signal_ends_everything_at_once(repository):
    with running_server(env={"ECHO_ENGINE": "stubborn"}, model_repository=repository, drain_timeout_s=30) as server:
        processes = psutil.Process(server.pid).children(recursive=True)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(2) == 0
        assert not any(process.is_running() for process in processes)


def test_the_server_goes_when_the_launcher_is_killed(repository):
    with running_server(model_repository=repository) as server:
        processes = psutil.Process(server.pid).children(recursive=True)
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not any(process.is_running() for process in processes), 5)


def test_a_model_that_does_not_load_is_one_sentence(repository, tmp_path):
    log = tmp_path / "server.log"
    with (
        pytest.raises(ConfigError, match=r"^echo: parameter checkpoint must name a folder, got 'x\"y'\.$"),
        running_server(env={"ECHO_FAIL": "1"}, model_repository=repository, log=log),
    ):
        pass
    assert "TritonModelException" in log.read_text()


def test_models_that_take_too_long_are_a_clear_error(repository):
    result = launch("--model-repository", str(repository), "--startup-timeout", "0.2", *"--http-port 0".split())
    assert (result.returncode, result.stdout) == (1, "")
    assert "not ready within 0.2 s (--startup-timeout); its log is above" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--http-port", "70000"], 2, "argument --http-port: must be a whole number from 0 to 65535, got '70000'"),
        (["--http-port", "9000", "--grpc-port", "9000"], 2, "must differ"),
        (["--drain-timeout", "soon"], 2, "argument --drain-timeout: must be a number of seconds from 0 to 86400"),
        (["--model-repository", "no/such"], 1, "is not a directory (--model-repository)"),
        (["--model-repository", "tests"], 1, "has no model: no */config.pbtxt (--model-repository)"),
        (["--models", "moe_lm"], 1, "there is no model 'moe_lm' in"),
        (["--log", "no/such/file.log"], 1, "file.log cannot be written: No such file or directory (--log)"),
        (["--host", "192.0.2.1"], 1, "cannot listen on 192.0.2.1 (--host): Cannot assign requested address"),
    ],
)
def test_bad_arguments_are_named(arguments, status, expected):
    free_ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    result = launch(*free_ports, *arguments)
    assert (result.returncode, result.stdout) == (status, "")
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
