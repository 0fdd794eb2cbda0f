"""The engine's nouns: a request, its sequences, and what the engine says about them."""

from __future__ import annotations

import secrets
import time
from array import array
from collections.abc import Sequence as SequenceOf
from typing import Literal

import msgspec

from backend.brownout.settings import NEVER
from backend.engine.sampling_params import SamplingParams

FINISH_STOP = "stop"
FINISH_LENGTH = "length"

#: Seconds of arrival time that one priority step is worth. A static sort key (arrival + priority * this) lets urgent
#: requests overtake, yet no request waits behind an endless stream of them.
PRIORITY_STEP_S = 10.0

_SEED_MIX = 0x9E3779B97F4A7C15


class Sequence:
    """One stream of tokens: the prompt, then what was sampled.

    `tokens[:num_computed]` have their keys and values in `blocks`; the scheduler lets computed tokens catch up with known
    ones. `blocks` only grow until a preemption or the end takes them all. `hashes` are the chain hashes of the full blocks
    known so far (see BlockManager). `pristine` tells that no block so far holds keys and values that brownout touched.
    `num_reused` counts tokens found in the prefix cache less those computed again after a preemption, `num_replaced` the
    assignments of computed tokens that other than their own experts served.
    """

    __slots__ = (
        "blocks",
        "finish_reason",
        "hashes",
        "index",
        "never_browned",
        "num_computed",
        "num_prompt",
        "num_published",
        "num_replaced",
        "num_reused",
        "pristine",
        "request",
        "seed",
        "sort_key",
        "tokens",
    )

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.tokens = array("q", request.prompt_ids)
        self.num_prompt = len(request.prompt_ids)
        self.num_computed = 0
        self.num_published = 0
        self.never_browned = request.params.brownout == "never"
        self.pristine = True
        self.num_reused = 0
        self.num_replaced = 0
        self.blocks = array("i")
        self.hashes: list[bytes] = []
        self.finish_reason: str | None = None
        self.seed = (request.seed + index * _SEED_MIX) % 2**64
        self.sort_key = (request.sort_key, request.number, index)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_run(self) -> int:
        """Tokens that were computed for this sequence, also again after a preemption."""
        return self.num_computed - self.num_reused

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def prompt_computed(self) -> bool:
        return self.num_computed >= self.num_prompt

    def token_class(self, count: int) -> int:
        """Class (index into TOKEN_CLASSES) of the next `count` tokens.

        A decode token is one that was sampled and is computed alone; recomputation after preemption is prefill.
        """
        return (count == 1 and self.prompt_computed) + (NEVER if self.never_browned else 0)


class Request:
    """A prompt with its sampling parameters and `n` sequences; `arrival` is time.monotonic().

    Token ids of what has been queued are in arrays: garbage collection goes through every item of a list, which takes long
    when thousands of requests wait.
    """

    _counter = 0

    def __init__(
        self, request_id: object, prompt_ids: SequenceOf[int], params: SamplingParams, arrival: float | None = None
    ) -> None:
        Request._counter += 1
        self.request_id = request_id
        self.number = Request._counter
        self.prompt_ids = prompt_ids
        self.params = params
        self.arrival = time.monotonic() if arrival is None else arrival
        self.deadline = None if params.timeout_s is None else self.arrival + params.timeout_s
        self.sort_key = self.arrival + params.priority * PRIORITY_STEP_S
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._sequences: tuple[Sequence, ...] | None = None
        #: Sequences 1 … n-1 start when the first has computed the prompt: they find it in the prefix cache.
        self.siblings_started = False
        #: Early refusal has let it pass: in the stub, in the engine. See `backend.engine.shedding`.
        self.judged = False
        self.accepted = False

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Made when they are first asked for, so never for a request that is refused, and none once it has ended.

        They refer to the request: as long as it refers to them, too, only garbage collection could free the two.
        """
        if self._sequences is None:
            self.prompt_ids = array("q", self.prompt_ids)
            self._sequences = tuple([Sequence(self, index) for index in range(self.params.n)])
        return self._sequences

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)

    def end(self) -> None:
        """Let go of the sequences, which have finished."""
        self._sequences = ()


class TokenOutput(msgspec.Struct, array_like=True, omit_defaults=True):
    """One new token of one sequence. `top` lists (token id, log-probability) of the best tokens, if asked for."""

    request_id: object
    index: int
    token_id: int
    finish_reason: str | None = None
    logprob: float | None = None
    rank: int | None = None
    top: list[tuple[int, float]] | None = None
    #: Share of the sequence's routed assignments so far that united experts (or whatever replaces experts) served.
    united_share: float = 0.0


#: How a request can end; also the labels of moe_requests_total.
Outcome = Literal["completed", "invalid", "rejected", "timeout", "cancelled", "lost", "failed"]


def timed_out(timeout_s: float) -> str:
    """What a request is told whose time is over."""
    return f"the request timed out after {timeout_s:g} s (timeout_s)"


class RequestEnded(msgspec.Struct, array_like=True):
    """A request that ends without (further) tokens."""

    request_id: object
    outcome: Outcome
    message: str
