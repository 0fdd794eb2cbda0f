"""Text in, text out, in one process and without Triton: `LLM("dummy:cpu-s").generate(["Hello"])`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from backend.brownout.settings import Settings
from backend.config import EngineConfig
from backend.engine.detokenizer import Detokenizer
from backend.engine.engine import Engine
from backend.engine.request import FINISH_STOP, Request, RequestEnded
from backend.engine.sampling_params import SamplingParams
from backend.tokenizer import load_tokenizer


@dataclass
class Completion:
    """One sequence made from a prompt."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    cumulative_logprob: float | None = None
    #: Share of the sequence's routed assignments that united experts (or whatever replaces experts) served.
    united_share: float = 0.0


class LLM:
    """An Engine with its tokenizer. Takes the parameters of EngineConfig as keywords."""

    def __init__(self, checkpoint: str, **parameters: object) -> None:
        self.engine = Engine(EngineConfig(checkpoint=checkpoint, **parameters))  # type: ignore[arg-type]
        self.tokenizer = load_tokenizer(checkpoint, self.engine.vocab_size)

    def set_settings(self, settings: Settings) -> None:
        """Change the brownout settings; they act in the next step."""
        self.engine.set_settings(settings)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | None = None
    ) -> list[list[Completion]]:
        """Complete prompts (texts or token ids) together; for each, `params.n` completions.

        Raises InvalidRequestError for an unusable prompt or parameter; nothing is computed then.
        """
        completions = [[Completion() for _ in range((params or SamplingParams()).n)] for _ in prompts]
        for number, index, piece in self.stream(prompts, params):
            done = completions[number][index]
            done.text += piece.text
            done.token_ids += piece.token_ids
            done.finish_reason = piece.finish_reason
            done.united_share = piece.united_share
            if piece.cumulative_logprob is not None:
                done.cumulative_logprob = (done.cumulative_logprob or 0.0) + piece.cumulative_logprob
        return completions

    def stream(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | None = None
    ) -> Iterator[tuple[int, int, Completion]]:
        """Like `generate`, but yields (prompt number, sequence index, what is new) token by token.

        Raises RuntimeError if the engine ends a request with an error (a timeout, say); the others are aborted then.
        """
        params = (params or SamplingParams()).validate()
        requests = [
            Request(number, self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt), params)
            for number, prompt in enumerate(prompts)
        ]
        for request in requests:
            self.engine.check(request)
        detokenizers = {
            (number, index): Detokenizer(self.tokenizer, params.stop, min_tokens=params.min_tokens, continues=True)
            for number in range(len(requests))
            for index in range(params.n)
        }
        waiting = iter(requests)
        pending: Request | None = next(waiting, None)
        try:
            while pending is not None or self.engine.has_work:
                while pending is not None and self.engine.has_room:
                    self.engine.add(pending)
                    pending = next(waiting, None)
                for event in self.engine.step():
                    if isinstance(event, RequestEnded):
                        raise RuntimeError(f"prompt {event.request_id}: {event.message}")
                    detokenizer = detokenizers[event.request_id, event.index]
                    text = detokenizer.append([event.token_id], event.finish_reason is not None)
                    reason = event.finish_reason or ""
                    if detokenizer.stopped:
                        reason = FINISH_STOP
                        self.engine.abort(event.request_id, event.index)
                    piece = Completion(text, [event.token_id], reason, event.logprob, event.united_share)
                    yield event.request_id, event.index, piece
        finally:
            for request in requests:
                self.engine.abort(request.request_id)
