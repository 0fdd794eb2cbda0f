"""Locust users of the server: HTTP streams and gRPC streams on moe_llm, single responses on moe_llm_infer.

A user class describes a kind of client: its interface, its promises (`slo`; default: the run's) and its quality class
(`brownout`). Requests are not sent from the users' own loops, which would wait for answers, but open loop by the dispatcher
of `loadtest.locust_dispatch`, in shares by the classes' weights; Locust's user count does not change the load.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import ClassVar

import gevent
import grpc
import grpc.experimental.gevent as grpc_gevent
from locust import User, task
from locust.contrib.fasthttp import FastHttpSession
from locust.event import EventHook
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc

from loadtest import locust_dispatch
from loadtest.record import RequestRecord, Slo
from loadtest.schedule import Arrival
from loadtest.wire import (
    INFER_MODEL,
    STREAM_MODEL,
    STREAM_PATH,
    ServerError,
    event_of,
    generate_body,
    inputs_of,
    note_end,
    note_error,
    note_response,
    outputs_of,
    sampling_of,
)

grpc_gevent.init_gevent()
locust_dispatch.install()

#: As many connections as there are requests: a pool must not make them wait.
_CONNECTIONS = 100_000
_TIMEOUT_S = 3600.0
_MAX_MESSAGE_BYTES = 2**31 - 1

Outputs = Mapping[str, object]


class OpenLoopUser(User):
    """Base of the users below: what is recorded of a request and told to Locust's tables."""

    abstract = True
    #: The interface's name in records and tables.
    protocol: ClassVar[str]
    #: Quality class: `never` is exempt from brownout. A schedule may make single requests `never` too.
    brownout: ClassVar[str] = "auto"
    #: What these clients were promised.
    slo: ClassVar[Slo | None] = None

    def responses(self, prompt: str, sampling: Mapping) -> Iterator[Outputs]:
        """Send a request; its responses as they come, each a dict from output name to value."""
        raise NotImplementedError

    @task
    def stay(self) -> None:
        """Locust's users only keep the test alive; the dispatcher sends."""
        time.sleep(1)

    def send(self, number: int, arrival: Arrival, prompt: str, intended_s: float, seed: int) -> RequestRecord:
        """One request, recorded; every outcome ends up in the record."""
        now = time.monotonic()
        record = RequestRecord(
            id=number, protocol=self.protocol, intended_start_s=intended_s, start_s=now, slo=self.slo
        )
        record.brownout = "never" if "never" in (self.brownout, arrival.brownout) else "auto"
        sampling = sampling_of(number, arrival, seed) | {"brownout": record.brownout}
        try:
            for outputs in self.responses(prompt, sampling):
                note_response(record, outputs)
                self._report_response(record)
            note_end(record)
        except gevent.GreenletExit:
            note_error(record, ServerError("the test was stopped before the request had ended"))
        except Exception as error:  # whatever a transport raises is this request's failure, not the test's
            note_error(record, error)
        self._report("request", time.monotonic() - intended_s, record)
        return record

    def _report_response(self, record: RequestRecord) -> None:
        """Latencies of the newest response, one entry a token, in Locust's tables."""
        if not record.is_stream:
            return
        if len(record.responses) == 1:
            self._report("first token", record.ttft_s, record)
            return
        (before, _), (at_s, tokens) = record.responses[-2:]
        for _ in range(tokens):
            self._report("between tokens", (at_s - before) / tokens, record)

    def _report(self, name: str, seconds: float, record: RequestRecord) -> None:
        failure = f"{record.outcome}: {record.error}" if record.outcome != "completed" else None
        self.environment.events.request.fire(
            request_type=self.protocol,
            name=name,
            response_time=seconds * 1e3,
            response_length=len(record.text) if name == "request" else 0,
            exception=failure and ServerError(failure),
            context={},
        )


class _HttpUser(OpenLoopUser):
    """HTTP through Locust's fast client. Its own statistics go nowhere: they would count from the actual start."""

    abstract = True

    def __init__(self, environment) -> None:
        super().__init__(environment)
        host = self.host or environment.host or "http://127.0.0.1:8000"
        self._http = FastHttpSession(
            base_url=host if "://" in host else f"http://{host}",
            request_event=EventHook(),
            user=self,
            concurrency=_CONNECTIONS,
            network_timeout=_TIMEOUT_S,
            connection_timeout=60.0,
        )

    def _post(self, path: str, body: Mapping, stream: bool):
        response = self._http.post(path, json=dict(body), stream=stream, catch_response=True)
        if response.status_code == 0:
            raise response.error
        return response


class HttpStreamUser(_HttpUser):
    """Server-sent events of moe_llm's generate_stream."""

    protocol = "http_stream"

    def responses(self, prompt: str, sampling: Mapping) -> Iterator[Outputs]:
        response = self._post(STREAM_PATH, generate_body(prompt, sampling), stream=True)
        if response.status_code != 200:
            yield json.loads(response.content.removeprefix(b"data:"))
            return
        while line := bytes(response.stream.readline(b"\n")):
            if (outputs := event_of(line)) is not None:
                yield outputs


class InferUser(_HttpUser):
    """Single responses of moe_llm_infer over HTTP."""

    protocol = "http_infer"

    def responses(self, prompt: str, sampling: Mapping) -> Iterator[Outputs]:
        inputs = [
            {"name": name, "shape": [1], "datatype": datatype, "data": [value]}
            for name, datatype, value in inputs_of(prompt, sampling)
        ]
        response = self._post(f"/v2/models/{INFER_MODEL}/infer", {"inputs": inputs}, stream=False)
        answer = json.loads(response.content)
        yield answer if "error" in answer else {o["name"]: o["data"][0] for o in answer["outputs"]}


class GrpcStreamUser(OpenLoopUser):
    """gRPC streams on moe_llm, a stream per request on one connection."""

    protocol = "grpc_stream"

    def __init__(self, environment) -> None:
        super().__init__(environment)
        options = [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)]
        channel = grpc.insecure_channel(environment.parsed_options.grpc, options=options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

    def responses(self, prompt: str, sampling: Mapping) -> Iterator[Outputs]:
        request = service_pb2.ModelInferRequest(model_name=STREAM_MODEL)
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        for name, datatype, value in [*inputs_of(prompt, sampling), ("stream", "BOOL", True)]:
            tensor = request.inputs.add(name=name, datatype=datatype, shape=[1])
            if datatype == "BOOL":
                tensor.contents.bool_contents.append(value)
            else:
                tensor.contents.bytes_contents.append(value.encode())
        call = self._stub.ModelStreamInfer(iter([request]))
        try:
            for message in call:
                if message.error_message:
                    raise ServerError(message.error_message)
                if message.infer_response.outputs:
                    yield outputs_of(InferResult(message.infer_response))
                if message.infer_response.parameters["triton_final_response"].bool_param:
                    return
        finally:
            call.cancel()
