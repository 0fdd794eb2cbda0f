"""The recipes of README and docs/loads.md work as they stand: every fenced block is run against a real server.

Only addresses and lengths of loads are replaced. Indented blocks are not run: they need Docker, downloads, other checkpoints or minutes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from backend.serving.launch_client import RunningServer
from backend.serving.triton_server import PRODUCT_ROOT
from loadtest.perf_analyzer import PerfAnalyzerUnavailable, find_or_fetch
from loadtest.record import read_records
from tests.server.observe import wait_idle
from tests.waiting import wait_until

pytestmark = pytest.mark.server


@dataclass(frozen=True)
class Recipe:
    document: str
    language: str
    text: str

    @property
    def serves(self) -> bool:
        """Whether it runs until it is stopped."""
        waits_for_people = "bin/locust" in self.text and "--headless" not in self.text
        return self.language == "sh" and (
            waits_for_people or "-m controller" in self.text or "prometheus --" in self.text
        )


RECIPES = [
    Recipe(name, language, text)
    for name in ("README.md", "docs/loads.md")
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", (PRODUCT_ROOT / name).read_text(), re.M | re.S)
]


def name_of(recipe: Recipe) -> str:
    names = "perf_analyzer loadtest.run Shape locust controller prometheus curl LLM asyncio grpc http".split()
    return f"{recipe.document}-{next(name for name in names if name in recipe.text)}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout to run in that keeps what the recipes write apart."""
    for entry in PRODUCT_ROOT.iterdir():
        if entry.name not in ("results", "build"):
            (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


def as_run(text: str, server: RunningServer) -> str:
    for port, address in (("8000", server.http), ("8001", server.grpc), ("8002", server.metrics)):
        text = text.replace(f"localhost:{port}", address)
    text = re.sub(r"(duration ?= ?)\d+", r"\g<1>2", text)
    text = text.replace("--input-tokens 64-192", "--input-tokens 16-32")  # words, each several tokens of a dummy's
    text = text.replace("--stability-percentage 50", "--stability-percentage 999")  # other tests run beside it
    return text.replace(".venv/bin/", f"{Path(sys.executable).parent}/")


def command_of(recipe: Recipe, server: RunningServer, folder: Path) -> list[str]:
    text = as_run(recipe.text, server)
    if recipe.language == "sh":
        return ["bash", "-c", text]
    path = folder / "recipe.py"
    path.write_text(text)
    if "Shape)" not in text:
        return [sys.executable, str(path)]
    options = ["--headless", "--host", f"http://{server.http}", "--grpc", server.grpc, "--record", "records.jsonl"]
    return [sys.executable, "-m", "locust", "-f", str(path), *options]


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not r.serves], ids=name_of)
def test_a_recipe_runs(recipe: Recipe, server: RunningServer, folder: Path) -> None:
    if "perf_analyzer" in recipe.text:
        try:
            find_or_fetch()
        except PerfAnalyzerUnavailable as reason:
            pytest.skip(str(reason))
    command = command_of(recipe, server, folder)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, env=environment())
    said = done.stdout + done.stderr
    # Status 1 of a load is an invalid run: the generator may well be late on a machine that is busy with tests.
    is_load = "INVALID" in said
    assert done.returncode in ((0, 1) if is_load else (0,)), said
    assert "Traceback" not in said and '"error"' not in said, said
    assert done.stdout.strip() or "locust" in said, said
    if "perf_analyzer" in recipe.text:
        assert float(re.search(r"Throughput: ([0-9.]+) infer/sec", done.stdout)[1]) > 0
    for path in folder.glob("**/requests.jsonl"):
        assert [r.error for r in read_records(path) if r.outcome != "completed"] == []
    wait_idle(server)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.serves], ids=name_of)
def test_a_service_answers_until_it_is_stopped(recipe: Recipe, server: RunningServer, folder: Path) -> None:
    port = free_port()
    options, page = {
        "bin/locust": (f"--web-port {port}", "/"),
        "-m controller": (f"--metrics-port {port}", "/healthz"),
        "prometheus --": (f"--web.listen-address=127.0.0.1:{port} --storage.tsdb.path={folder / 'tsdb'}", "/-/ready"),
    }[next(part for part in ("bin/locust", "-m controller", "prometheus --") if part in recipe.text)]
    if "prometheus --" in recipe.text and shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed here")
    command = ["bash", "-c", f"exec {as_run(recipe.text, server).strip()} {options}"]
    with (folder / "output").open("w+") as output:
        service = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment())
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}{page}"), 30, "answering")
            if "bin/locust" in recipe.text:
                start_in_the_browser(f"http://127.0.0.1:{port}")
            service.terminate()
            assert service.wait(20) == 0, (folder / "output").read_text()
        finally:
            service.kill()
            service.wait()


def start_in_the_browser(url: str) -> None:
    """Send the web page's form, with a load of its own, and wait until its tables count requests."""
    form = {"user_count": 1, "spawn_rate": 1, "arrivals": "poisson:rate=20,duration=1", "output_tokens": "4"}
    with urllib.request.urlopen(f"{url}/swarm", urllib.parse.urlencode(form).encode(), timeout=10) as response:
        assert json.load(response)["success"]

    def sent() -> bool:
        with urllib.request.urlopen(f"{url}/stats/requests", timeout=10) as response:
            return any(row["name"] == "request" and row["num_requests"] for row in json.load(response)["stats"])

    wait_until(sent, 20, "sent")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PRODUCT_ROOT)}


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
