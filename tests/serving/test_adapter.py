"""Every request gets its text and one final response, or an error, whatever fails on the way; Triton and engine stand in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from backend.engine.request import TokenOutput, timed_out
from backend.serving import adapter, server_watch
from backend.serving.adapter import MoeLlmModel
from backend.serving.protocol import RUNTIME_DIR_ENV, EngineInfo, Outputs
from tests.serving import fake_pb_utils
from tests.serving.test_metrics import FakePbUtils
from tests.waiting import wait_until

DECOUPLED = (
    '{"model_transaction_policy": {"decoupled": true}, "parameters": {"checkpoint": {"string_value": "dummy:tiny"}}}'
)
FULL = RuntimeError("No space left on device")


class TritonError(Exception):
    INTERNAL, UNAVAILABLE, CANCELLED, INVALID_ARG = "INTERNAL", "UNAVAILABLE", "CANCELLED", "INVALID_ARG"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.message, self.code = message, code


@dataclass
class Response:
    output_tensors: list
    error: TritonError | None = None

    @property
    def text(self) -> str:
        return next(t for t in self.output_tensors if t.name() == "text_output").as_numpy()[0].decode()


class PbUtils(FakePbUtils):
    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    Tensor, InferenceResponse, TritonError = fake_pb_utils.Tensor, Response, TritonError


@dataclass
class Sender:
    """Fails the sends of these numbers; like Triton's it counts as closed once a final one was tried, if it `closes`."""

    failing: set[int] = field(default_factory=set)
    #: What happens while a send fails.
    meanwhile: Callable[[], object] = bool
    closes: bool = False
    cancelled: bool | Exception = False
    sent: list[tuple[Response | None, int]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _closed: bool = False

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        assert not (self.sent and self.sent[-1][1]), "something comes after the final response"
        if self._closed:
            raise RuntimeError("Unable to send response. Response sender has been closed.")
        self._closed = self.closes and bool(flags)
        if next(self._numbers) in self.failing:
            self.meanwhile()
            raise FULL
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        if isinstance(self.cancelled, Exception):
            raise self.cancelled
        return self.cancelled

    @property
    def ended(self) -> bool:
        return bool(self.sent) and self.sent[-1][1] == 1

    @property
    def error(self) -> TritonError:
        assert self.ended
        return self.sent[-1][0].error


class Client:
    """In place of EngineClient: remembers what it was told."""

    failure = ""

    def __init__(self, *_arguments: object) -> None:
        self.submitted, self.aborted, self.forgotten = [], [], []

    def start(self) -> EngineInfo:
        return EngineInfo(1, 512, 1024)

    def submit(self, request_id: int, *_: object) -> None:
        self.submitted.append(request_id)

    def abort(self, request_id: int, index: int | None = None) -> None:
        self.aborted.append(request_id)

    def forget(self, request_id: int) -> None:
        self.forgotten.append(request_id)

    def check(self, *_: object) -> None: ...
    def served(self, *_: object) -> None: ...
    def close(self) -> None: ...
    def stats(self) -> list:
        return []


class Stub:
    """A stub with a streaming request for every sender."""

    def __init__(self) -> None:
        self.pb_utils = PbUtils()
        args = {"model_name": "moe_llm", "model_version": "1", "model_config": DECOUPLED, "model_repository": "/none"}
        self.model = MoeLlmModel(self.pb_utils, args)
        self.client: Client = self.model._client

    def ask(self, sender: Sender, **sampling: object) -> int:
        request = fake_pb_utils.request("Hi", sampling={"max_tokens": 9, **sampling}, stream=True)
        request.get_response_sender = lambda: sender
        self.model.execute([request])
        return self.client.submitted[-1]

    def hear(self, *request_ids: int, finish: str | None = None, token_id: int = 72) -> None:
        """A step of the engine with a token for each of these requests."""
        self.model._on_outputs(Outputs([TokenOutput(i, 0, token_id, finish) for i in request_ids], [], 0))

    def outcomes(self) -> dict[str, float]:
        self.model._metrics.flush([])
        metrics = self.pb_utils.metrics
        return {
            key[1]: metric.value for key, metric in metrics.items() if key[0] == "moe_requests_total" and metric.value
        }


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv(RUNTIME_DIR_ENV, str(tmp_path))
    monkeypatch.setattr(adapter, "EngineClient", Client)
    monkeypatch.setattr(adapter, "gc", type("NoGc", (), {"collect": lambda: None, "freeze": lambda: None}))
    monkeypatch.setattr(adapter, "_WATCH_PERIOD_S", 0.02)
    stub = Stub()
    yield stub
    stub.model.finalize()


def test_a_part_that_cannot_be_handed_over_ends_its_request_with_an_error(stub: Stub) -> None:
    """Also if the engine finishes it meanwhile: a part of the text is missing. Others go on."""
    broken, well = Sender(failing={0}, meanwhile=lambda: stub.hear(lost, finish="length")), Sender()
    lost, kept = stub.ask(broken), stub.ask(well)
    stub.hear(lost, kept)
    wait_until(lambda: well.sent and broken.ended)
    stub.hear(kept, finish="length")
    wait_until(lambda: well.ended)
    assert broken.error.code == "INTERNAL"
    assert "could not be handed over: No space left on device" in broken.error.message
    assert "".join(response.text for response, _ in well.sent) == "HH"
    assert stub.client.aborted == [lost] and sorted(stub.client.forgotten) == [lost, kept]
    assert stub.outcomes() == {"failed": 1, "completed": 1}


def test_a_final_response_that_cannot_be_handed_over_is_tried_again_without_its_text(stub: Stub) -> None:
    sender, empty = Sender(failing={1}), Sender(failing={1, 2})
    for each in (sender, empty):
        request_id = stub.ask(each)
        stub.hear(request_id)
        wait_until(lambda each=each: each.sent)
        stub.hear(request_id, finish="length")
        wait_until(lambda each=each: each.ended)
    assert "the final response could not be handed over: No space left on device" in sender.error.message
    assert empty.sent[1:] == [(None, 1)]
    assert stub.outcomes() == {"failed": 2}


def test_a_stub_that_cannot_end_a_request_ends_itself(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is started anew ends the clients' waiting; this one never would."""
    ends: list[int] = []
    monkeypatch.setattr(server_watch.os, "_exit", ends.append)
    stub.hear(stub.ask(Sender(failing={0}, closes=True)), finish="length")
    wait_until(lambda: ends == [1])


def test_a_refusal_is_tried_again_and_never_raised(stub: Stub) -> None:
    """Triton would end every request of the call, also those that go on."""
    sender = Sender(failing={0})
    request = fake_pb_utils.request("Hi", sampling={"max_tokens": "many"})
    request.get_response_sender = lambda: sender
    stub.model.execute([request])
    assert sender.error.code == "INVALID_ARG" and stub.outcomes() == {"invalid": 1}


def test_what_fails_for_one_request_is_none_of_the_others_business(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    senders = [Sender() for _ in range(3)]
    odd, well, _ = (stub.ask(sender) for sender in senders)
    tokens = [TokenOutput(odd, 7, 72, None), TokenOutput(well, 0, 72, "length")]  # there is no eighth sequence
    stub.model._on_outputs(Outputs(tokens, [], 0))
    wait_until(lambda: senders[0].ended and senders[1].ended)
    assert "a token could not be taken in" in senders[0].error.message and senders[1].error is None
    with monkeypatch.context() as patch:
        patch.setattr(stub.model, "_give_up_if_hopeless", None)
        unknown = Sender(cancelled=FULL)
        stub.ask(unknown)
        senders[2].cancelled = True
        wait_until(lambda: senders[2].ended)
    assert senders[2].error.code == "CANCELLED" and not unknown.sent
    unknown.cancelled = True
    wait_until(lambda: unknown.ended)
    assert stub.outcomes() == {"failed": 1, "completed": 1, "cancelled": 2}


def test_a_timeout_that_the_engine_does_not_keep_is_kept_here(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_TIMEOUT_GRACE_S", 0.05)
    late, patient = Sender(), Sender()
    request_id = stub.ask(late, timeout_s=0.01)
    stub.ask(patient)
    wait_until(lambda: late.ended)
    assert (late.error.message, late.error.code) == (timed_out(0.01), "UNAVAILABLE")
    assert stub.client.aborted[0] == request_id and not patient.sent
    assert stub.outcomes() == {"timeout": 1}
