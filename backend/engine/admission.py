"""Refusal at the door: whether a request is worth sending to an engine, decided in the stub when it comes.

An engine judges between two steps, so that its refusals take as long as the step that is running. It therefore says at the
beginning of each step how its queue will stand (QueueState, in the shared block), and a stub goes by that and by what it has
sent since. It refuses what the engine would refuse; where it cannot tell, the engine decides.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from backend.engine.sampling_params import SamplingParams
from backend.engine.shedding import Pace
from backend.errors import UnavailableError


class QueueState(NamedTuple):
    """An engine's queue when a step begins. Times are time.monotonic(), in seconds."""

    generation: int
    #: Arrival of the latest request that has come: a stub's requests come in order, so its earlier ones are in here, too.
    seen_s: float
    #: When the step is expected to end, and the tokens still to be computed then for requests that are here.
    ready_s: float
    tokens: int
    #: Requests without a token; the highest priority number among them, and whether one of them may be browned out.
    waiting: int
    max_priority: int
    any_auto: bool
    #: Time to the first token beyond which a request is refused; infinite if nothing is refused early.
    allowed_s: float
    #: From one request's end to the next one's, lately; NaN if unknown.
    request_s: float
    pace: Pace


class TooLate(UnavailableError):
    """The first token would come too late."""


def queue_full(max_waiting: int, waiting: int, request_s: float | None) -> str:
    """What is said when max_waiting requests or more wait, namely `waiting`, and one ends every `request_s`."""
    hint = "" if request_s is None else f"; retry in about {max(1, round(waiting * request_s))} s"
    return f"the queue is full: {max_waiting} requests wait (max_waiting){hint}"


def too_late(expected_s: float, limit_s: float) -> str:
    """What is said when the first token would come `expected_s` after arrival."""
    return (
        f"the server is overloaded: the first token would come after about {expected_s:.2g} s, too late for "
        f"{limit_s:g} s (shed_ttft_s); retry in about {max(1, round(expected_s))} s"
    )


class _Sent(NamedTuple):
    arrival_s: float
    tokens: int
    priority: int
    auto: bool


class Gate:
    """A stub's door to one engine. Not thread-safe."""

    def __init__(self, max_waiting: int, limit_s: float | None) -> None:
        self._max_waiting, self._limit_s = max_waiting, limit_s
        #: What the engine's state does not contain yet.
        self._sent: deque[_Sent] = deque()

    def admit(self, state: QueueState, tokens: int, params: SamplingParams, arrival_s: float, now_s: float) -> bool:
        """Let a request with so many prompt tokens pass; whether it has been judged, or the engine is to do that.

        Raises TooLate, or UnavailableError when the queue is full.
        """
        judged = self.judge(state, tokens, params, arrival_s, now_s)
        self._sent.append(_Sent(arrival_s, tokens, params.priority, params.brownout != "never"))
        return judged

    def judge(self, state: QueueState, tokens: int, params: SamplingParams, arrival_s: float, now_s: float) -> bool:
        """What `admit` would say; the request is not counted."""
        sent = self._sent
        while sent and sent[0].arrival_s <= state.seen_s:
            sent.popleft()
        pace = state.pace
        # As many as can run may start in this step and leave the queue.
        waiting = max(0, state.waiting - max(0, pace.free)) + len(sent)
        if waiting >= self._max_waiting:
            request_s = None if math.isnan(state.request_s) else state.request_s
            raise UnavailableError(queue_full(self._max_waiting, waiting, request_s))
        auto = params.brownout != "never"
        judged = (
            self._limit_s is not None and math.isfinite(state.allowed_s) and self._is_last(state, params.priority, auto)
        )
        if judged:
            all_tokens = state.tokens + sum(request.tokens for request in sent) + tokens
            to_step_s = max(0.0, state.ready_s - now_s)
            expected_s = now_s - arrival_s + to_step_s + pace.first_token_s(all_tokens, state.waiting + len(sent))
            if expected_s > state.allowed_s:
                raise TooLate(too_late(expected_s, self._limit_s))
        return judged

    def _is_last(self, state: QueueState, priority: int, auto: bool) -> bool:
        """Whether such a request is served after all others that wait, and none of them would give way to it."""
        last = priority >= max([state.max_priority, *(request.priority for request in self._sent)])
        return last and (auto or not (state.any_auto or any(request.auto for request in self._sent)))
