"""A request between its arrival at the stub and its final response: what came from the engine and is not yet sent."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from backend.engine.detokenizer import Detokenizer
from backend.engine.request import FINISH_STOP, Outcome, TokenOutput
from backend.serving.parse import ParsedRequest
from backend.tokenizer import Tokenizer


@dataclass
class _Sequence:
    """Output of one of the n sequences."""

    detokenizer: Detokenizer
    text: str = ""  # detokenised, not sent
    token_ids: list[int] = field(default_factory=list)  # not detokenised yet
    num_unsent: int = 0  # tokens since the last response
    num_tokens: int = 0
    cumulative_logprob: float = 0.0
    logprobs: list[dict] = field(default_factory=list)  # of unsent tokens
    finish_reason: str = ""
    united_share: float = 0.0


@dataclass(frozen=True)
class Reply:
    """One response: output tensors by name, or an error message; `outcome` is set on the final one."""

    outputs: dict[str, np.ndarray]
    error: str | None
    outcome: Outcome | None
    num_tokens: int

    @property
    def final(self) -> bool:
        return self.outcome is not None


class LiveRequest:
    """Collects tokens and makes responses of them. Thread-safe: the client thread adds, the outbox thread takes.

    Hashable by identity. Ends exactly once: the first `final` Reply is the last one.
    """

    def __init__(
        self,
        request_id: int,
        parsed: ParsedRequest,
        prompt_text: str,
        num_prompt_tokens: int,
        tokenizer: Tokenizer,
        arrival: float,
    ) -> None:
        self.request_id = request_id
        self.parsed = parsed
        self.arrival = arrival
        self.sent_first = False
        self.last_sent_s = arrival
        self._prompt_text = prompt_text
        self.num_prompt_tokens = num_prompt_tokens
        self._lock = threading.Lock()
        params = parsed.params
        self._sequences = [
            _Sequence(Detokenizer(tokenizer, params.stop, min_tokens=params.min_tokens, continues=True))
            for _ in range(params.n)
        ]
        self._settings_version = 0
        self._error: tuple[Outcome, str] | None = None
        self._ended = False

    def overdue_s(self, now: float) -> float:
        """Seconds since its timeout has passed; negative before, and without one."""
        timeout_s = self.parsed.params.timeout_s
        return -math.inf if timeout_s is None else now - self.arrival - timeout_s

    @property
    def ended(self) -> bool:
        """Whether the final response has been taken."""
        return self._ended

    def add(self, token: TokenOutput, settings_version: int) -> tuple[bool, bool]:
        """Take in a token. Returns (is it urgent to respond, should this sequence be aborted in the engine)."""
        with self._lock:
            sequence = self._sequences[token.index]
            self._settings_version = settings_version
            if sequence.finish_reason:
                return False, False  # computed before the engine heard of the stop string
            first = not self.sent_first and sequence.num_tokens == 0
            sequence.num_tokens += 1
            sequence.num_unsent += 1
            sequence.united_share = token.united_share
            if token.logprob is not None:
                sequence.cumulative_logprob += token.logprob
                if self.parsed.return_logprobs:
                    sequence.logprobs.append(_logprob_entry(token, sequence.detokenizer.decode_token))
            sequence.token_ids.append(token.token_id)
            sequence.finish_reason = token.finish_reason or ""
            stopped = False
            if self.parsed.params.stop:
                self._detokenize(sequence)
                if sequence.detokenizer.stopped:
                    stopped = not sequence.finish_reason
                    sequence.finish_reason = FINISH_STOP
            finished = all(s.finish_reason for s in self._sequences)
            return finished or (first and self.parsed.stream), stopped

    def fail(self, outcome: Outcome, message: str, *, incomplete: bool = False) -> None:
        """End with an error; ignored if the request has finished, unless its text is `incomplete`: a part of it is lost."""
        with self._lock:
            if not self._ended and (incomplete or not all(s.finish_reason for s in self._sequences)):
                self._error = self._error or (outcome, message)

    def take(self) -> Reply | None:
        """The next response, or None if there is nothing (more) to say."""
        with self._lock:
            if self._ended:
                return None
            if self._error is not None:
                self._ended = True
                outcome, message = self._error
                return Reply({}, message, outcome, 0)
            final = all(s.finish_reason for s in self._sequences)
            if not final and not self.parsed.stream:
                return None
            num_tokens = sum(s.num_unsent for s in self._sequences)
            if not final and num_tokens == 0:
                return None
            for sequence in self._sequences:
                self._detokenize(sequence)
            outputs = self._outputs()
            for sequence in self._sequences:
                sequence.text, sequence.num_unsent, sequence.logprobs = "", 0, []
            self._ended = final
            return Reply(outputs, None, "completed" if final else None, num_tokens)

    def _detokenize(self, sequence: _Sequence) -> None:
        if sequence.token_ids or (sequence.finish_reason and not sequence.detokenizer.finished):
            sequence.text += sequence.detokenizer.append(sequence.token_ids, bool(sequence.finish_reason))
            sequence.token_ids = []

    def _outputs(self) -> dict[str, np.ndarray]:
        parsed, sequences = self.parsed, self._sequences
        prefix = self._prompt_text if parsed.echo_prompt else ""
        outputs = {"text_output": _strings(prefix + s.text for s in sequences)}
        if parsed.return_finish_reason:
            outputs["finish_reason"] = _strings(s.finish_reason for s in sequences)
        if parsed.return_cumulative_logprob:
            outputs["cumulative_logprob"] = np.array([s.cumulative_logprob for s in sequences], np.float32)
        if parsed.return_logprobs:
            outputs["logprobs"] = _strings(json.dumps(s.logprobs, ensure_ascii=False) for s in sequences)
        if parsed.return_num_input_tokens:
            outputs["num_input_tokens"] = np.array([self.num_prompt_tokens], np.uint32)
        if parsed.return_num_output_tokens:
            outputs["num_output_tokens"] = np.array([s.num_unsent for s in sequences], np.uint32)
        if parsed.return_brownout:
            outputs["brownout"] = _strings(
                json.dumps({"settings_version": self._settings_version, "united_share": s.united_share})
                for s in sequences
            )
        return outputs


def _logprob_entry(token: TokenOutput, decode: Callable[[int], str]) -> dict:
    """Log-probabilities at one position, as vLLM's Triton backend writes them: {id: {logprob, rank, decoded_token}}."""
    chosen = {"logprob": token.logprob, "rank": token.rank, "decoded_token": decode(token.token_id)}
    entry = {str(token.token_id): chosen}
    for rank, (token_id, logprob) in enumerate(token.top or (), start=1):
        entry.setdefault(str(token_id), {"logprob": logprob, "rank": rank, "decoded_token": decode(token_id)})
    return entry


def _strings(values) -> np.ndarray:
    return np.array([value.encode("utf-8") for value in values], dtype=np.object_)
