"""Early refusal: which of the requests that have just come cannot get their first token in time, and who gives way to whom.

A refusal is worth something only at once, while its client can still go elsewhere. So a request is judged when it comes, by
the stub (`admission`) and, where that cannot tell, by the engine before its next step. The engine also takes back what a stub
let pass a moment ago, if things have turned worse. One that was accepted is served, late if need be, unless a more important
one takes its place.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from backend.brownout.queue_model import EngineLoad
from backend.brownout.step_model import Slowed, StepModel
from backend.engine.request import Request

#: Share of the limit that is kept for what the step model does not know, and how it changes: see Margin.
_MARGIN = (0.15, 0.5)
_MARGIN_GAIN = 0.02
_LATE_SHARE = 0.02
#: A refusal is to be with its client within 0.1 s, both ways included. Who was let pass longer ago than this is served.
REFUSED_WITHIN_S = 0.07


@dataclass(frozen=True)
class Waiting:
    """A request without a token yet. `never` (full quality wanted) and a lower `priority` number make it more important.

    `judged`: its stub let it pass, going by the queue as it was when the request came. `accepted`: so did the engine, or it
    was too late to say otherwise.
    """

    request_id: object
    age_s: float
    tokens: int
    never: bool = False
    priority: int = 0
    accepted: bool = False
    judged: bool = False

    @classmethod
    def of(cls, request: Request, now: float) -> Waiting:
        """`now` is time.monotonic()."""
        params = request.params
        return cls(
            request.request_id,
            now - request.arrival,
            len(request.prompt_ids),
            params.brownout == "never",
            params.priority,
            request.accepted or (request.judged and now - request.arrival > REFUSED_WITHIN_S),
            request.judged,
        )


@dataclass(frozen=True)
class Refusal:
    """A request that is to be refused, and after how long from its arrival its first token would have come."""

    request_id: object
    expected_s: float


class Pace(NamedTuple):
    """How fast the engine goes through its queue at the present thresholds; see `queue_model.first_token_s`."""

    #: Prefill tokens of a full step; seconds of steps with one of them, with each more, and with all.
    chunk: int
    one_s: float
    token_s: float
    full_s: float
    #: Sequences that could run besides those that do.
    free: int
    #: Between two sequences that finish when as many run as can.
    finish_s: float

    @classmethod
    def of(cls, model: StepModel | Slowed, load: EngineLoad, theta_prefill: float, theta_decode: float) -> Pace:
        decodes = min(load.running, load.max_batch_tokens - 1)
        chunk = load.max_batch_tokens - decodes
        beside, most = load.full_step
        steps_s = model.predict_s([1, chunk, beside], [decodes, decodes, most], theta_prefill, theta_decode)
        one, full, typical = map(float, steps_s)
        finish_s = typical * load.mean_output_tokens / most
        return cls(chunk, one, (full - one) / max(chunk - 1, 1), full, load.slots - load.running, finish_s)

    def first_token_s(self, tokens: int, ahead: int) -> float:
        """From now, for a request with so many tokens up to and with its own, and so many requests before it."""
        chunks, rest = divmod(tokens, self.chunk)
        prefill_s = chunks * self.full_s + (self.one_s + (rest - 1) * self.token_s if rest else 0.0)
        return max(prefill_s, (ahead + 1 - self.free) * self.finish_s)


class Margin:
    """Share of the limit that is kept free: for noise, and for the way from and to the client.

    It finds its own size: first tokens that come late raise it, others lower it, so that a certain share of them is late.
    """

    def __init__(self) -> None:
        self.share = _MARGIN[0]

    def served(self, late: bool) -> None:
        """A first token has reached its client, late or in time."""
        self.share = min(max(self.share + _MARGIN_GAIN * (late - _LATE_SHARE), _MARGIN[0]), _MARGIN[1])


def late_requests(
    pace: Pace, started_tokens: int, waiting: Sequence[Waiting], limit_s: float, margin: float = 0.0
) -> list[Refusal]:
    """Whom to refuse so that the others are in time; `waiting` in the order of service.

    After Moore and Hodgson: walk along the queue, and where one would be late give up the least important so far, `auto`
    before `never`, then the highest priority number, then those not accepted before, then the last in the queue. What is new
    counts as late beyond (1 - margin) of the limit; what its stub has judged, beyond the limit, so that it goes only if things
    have turned out worse; what was accepted, beyond the limit or beyond when it would be served without the new ones, so that
    it never goes for being late alone. `started_tokens` are still to be computed for requests that are no longer waiting.
    """
    if all(request.accepted for request in waiting):
        return []
    refusals: list[Refusal] = []
    tokens, ahead = started_tokens, 0
    old_tokens, old_ahead = started_tokens, 0
    kept: list[tuple[bool, int, bool, int, Waiting]] = []
    for position, request in enumerate(waiting):
        if request.accepted:
            old_tokens += request.tokens
            allowed_s = max(limit_s, request.age_s + pace.first_token_s(old_tokens, old_ahead))
            old_ahead += 1
        else:
            allowed_s = limit_s if request.judged else limit_s * (1 - margin)
            alone_s = request.age_s + pace.first_token_s(started_tokens + request.tokens, 0)
            if alone_s > allowed_s:
                refusals.append(Refusal(request.request_id, alone_s))
                continue
        tokens += request.tokens
        heapq.heappush(kept, (request.never, -request.priority, request.accepted, -position, request))
        while (expected_s := request.age_s + pace.first_token_s(tokens, ahead)) > allowed_s:
            given_up = heapq.heappop(kept)[-1]
            tokens -= given_up.tokens
            refusals.append(Refusal(given_up.request_id, expected_s))
            if given_up is request:
                break
            ahead -= 1
        else:
            ahead += 1
    return refusals
