"""A server with two places and a queue of three: cancellations, vanished clients, timeouts, the full queue, priorities."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import tritonclient.grpc as grpc

from backend.serving.launch_client import RunningServer
from tests.server.observe import read_metric
from tests.server.talk import (
    ASK,
    STREAMS,
    Answer,
    GrpcStream,
    HttpStream,
    ServerError,
    check_code,
    generate,
    sampling,
    to_array,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.server

#: 0.5 s from a client's going to the engine's knowing, plus as much again for this machine: the first is
#: kept by a poll of 0.4 s, but on two busy cores threads of five processes may wait their turn for some tenths of a second.
GONE_WITHIN_S = 0.5 + 0.5

ENDLESS = {"text_input": "for ever", "sampling_parameters": sampling(max_tokens=10**6)}
Stream = HttpStream | GrpcStream


class Collector(threading.Thread):
    """Reads a stream in the background and notes when its first response came and how it ended."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self.answer = Answer()
        self.first_s: float | None = None
        self.error: ServerError | None = None
        self.start()

    def run(self) -> None:
        try:
            for response in self._stream:
                self.first_s = self.first_s or time.monotonic()
                self.answer.responses.append(response)
        except ServerError as error:
            self.error = error
        except (OSError, ValueError, AttributeError, queue.Empty):
            pass  # the test closed it


@pytest.fixture
def start(small_server: RunningServer) -> Iterator[Callable[..., tuple[Stream, Collector]]]:
    """Starts a stream that is read in the background; what is left is cancelled in the end."""
    streams = []

    def start_one(interface: str, inputs: dict, parameters: dict | None = None) -> tuple[Stream, Collector]:
        stream = STREAMS[interface](small_server, inputs, parameters)
        streams.append(stream)
        return stream, Collector(stream)

    yield start_one
    for stream in streams:
        stream.cancel()


@pytest.fixture
def holders(start: Callable) -> dict[str, Stream]:
    """Two endless streams that hold both places, by interface."""
    started = {interface: start(interface, ENDLESS) for interface in STREAMS}
    wait_until(lambda: all(c.first_s for _, c in started.values()), 20, "two running streams")
    return {interface: stream for interface, (stream, _) in started.items()}


def wait_for_waiting(server: RunningServer, number: int) -> None:
    wait_until(lambda: read_metric(server, "moe_requests_waiting") == number, 10, f"{number} requests waiting")


@pytest.mark.timed
@pytest.mark.parametrize("interface", STREAMS)
def test_a_client_that_goes_gives_its_place_away_at_once(
    small_server: RunningServer, start: Callable, holders: dict[str, Stream], interface: str
) -> None:
    """A cancelled gRPC stream and an HTTP client that closes its socket."""
    cancelled = read_metric(small_server, "moe_requests_total", outcome="cancelled")
    _, waiting = start("grpc_stream", {"text_input": "me next", "sampling_parameters": sampling(max_tokens=5)})
    wait_for_waiting(small_server, 1)
    assert waiting.first_s is None
    gone_s = time.monotonic()
    holders[interface].cancel()
    wait_until(lambda: waiting.first_s, 10, "started")
    assert waiting.first_s - gone_s <= GONE_WITHIN_S
    wait_until(
        lambda: read_metric(small_server, "moe_requests_total", outcome="cancelled") == cancelled + 1, 5, "counted"
    )


@pytest.mark.timed
def test_a_cancelled_unary_request_gives_its_place_away(small_server: RunningServer, start: Callable) -> None:
    start("grpc_stream", ENDLESS)
    client = grpc.InferenceServerClient(small_server.grpc)
    tensors = []
    for name, value in ENDLESS.items():
        tensor = grpc.InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(to_array(value))
        tensors.append(tensor)
    ended: queue.Queue = queue.Queue()
    call = client.async_infer("moe_llm_infer", tensors, lambda result, error: ended.put(error))
    wait_until(lambda: read_metric(small_server, "moe_requests_running") == 2, 10, "two running requests")
    _, waiting = start("grpc_stream", {"text_input": "me next", "sampling_parameters": sampling(max_tokens=5)})
    wait_for_waiting(small_server, 1)
    gone_s = time.monotonic()
    call.cancel()
    wait_until(lambda: waiting.first_s, 10, "started")
    assert waiting.first_s - gone_s <= GONE_WITHIN_S
    assert "CANCELLED" in str(ended.get(timeout=5).status())
    client.close()


def test_a_client_that_goes_while_it_waits_leaves_the_queue(
    small_server: RunningServer, start: Callable, holders: dict[str, Stream]
) -> None:
    stream, _ = start("grpc_stream", {"text_input": "impatient"})
    wait_for_waiting(small_server, 1)
    stream.cancel()
    wait_for_waiting(small_server, 0)


@pytest.mark.timed
def test_an_http_client_that_goes_while_it_waits_is_noticed_with_its_first_token(
    small_server: RunningServer, start: Callable, holders: dict[str, Stream]
) -> None:
    """Triton sees that an HTTP client has gone only when it writes to it."""
    stream, _ = start("generate_stream", ENDLESS)
    wait_for_waiting(small_server, 1)
    stream.cancel()
    _, waiting = start("grpc_stream", {"text_input": "me next", "sampling_parameters": sampling(max_tokens=5)})
    wait_for_waiting(small_server, 2)
    gone_s = time.monotonic()
    holders["grpc_stream"].cancel()
    wait_until(lambda: waiting.first_s, 10, "started")
    assert waiting.first_s - gone_s <= 2 * GONE_WITHIN_S  # two clients have gone, one after the other


@pytest.mark.parametrize("interface", ASK)
def test_a_timeout_says_after_how_long(small_server: RunningServer, interface: str) -> None:
    timeouts = read_metric(small_server, "moe_requests_total", outcome="timeout")
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"timed out after 0\.5 s") as error:
        ASK[interface](
            small_server, {"text_input": "slow", "sampling_parameters": sampling(max_tokens=10**6, timeout_s=0.5)}
        )
    assert time.monotonic() - started >= 0.5
    check_code(error.value, interface, "UNAVAILABLE")
    wait_until(lambda: read_metric(small_server, "moe_requests_total", outcome="timeout") == timeouts + 1, 5, "counted")


def test_tritons_own_request_timeout_is_honoured(small_server: RunningServer) -> None:
    """KServe's request timeout, in microseconds."""
    with pytest.raises(ServerError, match=r"timed out after 0\.4 s"):
        ASK["grpc_infer"](small_server, ENDLESS, timeout=400_000)


def test_a_request_times_out_in_the_queue(small_server: RunningServer, holders: dict[str, Stream]) -> None:
    with pytest.raises(ServerError, match=r"timed out after 0\.4 s"):
        generate(small_server, {"text_input": "slow", "sampling_parameters": sampling(timeout_s=0.4)})


def test_a_full_queue_refuses_and_disturbs_nobody(small_server: RunningServer, start: Callable) -> None:
    """UNAVAILABLE with the reason and, as requests have finished before, a retry hint; the others get their text."""
    inputs = [{"text_input": f"client {i}", "sampling_parameters": sampling(max_tokens=10)} for i in range(3)]
    alone = [generate(small_server, {**one, "exclude_input_in_output": True}).text for one in inputs]
    rejected = read_metric(small_server, "moe_requests_total", outcome="rejected")
    running = {interface: start(interface, ENDLESS) for interface in STREAMS}
    wait_until(lambda: all(collector.first_s for _, collector in running.values()), 20, "two running streams")
    waiting = [start(interface, one)[1] for interface, one in zip(("grpc_stream", *STREAMS), inputs, strict=True)]
    wait_for_waiting(small_server, 3)
    for interface in ASK:
        with pytest.raises(ServerError, match=r"queue is full: 3 requests wait.*retry in about \d+ s") as error:
            ASK[interface](small_server, {"text_input": "one more", "sampling_parameters": sampling(max_tokens=1)})
        check_code(error.value, interface, "UNAVAILABLE")
    for stream, collector in running.values():
        assert collector.is_alive()
        stream.cancel()
    for collector in waiting:
        collector.join(30)
    assert [collector.error for collector in waiting] == [None] * 3
    assert [collector.answer.text for collector in waiting] == alone
    wait_until(
        lambda: read_metric(small_server, "moe_requests_total", outcome="rejected") == rejected + len(ASK), 5, "counted"
    )


def test_urgent_requests_overtake_waiting_ones(
    small_server: RunningServer, start: Callable, holders: dict[str, Stream]
) -> None:
    waiting = {}
    for number, priority in enumerate((0, 5, -5), start=1):
        inputs = {"text_input": "in line", "sampling_parameters": sampling(max_tokens=30, priority=priority)}
        _, waiting[priority] = start("grpc_stream", inputs)
        wait_for_waiting(small_server, number)
    holders["grpc_stream"].cancel()
    for collector in waiting.values():
        collector.join(30)
    assert sorted(waiting, key=lambda priority: waiting[priority].first_s) == [-5, 0, 5]
