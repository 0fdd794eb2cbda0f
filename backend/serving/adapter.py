"""The Triton Python models `moe_llm` and `moe_llm_infer`: translation between Triton and the engine, nothing else.

A request's life: `execute` parses it, tokenises it and sends it to an engine; the engine's tokens come to the client
thread, which adds them to the LiveRequest and marks it in the outbox; the outbox thread makes responses and hands them to
Triton. `execute` never waits for a token.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path

import msgspec

from backend.config import EngineConfig
from backend.engine.prompt import check_prompt
from backend.engine.request import Outcome, timed_out
from backend.errors import ConfigError, InvalidRequestError, UnavailableError
from backend.serving.client import EngineClient
from backend.serving.live_request import LiveRequest, Reply
from backend.serving.metrics import Metrics
from backend.serving.model_parameters import ENGINE_MODEL, engine_parameters
from backend.serving.outbox import Outbox
from backend.serving.parse import parse_request
from backend.serving.prompt_length import PromptLengths
from backend.serving.protocol import Outputs, give_up, replace_file, runtime_dir
from backend.serving.server_watch import end_stub
from backend.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

#: Together about a tenth of the processors, for stub, server and a client beside them (docs/results/cpu.md).
RESPONSES_PER_S_AND_CORE = 150
#: How often each request is asked about; an inter-process call each.
_WATCH_PERIOD_S = 0.4
#: A request whose timeout has passed by so much is ended here: its engine has had the time to do so.
_TIMEOUT_GRACE_S = 5.0


class _Sender:
    """A request's response sender. Not to be asked about cancellation once the final response has gone or while it goes:

    Triton frees the request then and would crash, the whole server with it.
    """

    def __init__(self, sender) -> None:
        self._sender = sender
        self._lock = threading.Lock()
        self._closed = False

    def send(self, response, flags: int) -> None:
        """Hand a response to Triton; with flags it is the final one."""
        with self._lock:
            self._closed = bool(flags)
            self._sender.send(response, flags=flags)

    def is_cancelled(self) -> bool:
        with self._lock:
            return not self._closed and self._sender.is_cancelled()


class MoeLlmModel:
    """One stub's part of a model. `decoupled` models answer with any number of responses, others with one."""

    def __init__(self, pb_utils, args: Mapping[str, str]) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s stub %(levelname)s %(message)s", stream=sys.stderr)
        self._pb_utils = pb_utils
        self._name, version = args["model_name"], args["model_version"]
        model_config = json.loads(args["model_config"])
        self._decoupled = bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))
        try:
            config = EngineConfig.from_parameters(engine_parameters(self._name, model_config, args))
            self._start(config, version)
        except ConfigError as error:
            raise pb_utils.TritonModelException(f"{self._name}: {error}") from None

    def _start(self, config: EngineConfig, version: str) -> None:
        self._runtime_dir = runtime_dir()
        self._live: dict[int, tuple[LiveRequest, _Sender]] = {}
        self._live_lock = threading.Lock()
        self._ids = itertools.count()
        self._closed = threading.Event()
        self._client = EngineClient(
            self._name, config, self._runtime_dir, os.getppid(), self._on_outputs, self._on_lost
        )
        info = self._client.start()
        self._max_model_len, self._vocab_size = info.max_model_len, info.vocab_size
        try:
            self._tokenizer = load_tokenizer(config.checkpoint, info.vocab_size)
        except ConfigError:
            self._client.close()
            raise
        rate = config.max_responses_per_s or RESPONSES_PER_S_AND_CORE * (os.cpu_count() or 1)
        self._outbox: Outbox[LiveRequest] = Outbox(self._deliver, rate, attrgetter("last_sent_s"))
        self._metrics = Metrics(self._pb_utils, self._name, version, engine_wide=self._name == ENGINE_MODEL)
        self._lengths = PromptLengths()
        self._request_watch = threading.Thread(target=self._watch_requests, name="request-watch", daemon=True)
        self._outbox.start()
        self._metrics.start(self._client.stats)
        self._request_watch.start()
        # Going through all that is loaded would hold up every request for 100 ms of processor time.
        gc.collect()
        gc.freeze()
        mark = {"pid": os.getpid(), "model": self._name}
        replace_file(self._mark_path(), msgspec.json.encode(mark))

    def execute(self, requests: list) -> None:
        """Take requests from Triton; every one gets its responses later, through its response sender."""
        for request in requests:
            sender = _Sender(request.get_response_sender())
            try:
                self._accept(request, sender)
            except InvalidRequestError as error:
                self._refuse(sender, "invalid", str(error))
            except UnavailableError as error:
                self._refuse(sender, "rejected", str(error))
            except Exception as error:
                log.exception("a request could not be taken")
                self._refuse(sender, "failed", f"the request could not be taken: {error}")

    def finalize(self) -> None:
        self._closed.set()
        for live, _ in self._snapshot():
            live.fail("lost", "the model is being unloaded")
            self._outbox.mark(live, urgent=True)
        self._outbox.close()
        self._client.close()
        self._metrics.close()
        self._mark_path().unlink(missing_ok=True)

    def _accept(self, request, sender: _Sender) -> None:
        arrival = time.monotonic()
        parsed = parse_request(request, self._decoupled)
        params = parsed.engine_params
        if parsed.input_ids is None:
            prompt_text = parsed.text
            # Tokenizing costs more than the rest of a refusal; a prompt that may be too long is told so first.
            if self._tokenizer.most_tokens(prompt_text) < self._max_model_len:
                self._client.check(*self._lengths.guess(prompt_text), params, arrival)
            prompt_ids = self._tokenizer.encode(prompt_text)
            self._lengths.observe(prompt_text, len(prompt_ids))
        else:
            prompt_ids = parsed.input_ids
            prompt_text = ""
        check_prompt(prompt_ids, self._max_model_len, self._vocab_size)
        if parsed.input_ids is not None and parsed.echo_prompt:
            prompt_text = self._tokenizer.decode(prompt_ids, skip_special_tokens=True)
        request_id = next(self._ids)
        live = LiveRequest(request_id, parsed, prompt_text, len(prompt_ids), self._tokenizer, arrival)
        with self._live_lock:
            self._live[request_id] = (live, sender)
        try:
            self._client.submit(request_id, prompt_ids, params, arrival)
        except UnavailableError:
            with self._live_lock:
                del self._live[request_id]
            raise

    def _refuse(self, sender: _Sender, outcome: Outcome, message: str) -> None:
        self._metrics.ended(outcome, 0, None)
        self._send_last(sender, Reply({}, message, outcome, 0))

    def _on_outputs(self, outputs: Outputs) -> None:
        """Called by the client thread with one engine step's news."""
        for token in outputs.tokens:
            live = self._find(token.request_id)
            if live is None:
                continue
            try:
                urgent, stopped = live.add(token, outputs.settings_version)
            except Exception as error:
                self._break_off(live, f"a token could not be taken in: {error}")
                continue
            if stopped:
                self._client.abort(token.request_id, token.index)
            if urgent or live.parsed.stream:
                self._outbox.mark(live, urgent)
        for ended in outputs.ended:
            live = self._find(ended.request_id)
            if live is not None:
                live.fail(ended.outcome, ended.message)
                self._outbox.mark(live, urgent=True)

    def _on_lost(self, request_ids: list[int], reason: str) -> None:
        for request_id in request_ids:
            live = self._find(request_id)
            if live is not None:
                live.fail("lost", reason)
                self._outbox.mark(live, urgent=True)

    def _deliver(self, live: LiveRequest) -> None:
        """Called by the outbox thread: hand the request's next response to Triton."""
        try:
            reply = live.take()
        except Exception as error:
            self._break_off(live, f"a response could not be made: {error}")
            return
        if reply is None:
            return
        with self._live_lock:
            _, sender = self._live[live.request_id]
            if reply.final:
                del self._live[live.request_id]
        if reply.final:
            try:
                self._book(live, self._send_last(sender, reply))
            finally:
                self._client.forget(live.request_id)
            return
        try:
            self._send(sender, reply)
        except Exception as error:
            self._break_off(live, f"a response could not be handed over: {error}")
        else:
            self._book(live, reply)

    def _break_off(self, live: LiveRequest, message: str) -> None:
        """To be called where an error is handled: this request cannot go on; the others can."""
        log.exception("a request is ended: %s", message)
        self._client.abort(live.request_id)
        live.fail("failed", message, incomplete=True)
        self._outbox.mark(live, urgent=True)

    def _book(self, live: LiveRequest, reply: Reply) -> None:
        """Stamp the latencies of a response that has just been handed to Triton."""
        now = time.monotonic()
        if reply.error is None:
            first = live.parsed.stream and not live.sent_first
            ttft_s = now - live.arrival if first else None
            if ttft_s is not None:
                self._metrics.first_response(ttft_s)
            gap_s = now - live.last_sent_s if live.sent_first else None
            self._metrics.tokens(reply.num_tokens, gap_s)
            self._client.served(live.request_id, reply.num_tokens, ttft_s, gap_s)
        live.sent_first, live.last_sent_s = True, now
        if reply.outcome is not None:
            self._metrics.ended(
                reply.outcome, live.num_prompt_tokens, now - live.arrival if reply.error is None else None
            )

    def _send(self, sender: _Sender, reply: Reply) -> None:
        pb_utils = self._pb_utils
        if reply.error is not None:
            error = pb_utils.TritonError(reply.error, getattr(pb_utils.TritonError, _ERROR_CODES[reply.outcome]))
            response = pb_utils.InferenceResponse(output_tensors=[], error=error)
        else:
            response = pb_utils.InferenceResponse(
                output_tensors=[pb_utils.Tensor(name, value) for name, value in reply.outputs.items()]
            )
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if reply.final else 0
        sender.send(response, flags)

    def _send_last(self, sender: _Sender, reply: Reply) -> Reply:
        """Hand over a final response, or an error in its place. Returns what was handed over."""
        try:
            self._send(sender, reply)
            return reply
        except Exception as error:
            log.exception("a final response could not be handed over")
            if reply.error is None:
                reply = Reply({}, f"the final response could not be handed over: {error}", "failed", 0)
        final = self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        for attempt in (lambda: self._send(sender, reply), lambda: sender.send(None, final)):
            with contextlib.suppress(Exception):
                attempt()
                return reply
        # Triton's sender counts as closed from the first attempt on if that failed for want of shared memory. Nothing but the
        # end of the server ends the request then; the launcher brings one with new shared memory up.
        end_stub("a request cannot be ended")
        return reply

    def _watch_requests(self) -> None:
        while not self._closed.is_set():
            started = time.monotonic()
            try:
                self._end_early_ones()
                self._give_up_if_hopeless()
            except Exception:
                log.exception("the requests could not be looked after; the next pass tries again")
            self._closed.wait(max(0.0, started + _WATCH_PERIOD_S - time.monotonic()))

    def _end_early_ones(self) -> None:
        """End requests whose client has gone (an inter-process call each, so off the step path) or whose time is over."""
        unknown: list[Exception] = []
        for live, sender in self._snapshot():
            # The engine ends them itself between two steps, unless one of these does not end.
            if live.overdue_s(time.monotonic()) > _TIMEOUT_GRACE_S:
                self._end_early(live, "timeout", timed_out(live.parsed.params.timeout_s))
                continue
            try:
                cancelled = not live.ended and sender.is_cancelled()
            except Exception as error:
                unknown.append(error)
                continue
            if cancelled:
                self._end_early(live, "cancelled", "the request was cancelled by its client")
        if unknown:
            log.error("%d requests could not be asked whether they are cancelled: %s", len(unknown), unknown[0])

    def _end_early(self, live: LiveRequest, outcome: Outcome, message: str) -> None:
        self._client.abort(live.request_id)
        live.fail(outcome, message)
        self._outbox.mark(live, urgent=True)

    def _give_up_if_hopeless(self) -> None:
        """Unload the model once the engine has failed for good, so that the server stops reporting it as ready.

        The launcher, where there is one, is told why and ends the server.
        """
        if self._client.failure and not self._closed.is_set():
            log.error("%s is unloaded: %s", self._name, self._client.failure)
            self._closed.set()
            try:
                give_up(self._runtime_dir, f"{self._name}: {self._client.failure}")
            except OSError as error:
                log.error("the launcher could not be told: %s", error)
            try:
                self._pb_utils.unload_model(self._name)
            except Exception as error:
                log.error("%s could not be unloaded (it needs explicit model control): %s", self._name, error)

    def _find(self, request_id: int) -> LiveRequest | None:
        entry = self._live.get(request_id)
        return None if entry is None else entry[0]

    def _snapshot(self) -> list[tuple[LiveRequest, _Sender]]:
        with self._live_lock:
            return list(self._live.values())

    def _mark_path(self) -> Path:
        """Tells the launcher that this process serves a model (see protocol.py)."""
        return self._runtime_dir / f"stub-{os.getpid()}.json"


#: Names in pb_utils.TritonError; Triton has no code of its own for a deadline.
_ERROR_CODES = {
    "invalid": "INVALID_ARG",
    "rejected": "UNAVAILABLE",
    "timeout": "UNAVAILABLE",
    "lost": "UNAVAILABLE",
    "cancelled": "CANCELLED",
    "failed": "INTERNAL",
}
