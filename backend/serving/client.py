"""A stub's connection to the engines: submits requests, delivers what comes back, notices an engine's death."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from backend.brownout.block import Block, BlockError, block_path
from backend.config import EngineConfig
from backend.engine.admission import Gate, QueueState, TooLate
from backend.engine.sampling_params import SamplingParams
from backend.engine.shedding import Pace
from backend.errors import ConfigError, UnavailableError
from backend.serving.protocol import (
    Abort,
    Bye,
    EngineInfo,
    EngineRecord,
    Hello,
    Outputs,
    ProcessWatch,
    Served,
    Stats,
    Submit,
    decode_to_stub,
    encode,
)
from backend.serving.server_watch import end_stub
from backend.serving.supervisor import Supervisor

log = logging.getLogger(__name__)

_POLL_MS = 50
_WATCH_PERIOD_S = 0.1
_START_POLL_S = 0.05
_REPORT_PERIOD_S = 0.1
#: After so many failed passes in a row the stub ends itself.
_MAX_FAILURES = 50

OnOutputs = Callable[[Outputs], None]
OnLost = Callable[[list[int], str], None]
#: Gate.admit or Gate.judge.
_Decide = Callable[[Gate, QueueState, int, SamplingParams, float, float], bool]


@dataclass
class _Link:
    """Connection to one generation of one engine."""

    generation: int
    inbox: zmq.Socket
    outbox: zmq.Socket
    watch: ProcessWatch
    gate: Gate
    #: The engine's queue as it was read last, and the number of that writing.
    queue: QueueState | None = None
    queue_sequence: tuple[int, bytes] | None = None
    info: EngineInfo | None = None
    stats: Stats | None = None
    active: set[int] = field(default_factory=set)
    #: Latencies not yet told to the engine.
    ttft_s: list[float] = field(default_factory=list)
    gaps: list[tuple[float, int]] = field(default_factory=list)
    #: Prompt tokens of requests that were refused early, likewise.
    refused: list[int] = field(default_factory=list)


class EngineClient:
    """Talks to every engine of the configuration; each request goes to the least loaded one.

    `on_outputs` and `on_lost` are called from the client's own thread. After `on_lost(request_ids, reason)` nothing more
    comes for these requests.
    """

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        runtime_dir: Path,
        server_pid: int,
        on_outputs: OnOutputs,
        on_lost: OnLost,
    ) -> None:
        self._name = f"{name}-{os.getpid()}"
        self._config = config
        self._runtime_dir = runtime_dir
        self._block = Block(block_path(runtime_dir), server_pid)
        self._on_outputs = on_outputs
        self._on_lost = on_lost
        self._context = zmq.Context()
        # Guards the links and the sending sockets: requests are submitted from Triton's thread, aborts from others.
        self._lock = threading.Lock()
        self._links: dict[int, _Link] = {}
        self._link_of: dict[int, _Link] = {}
        self._closed = threading.Event()
        self._failure = ""
        self._reason = "the engine is starting"
        self._supervisors = [Supervisor(config, index, runtime_dir, server_pid) for index in range(len(config.devices))]
        self._thread = threading.Thread(target=self._run, name="engine-client", daemon=True)

    def start(self) -> EngineInfo:
        """Start or find the engines and wait until each is ready. Raises ConfigError with the engine's own sentence."""
        for index in range(len(self._config.devices)):
            self._check_same_config(index)
        for supervisor in self._supervisors:
            supervisor.start()
        self._thread.start()
        while True:
            if self._failure:
                self.close()
                raise ConfigError(self._failure)
            with self._lock:
                infos = [link.info for link in self._links.values() if link.info is not None]
            if len(infos) == len(self._config.devices):
                return infos[0]
            time.sleep(_START_POLL_S)

    @property
    def failure(self) -> str:
        """Why the engines are given up for good, or an empty string."""
        return self._failure

    def stats(self) -> list[Stats]:
        """The last statistics of each connected engine."""
        with self._lock:
            return [link.stats for link in self._links.values() if link.stats is not None]

    def submit(self, request_id: int, prompt_ids: list[int], params: SamplingParams, arrival: float) -> None:
        """Send a request to the least loaded engine that has room for it.

        Raises UnavailableError when none is there, or when it is certain that none could serve it in time.
        """
        with self._lock:
            link, judged = self._choose(Gate.admit, len(prompt_ids), len(prompt_ids), params, arrival)
            link.active.add(request_id)
            self._link_of[request_id] = link
            link.outbox.send(encode(Submit(self._name, request_id, prompt_ids, params, arrival, judged)))

    def check(self, least_tokens: int, likely_tokens: int, params: SamplingParams, arrival: float) -> None:
        """Raise what `submit` would raise for a prompt of at least so many tokens, before its tokens are known.

        As `likely_tokens` it is counted if it is refused.
        """
        with self._lock:
            self._choose(Gate.judge, least_tokens, likely_tokens, params, arrival)

    def _choose(
        self, decide: _Decide, num_tokens: int, counted_tokens: int, params: SamplingParams, arrival: float
    ) -> tuple[_Link, bool]:
        """The least loaded engine whose gate does not refuse, and what its gate says (Gate.admit)."""
        links = [(index, link) for index, link in self._links.items() if link.info is not None]
        if not links:
            raise UnavailableError(f"{self._reason}; retry in about 2 s")
        links.sort(key=lambda entry: len(entry[1].active))
        refusal: UnavailableError | None = None
        for index, link in links:
            # An engine that has not said how its queue stands decides itself.
            state = self._queue(index, link)
            try:
                now = time.monotonic()
                return link, state is not None and decide(link.gate, state, num_tokens, params, arrival, now)
            except UnavailableError as error:
                refusal = refusal or error
        if isinstance(refusal, TooLate):
            links[0][1].refused.append(counted_tokens)
        raise refusal

    def _queue(self, index: int, link: _Link) -> QueueState | None:
        """What this generation of an engine says of its queue, if it has said something."""
        try:
            sequence = self._block.queue_sequence(index)
            if sequence != link.queue_sequence:
                *state, pace = self._block.read_queue(index).item()
                link.queue, link.queue_sequence = QueueState(*state, Pace(*pace)), sequence
        except (BlockError, OSError):
            return None
        return link.queue if link.queue.generation == link.generation else None

    def abort(self, request_id: int, index: int | None = None) -> None:
        """End a request, or one of its sequences, in the engine."""
        with self._lock:
            link = self._link_of.get(request_id)
            if link is not None:
                link.outbox.send(encode(Abort(self._name, request_id, index)))

    def served(self, request_id: int, num_tokens: int, ttft_s: float | None, gap_s: float | None) -> None:
        """A response with so many tokens was handed to Triton: the first one, or `gap_s` after the one before."""
        with self._lock:
            link = self._link_of.get(request_id)
            if link is None:
                return
            if ttft_s is not None:
                link.ttft_s.append(ttft_s)
            if gap_s is not None and num_tokens:
                link.gaps.append((gap_s, num_tokens))

    def forget(self, request_id: int) -> None:
        """The request has ended; it no longer counts as load."""
        with self._lock:
            link = self._link_of.pop(request_id, None)
            if link is not None:
                link.active.discard(request_id)

    def close(self) -> None:
        """Leave the engines; they end by themselves when no stub is left."""
        if self._closed.is_set():
            return
        self._closed.set()
        for supervisor in self._supervisors:
            supervisor.stop()
        for thread in (*self._supervisors, self._thread):
            if thread.is_alive():
                thread.join(timeout=2)
        with self._lock:
            for link in self._links.values():
                link.outbox.send(encode(Bye(self._name)))
                link.outbox.close(linger=500)
                link.inbox.close(linger=0)
            self._links.clear()
            self._block.close()
        self._context.term()

    def _check_same_config(self, index: int) -> None:
        record = EngineRecord.read(self._runtime_dir, index)
        if record is None or record.state in ("failed", "stopped") or not ProcessWatch(record.pid).alive():
            return
        mine = self._config.to_dict()
        differing = [name for name in mine if record.config.get(name) != mine[name]]
        if differing:
            raise ConfigError(
                f"the engine is running with another value of parameter {differing[0]} ({record.config.get(differing[0])!r}, "
                f"this model has {mine[differing[0]]!r}): unload every model that uses the engine, then load them again"
            )

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            log.exception("the connection to the engines cannot go on")
            end_stub("its requests would wait for ever")

    def _serve(self) -> None:
        """Receive until closed; look after the engines' lives in between. What fails is tried again, up to a limit."""
        poller = zmq.Poller()
        next_watch_s = next_report_s = 0.0
        num_failures = 0
        while not self._closed.is_set():
            try:
                if time.monotonic() >= next_watch_s:
                    next_watch_s = time.monotonic() + _WATCH_PERIOD_S
                    for index in range(len(self._config.devices)):
                        self._watch(index, poller)
                if not self._links:  # an empty poller would not wait
                    self._closed.wait(_WATCH_PERIOD_S)
                for socket, _ in poller.poll(_POLL_MS):
                    self._receive(socket)
                if time.monotonic() >= next_report_s:
                    next_report_s = time.monotonic() + _REPORT_PERIOD_S
                    self._report_latencies()
                num_failures = 0
            except Exception:
                num_failures += 1
                if self._closed.is_set():
                    return
                if num_failures == _MAX_FAILURES:
                    raise
                log.exception("the engines could not be looked after; it is tried again")
                self._closed.wait(_WATCH_PERIOD_S)

    def _report_latencies(self) -> None:
        with self._lock:
            for link in self._links.values():
                if link.ttft_s or link.gaps or link.refused:
                    link.outbox.send(encode(Served(link.ttft_s, link.gaps, link.refused)))
                    link.ttft_s, link.gaps, link.refused = [], [], []

    def _watch(self, index: int, poller: zmq.Poller) -> None:
        """Connect to a new generation of an engine, drop a dead one."""
        link = self._links.get(index)
        if link is not None:
            if link.watch.alive():
                return
            while link.inbox.poll(0):  # what it said last still counts
                self._receive(link.inbox)
            poller.unregister(link.inbox)
            with self._lock:
                del self._links[index]
                lost = sorted(link.active)
                for request_id in lost:
                    self._link_of.pop(request_id, None)
                link.outbox.close(linger=0)
                link.inbox.close(linger=0)
                self._reason = "the engine process ended unexpectedly and is being restarted"
            log.error("engine %d is gone with %d requests", index, len(lost))
            self._on_lost(lost, "the engine process ended unexpectedly; the request is lost, send it again")
            return
        record = EngineRecord.read(self._runtime_dir, index)
        supervisor = self._supervisors[index]
        if supervisor.failure:
            self._failure = supervisor.failure
        elif record is None:
            return
        elif record.state == "failed" and record.error:
            # One of before this load means nothing: this stub's supervisor is about to start the engine anew.
            if record.generation > supervisor.ended_generation:
                self._failure = record.error
        elif record.state == "stopped":
            self._reason = "the engine is stopping"
        elif record.state == "ready" and (watch := ProcessWatch(record.pid)).alive():
            link = self._connect(index, record, watch)
            poller.register(link.inbox, zmq.POLLIN)
            with self._lock:
                self._links[index] = link

    def _connect(self, index: int, record: EngineRecord, watch: ProcessWatch) -> _Link:
        inbox, outbox = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
        try:
            inbox.setsockopt(zmq.RCVHWM, 0)
            outbox.setsockopt(zmq.SNDHWM, 0)
            address = f"ipc://{self._runtime_dir}/c{os.getpid()}-{index}-{record.generation}.sock"
            inbox.bind(address)
            outbox.connect(record.address)
            outbox.send(encode(Hello(self._name, address, os.getpid())))
        except zmq.ZMQError:
            inbox.close(linger=0)
            outbox.close(linger=0)
            raise
        gate = Gate(self._config.max_waiting, self._config.shed_ttft_s)
        return _Link(record.generation, inbox, outbox, watch, gate)

    def _receive(self, socket: zmq.Socket) -> None:
        data = socket.recv()
        link = next(link for link in self._links.values() if link.inbox is socket)
        try:
            message = decode_to_stub(data)
            if isinstance(message, Outputs):
                self._on_outputs(message)
            elif isinstance(message, EngineInfo):
                link.info = message
            else:
                link.stats = message
        except Exception:
            # Whose tokens it had is unknown, or who has got theirs: none of these requests has its text for certain.
            log.exception("a message of the engine could not be taken in")
            with self._lock:
                lost = sorted(link.active)
            for request_id in lost:
                self.abort(request_id)
            self._on_lost(lost, "a message of the engine could not be taken in; the request is lost, send it again")
