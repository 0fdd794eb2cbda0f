"""Open-loop arrivals inside Locust: a dispatcher greenlet starts a greenlet per request from a precomputed schedule.

The local runner, or the master, makes the schedule when a test starts. With workers, each gets every count-th request and
the common start; in the end the master has all records. Importing `loadtest.users` installs all of this.
"""

from __future__ import annotations

import datetime
import logging
import random
import signal
import time
from pathlib import Path

import gevent
import msgspec
from gevent.pool import Group
from locust import events
from locust.env import Environment
from locust.runners import WORKER_REPORT_INTERVAL, MasterRunner, WorkerRunner

from backend.errors import ConfigError
from loadtest.open_loop import Pacer
from loadtest.options import add_load_arguments, describe, make_prompts, plan_load
from loadtest.record import RequestRecord
from loadtest.results import RunInfo, summarize_run, summary_path, write_run
from loadtest.schedule import Arrival

log = logging.getLogger(__name__)

#: Between planning and the first request: time for messages, connections and Locust's own spawning.
_LEAD_S = 2.0
#: Workers report their tables in intervals; a test that ends sooner would lose the last part.
_LINGER_S = WORKER_REPORT_INTERVAL + 1.0
_PART_MESSAGE = "open_loop_part"
_RECORDS_MESSAGE = "open_loop_records"


class Part(msgspec.Struct):
    """What one sender sends, and where to: Locust's own message with the master's options may come later than this.

    `start_unix_s` is the wall clock, which all machines share, at the schedule's zero.
    """

    host: str | None
    grpc: str
    start_unix_s: float
    seed: int
    requests: list[tuple[int, Arrival, str]]


class PartRecords(msgspec.Struct):
    """What came of a part; `start_s` is the schedule's zero on the sender's monotonic clock."""

    start_s: float
    records: list[RequestRecord]


class OpenLoopTest:
    """This process's part in tests: plan (local runner and master), send (local runner and workers), collect."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._ended_s: float | None = None
        self._info: RunInfo | None = None
        self._expected = 0
        self._parts: list[PartRecords] = []
        self._sending: gevent.Greenlet | None = None
        self._is_stopping = False
        runner = environment.runner
        self._is_master = isinstance(runner, MasterRunner)
        self._is_worker = isinstance(runner, WorkerRunner)
        if self._is_worker:
            runner.register_message(_PART_MESSAGE, self._on_part)
        else:
            environment.events.test_start.add_listener(self._on_test_start)
            environment.events.quit.add_listener(self._on_quit)
        if self._is_master:
            runner.register_message(_RECORDS_MESSAGE, self._on_records)
        environment.events.test_stop.add_listener(self._on_test_stop)

    @property
    def finished(self) -> bool:
        """The schedule has been worked through, every request has ended, and workers had time to report their tables."""
        if self._ended_s is None:
            return False
        return time.monotonic() >= self._ended_s + (_LINGER_S if self._is_master else 0.0)

    def _on_test_start(self, **_: object) -> None:
        environment = self._environment
        self._collect()
        try:
            schedule, info = plan_load(environment.parsed_options, getattr(environment.shape_class, "arrivals", None))
            prompts = make_prompts(environment.parsed_options)
        except ConfigError as error:
            log.error("No test: %s", error)
            environment.process_exit_code = 2
            self._ended_s = 0.0
            return
        workers = sorted(client.id for client in environment.runner.clients.ready) if self._is_master else [None]
        # Prompts are made before the clock starts: a tokenizer's work must not delay a request.
        parts = [
            [(number, a, prompts.text(number, a.input_tokens)) for number, a in schedule.part(index, len(workers))]
            for index in range(len(workers))
        ]
        start_unix_s = time.time() + _LEAD_S
        info.started_monotonic_s = time.monotonic() + _LEAD_S
        info.started_at = datetime.datetime.fromtimestamp(start_unix_s, datetime.UTC).isoformat(timespec="seconds")
        self._info = info
        self._expected = len(workers)
        log.info(
            "%d requests over %.0f s, arrivals %s", info.planned_requests, info.duration_s, info.arrivals_sha256[:12]
        )
        for worker, requests in zip(workers, parts, strict=True):
            part = Part(environment.host, environment.parsed_options.grpc, start_unix_s, info.seed, requests)
            if worker is None:
                self._begin(part)
            else:
                environment.runner.send_message(_PART_MESSAGE, msgspec.json.encode(part), client_id=worker)

    def _on_part(self, msg, **_: object) -> None:
        part = msgspec.json.decode(msg.data, type=Part)
        self._environment.host, self._environment.parsed_options.grpc = part.host, part.grpc
        self._begin(part)

    def _begin(self, part: Part) -> None:
        self._is_stopping = False
        self._sending = gevent.spawn(self._send, part)

    def _send(self, part: Part) -> None:
        """Send every request of a part at its time; when all have ended, or the test is stopped, hand over the records."""
        start_s = time.monotonic() + part.start_unix_s - time.time()
        classes = self._environment.user_classes
        clients = [user_class(self._environment) for user_class in classes]
        weights = [user_class.weight for user_class in classes]
        texts = {number: text for number, _, text in part.requests}
        records: list[RequestRecord] = []

        def request(number: int, arrival: Arrival, intended_s: float) -> None:
            (client,) = random.Random(f"client {part.seed} {number}").choices(clients, weights)
            records.append(client.send(number, arrival, texts[number], intended_s, part.seed))

        pacer, group = Pacer(((number, a) for number, a, _ in part.requests), start_s), Group()
        try:
            while (wait_s := pacer.wait_s()) is not None:
                gevent.sleep(wait_s)
                for due in pacer.due():
                    group.spawn(request, *due)
            group.join()
        finally:
            group.kill()
            done = PartRecords(start_s, records)
            if self._is_worker:
                self._environment.runner.send_message(_RECORDS_MESSAGE, msgspec.json.encode(done))
            else:
                self._take(done)

    def _on_records(self, msg, **_: object) -> None:
        self._take(msgspec.json.decode(msg.data, type=PartRecords))

    def _take(self, part: PartRecords) -> None:
        self._parts.append(part)
        if len(self._parts) == self._expected:
            self._collect()
            self._ended_s = time.monotonic()

    def _on_test_stop(self, **_: object) -> None:
        self._stop_sending()
        self._ended_s = None  # for the next test

    def _on_quit(self, **_: object) -> None:
        self._stop_sending()
        self._collect()

    def _stop_sending(self) -> None:
        """Return when no request is left. Locust may stop twice at once; a second kill would cut off the first's clean-up."""
        if self._sending is None:
            return
        if self._is_stopping:
            self._sending.join()
        else:
            self._is_stopping = True
            self._sending.kill()

    def _collect(self) -> None:
        """Sum the run up, once: log it, and write its files where asked for."""
        info, self._info = self._info, None
        parts, self._parts = self._parts, []
        if info is None:
            return
        if len(parts) < self._expected:
            log.warning("The records of %d of %d workers are missing", self._expected - len(parts), self._expected)
        records = sorted(
            (_moved(record, info.started_monotonic_s - part.start_s) for part in parts for record in part.records),
            key=lambda record: record.id,
        )
        summary = summarize_run(info, records)
        for line in describe(summary):
            log.info("%s", line)
        if not summary.valid:
            self._environment.process_exit_code = 1
        if self._environment.parsed_options.record:
            path = Path(self._environment.parsed_options.record)
            write_run(path, summary, records)
            log.info("Wrote %s and %s", path, summary_path(path))


def _moved(record: RequestRecord, by_s: float) -> RequestRecord:
    """The record with all its times moved: from a worker's monotonic clock to the master's."""
    record.intended_start_s += by_s
    record.start_s += by_s
    record.responses = [(at_s + by_s, tokens) for at_s, tokens in record.responses]
    record.end_s = None if record.end_s is None else record.end_s + by_s
    return record


def install() -> None:
    """Add the load's options to Locust's, and the dispatcher to every Locust process."""

    @events.init_command_line_parser.add_listener
    def _(parser) -> None:
        group = parser.add_argument_group("Load of BrownoutServe")
        add_load_arguments(group)
        group.add_argument("--grpc", default="127.0.0.1:8001", metavar="HOST:PORT", help="the server's gRPC address")

    @events.init.add_listener
    def _(environment: Environment, **_: object) -> None:
        environment.open_loop = OpenLoopTest(environment)
        # Python would raise KeyboardInterrupt in whatever greenlet runs, often inside gRPC, which swallows it; and a headless
        # Locust with a load shape has no handler for SIGTERM. A run that is ended so still writes its records.
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            gevent.signal_handler(signal_number, environment.runner.quit)
