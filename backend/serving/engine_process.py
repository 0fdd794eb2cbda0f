"""The engine process: `python -m backend.serving.engine_process`, started by the first stub that needs it.

One loop: take messages, step, hand out what happened. It ends when its server is gone, when no stub has been connected for
a while, or on SIGTERM after draining or aborting what runs.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
import zmq

from backend.brownout.block import Block, block_path
from backend.config import EngineConfig
from backend.engine.engine import Engine, Event
from backend.engine.request import Request, RequestEnded, TokenOutput
from backend.errors import ConfigError, InvalidRequestError, UnavailableError, UnreachableError
from backend.serving.engine_control import EngineControl
from backend.serving.protocol import (
    EXIT_CONFIG,
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
    decode_to_engine,
    encode,
)

log = logging.getLogger(__name__)

_HOUSEKEEPING_PERIOD_S = 0.5
#: Without a connected stub for so long, the engine ends: the models were unloaded or their processes died.
_LONELY_LIMIT_S = 5.0
_IDLE_POLL_MS = 100


@dataclass
class _Client:
    """A connected stub."""

    socket: zmq.Socket
    watch: ProcessWatch
    #: Request ids of this stub that have not ended, and those that have produced a token.
    active: set[int] = field(default_factory=set)
    started: set[int] = field(default_factory=set)


class EngineServer:
    """Serves one Engine to the stubs. Engine request ids are (client, request id) pairs."""

    def __init__(
        self,
        engine: Engine,
        control: EngineControl,
        runtime_dir: Path,
        index: int,
        generation: int,
        server: ProcessWatch,
    ) -> None:
        self._engine = engine
        self._control = control
        self._server = server
        self._clients: dict[str, _Client] = {}
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, 0)
        self.address = f"ipc://{runtime_dir}/e{index}-{generation}.sock"
        self._inbox.bind(self.address)
        self._generation = generation
        self._drain_deadline: float | None = None
        self._last_client_s = time.monotonic()
        self._next_housekeeping_s = 0.0
        #: Arrival of the latest request that has come.
        self._seen_s = 0.0

    def drain(self) -> None:
        """Refuse new requests, let the present ones run for drain_timeout_s, then abort them and end."""
        if self._drain_deadline is None:
            self._drain_deadline = time.monotonic() + self._engine.config.drain_timeout_s

    def run(self) -> None:
        """Serve until there is a reason to end."""
        while not self._should_end():
            self._receive()
            self._control.follow_settings()
            if refused := self._control.shed():
                self._hand_out(refused)
            self._control.announce(self._seen_s)
            if self._engine.has_work:
                started = time.perf_counter()
                self._hand_out(self._engine.step())
                self._control.stepped(time.perf_counter() - started)
                if not self._engine.has_work:
                    self._control.announce(self._seen_s)
            self._control.publish()
        self._end_all("the engine is shutting down")
        for client in self._clients.values():
            client.socket.close(linger=1000)
        self._inbox.close(linger=0)
        self._context.term()

    def _should_end(self) -> bool:
        now = time.monotonic()
        if self._drain_deadline is not None and (now >= self._drain_deadline or not self._engine.has_work):
            return True
        if now < self._next_housekeeping_s:
            return False
        self._next_housekeeping_s = now + _HOUSEKEEPING_PERIOD_S
        for name in [name for name, client in self._clients.items() if not client.watch.alive()]:
            log.warning("stub %s is gone, its requests are aborted", name)
            self._disconnect(name)
        self._send_stats()
        if self._clients:
            self._last_client_s = now
        if not self._server.alive():
            log.info("the server is gone, the engine ends")
            return True
        if now - self._last_client_s > _LONELY_LIMIT_S:
            log.info("no stub is connected, the engine ends")
            return True
        return False

    def _receive(self) -> None:
        """Take every message that is there; wait for one only when there is nothing to compute."""
        if not self._engine.has_work and not self._inbox.poll(_IDLE_POLL_MS):
            return
        while True:
            try:
                message = decode_to_engine(self._inbox.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except msgspec.DecodeError as error:
                log.error("a message could not be read: %s", error)
                continue
            match message:
                case Submit():
                    self._submit(message)
                case Abort(client=name, request_id=request_id, index=index):
                    self._engine.abort((name, request_id), index)
                    # Of several sequences (index), the last one's abort ends the request.
                    if name in self._clients and not self._engine.is_active((name, request_id)):
                        self._forget(self._clients[name], request_id)
                case Hello():
                    self._connect(message)
                case Served():
                    self._control.served(message.ttft_s, message.gaps)
                    self._engine.count_refused(message.refused)
                case Bye(client=name):
                    self._disconnect(name)

    def _connect(self, hello: Hello) -> None:
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.connect(hello.address)
        self._clients[hello.client] = _Client(socket, ProcessWatch(hello.pid))
        info = EngineInfo(self._generation, self._engine.vocab_size, self._engine.max_model_len)
        socket.send(encode(info))

    def _disconnect(self, name: str) -> None:
        client = self._clients.pop(name, None)
        if client is not None:
            for request_id in client.active:
                self._engine.abort((name, request_id))
            client.socket.close(linger=0)

    def _submit(self, message: Submit) -> None:
        self._seen_s = max(self._seen_s, message.arrival)
        client = self._clients.get(message.client)
        if client is None:
            return
        try:
            if self._drain_deadline is not None:
                raise UnavailableError("the server is shutting down")
            key = (message.client, message.request_id)
            request = Request(key, message.prompt_ids, message.params, message.arrival)
            request.judged = message.judged
            self._engine.add(request)
        except (InvalidRequestError, UnavailableError) as error:
            outcome = "invalid" if isinstance(error, InvalidRequestError) else "rejected"
            self._send(client, [], [RequestEnded(message.request_id, outcome, str(error))])
        else:
            client.active.add(message.request_id)

    def _hand_out(self, events: list[Event]) -> None:
        """One message per stub with everything this step means for it."""
        by_client: dict[str, tuple[list[TokenOutput], list[RequestEnded]]] = {}
        for event in events:
            name, request_id = event.request_id
            client = self._clients.get(name)
            if client is None:
                continue
            tokens, ended = by_client.setdefault(name, ([], []))
            if isinstance(event, TokenOutput):
                client.started.add(request_id)
                if event.finish_reason is not None and not self._engine.is_active(event.request_id):
                    self._forget(client, request_id)
                event.request_id = request_id
                tokens.append(event)
            else:
                self._forget(client, request_id)
                event.request_id = request_id
                ended.append(event)
        for name, (tokens, ended) in by_client.items():
            self._send(self._clients[name], tokens, ended)

    def _end_all(self, reason: str) -> None:
        for name, client in self._clients.items():
            for request_id in client.active:
                self._engine.abort((name, request_id))
            ended = [RequestEnded(request_id, "lost", reason) for request_id in client.active]
            client.active.clear()
            if ended:
                self._send(client, [], ended)

    def _send(self, client: _Client, tokens: list[TokenOutput], ended: list[RequestEnded]) -> None:
        client.socket.send(encode(Outputs(tokens, ended, self._engine.settings.version)))

    def _send_stats(self) -> None:
        stats = self._engine.stats()
        for client in self._clients.values():
            running = len(client.started)
            message = Stats(
                num_preemptions=stats.num_preemptions,
                prefix_hit_tokens=stats.prefix_hit_tokens,
                kv_usage_ratio=stats.kv_usage_ratio,
                client_running=running,
                client_waiting=len(client.active) - running,
                load=self._engine.num_requests,
                threshold_prefill=self._engine.settings.threshold_prefill,
                threshold_decode=self._engine.settings.threshold_decode,
                active_slots=stats.active_slots,
                united_share=stats.united_share,
                experts=asdict(self._engine.expert_telemetry()),
            )
            client.socket.send(encode(message))

    @staticmethod
    def _forget(client: _Client, request_id: int) -> None:
        client.active.discard(request_id)
        client.started.discard(request_id)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="backend.serving.engine_process", description=__doc__.splitlines()[0])
    parser.add_argument("--runtime-dir", type=Path, required=True)
    parser.add_argument("--index", type=int, required=True, help="which of the configured devices")
    parser.add_argument("--generation", type=int, required=True, help="counts the starts of this engine")
    parser.add_argument("--server-pid", type=int, required=True, help="the engine ends when this process does")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s engine %(levelname)s %(message)s", stream=sys.stderr)

    server: EngineServer | None = None
    stopping = False

    def on_sigterm(_signal: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True
        if server is not None:
            server.drain()

    signal.signal(signal.SIGTERM, on_sigterm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the whole group; the launcher decides
    raw_config = msgspec.json.decode(sys.stdin.buffer.read())
    record = EngineRecord("starting", args.generation, os.getpid(), config=raw_config)
    record.write(args.runtime_dir, args.index)
    try:
        config = EngineConfig(**raw_config)
        engine = Engine(config, config.devices[args.index])
        control = EngineControl(
            engine, Block(block_path(args.runtime_dir), args.server_pid), args.index, args.generation
        )
        control.learn_speed()
        watch = ProcessWatch(args.server_pid)
        server = EngineServer(engine, control, args.runtime_dir, args.index, args.generation, watch)
    except ConfigError as error:
        record.error = str(error)
        record.write(args.runtime_dir, args.index)
        log.error("%s", error)
        return 1 if isinstance(error, UnreachableError) else EXIT_CONFIG
    except Exception as error:
        record.error = f"{type(error).__name__}: {error}"
        record.write(args.runtime_dir, args.index)
        raise
    if stopping:
        return 0
    record.state, record.address = "ready", server.address
    record.write(args.runtime_dir, args.index)
    log.info("engine %d is ready (generation %d, pid %d)", args.index, args.generation, os.getpid())
    # What is here now stays: full collections, for which a step has to wait, need not go through it again and again.
    gc.collect()
    gc.freeze()
    server.run()
    engine.close()
    record.state = "stopped"
    record.write(args.runtime_dir, args.index)
    return 0


if __name__ == "__main__":
    sys.exit(main())
