"""Servers shared by the tests: one for traffic, one that is soon full. A start costs seconds, so there are only these."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backend.serving.launch_client import RunningServer, running_server
from tests.server.observe import wait_idle

#: Fast steps and a KV cache that a dozen long sequences do not fit in, so that some are preempted.
TINY = {"MOE_LLM_CHECKPOINT": "dummy:tiny", "MOE_LLM_KV_CACHE_BLOCKS": "128"}
TINY_CONTEXT = 1024
TINY_VOCAB = 512
#: Slower steps (about 10 ms) and a long context: a request for all of it outlasts every test.
SMALL = {
    "MOE_LLM_CHECKPOINT": "dummy:cpu-s",
    "MOE_LLM_MAX_RUNNING": "2",
    "MOE_LLM_MAX_WAITING": "3",
    "MOE_LLM_MAX_MODEL_LEN": "8000",
    "MOE_LLM_KV_CACHE_BLOCKS": "1000",
}


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    with running_server(env=TINY, drain_timeout_s=1) as running:
        yield running


@pytest.fixture(scope="session")
def small_server_process() -> Iterator[RunningServer]:
    with running_server(env=SMALL, drain_timeout_s=1) as running:
        yield running


@pytest.fixture
def small_server(small_server_process: RunningServer) -> Iterator[RunningServer]:
    """max_running 2, max_waiting 3; idle before and after each test."""
    wait_idle(small_server_process)
    yield small_server_process
    wait_idle(small_server_process)
