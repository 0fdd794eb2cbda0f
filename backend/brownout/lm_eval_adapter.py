"""A model class for the lm-evaluation-harness (EleutherAI, package `lm-eval`, optional): its tasks under brownout.

python -m backend.brownout.lm_eval_adapter --model brownout --tasks piqa \\
    --model_args checkpoint=DIR,mechanism=united,way=8,threshold=0.4

The arguments are those of the harness. Everything runs through the serving engine with the given settings. A checkpoint that
was trained on chats needs --apply_chat_template.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from backend.brownout.measure import Meter, complete, nominal_share
from backend.brownout.settings import Settings
from backend.engine.detokenizer import Detokenizer
from backend.engine.llm import LLM
from backend.engine.sampling_params import SamplingParams
from backend.engine.scoring import Scorer
from backend.errors import ConfigError

try:
    from lm_eval.api.model import LM as _Base
    from lm_eval.api.registry import register_model
except ImportError:  # the methods work without the harness; only running its tasks needs it
    _Base = object

    def register_model(*names: str):
        return lambda cls: cls


@register_model("brownout")
class BrownoutLM(_Base):
    """The harness's three request types. Requests are objects with `args`, as the harness's Instance has them."""

    def __init__(
        self,
        checkpoint: str,
        mechanism: str = "united",
        way: int = 0,
        threshold: float | None = None,
        threshold_prefill: float = 1.0,
        threshold_decode: float = 1.0,
        similarity_min: float = 0.0,
        batch_size: int | str = 32,
        device: str | None = "auto",
        dtype: str = "auto",
        united: str = "",
        similarity: str = "",
        max_gen_toks: int = 256,
        **harness: Any,
    ) -> None:
        """`threshold` is that of both phases. Raises ConfigError for settings that the checkpoint cannot follow.

        `harness` takes what the harness adds by itself (max_batch_size); `device` None is auto, and so is a CUDA device where
        there is none, since the harness's command names cuda:0 unless it is told another.
        """
        super().__init__()
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "auto"
        if unknown := sorted(set(harness) - {"max_batch_size"}):
            raise ConfigError(f"unknown model argument {unknown[0]!r}")
        self.batch = 32 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_gen_toks = int(max_gen_toks)
        self.llm = LLM(
            checkpoint,
            max_running=self.batch,
            device=device,
            dtype=dtype,
            united=united,
            similarity=similarity,
        )
        both = (threshold_prefill, threshold_decode) if threshold is None else (threshold, threshold)
        self.llm.set_settings(
            Settings(
                threshold_prefill=float(both[0]), threshold_decode=float(both[1]), mechanism=mechanism, way=int(way),
                similarity_min=float(similarity_min),
            )
        )  # fmt: skip
        self.meter = Meter(self.llm.engine)
        self._checkpoint, self._templated = checkpoint, False

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-likelihood, and whether greedy decoding would say it."""
        sequences = []
        for request in requests:
            context, continuation = request.args
            before, after = self._encode_pair(context, continuation)
            ids = (before + after)[-self.llm.engine.max_model_len :]
            sequences.append((ids, max(1, len(ids) - len(after))))
        scored = self._score(sequences)
        return [(float(found.logprobs.sum()), bool(found.greedy.all())) for found in scored]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): its log-likelihood, in windows of the model's context that follow one another."""
        sequences, owners = [], []
        size = self.llm.engine.max_model_len - 1
        for owner, request in enumerate(requests):
            ids = [self._prefix(), *self._encode(request.args[0], special=False)]
            for start in range(1, len(ids), size):
                sequences.append((ids[start - 1 : start + size], 1))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, self._score(sequences), strict=True):
            totals[owner] += float(found.logprobs.sum())
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, arguments): what the model writes up to the first of `until`, which is left out.

        Like the harness's own models, it keeps a space before the first word: a task that compares answers exactly names the
        filter `remove_whitespace`.
        """
        texts = [""] * len(requests)
        kinds: dict[SamplingParams, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(self._params(dict(request.args[1])), []).append(number)
        for params, numbers in kinds.items():
            room = max(1, self.llm.engine.max_model_len - params.max_tokens)
            prompts = [(self._encode(requests[n].args[0]) or [self._prefix()])[-room:] for n in numbers]
            for number, text in zip(numbers, self._write(prompts, params), strict=True):
                texts[number] = text
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the checkpoint's template writes them, with its special tokens, for --apply_chat_template.

        Without `add_generation_prompt` the last message is the beginning of the answer.
        """
        self._templated = True
        return self.llm.tokenizer.apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template itself, for the harness's records; there is one for each checkpoint."""
        return self.llm.tokenizer.chat_template

    @property
    def tokenizer_name(self) -> str:
        return self._checkpoint.replace("/", "__")

    def steps(self) -> dict[str, float | bool | list[float]]:
        """Composition of all steps so far: share of replaced assignments, active slots, tokens per step."""
        return self.meter.result(nominal_share(self.llm.engine, 1, 0))

    def _write(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[str]:
        """Texts made from the prompts, each up to the first stop string."""
        texts = [""] * len(prompts)
        detokenizers = [Detokenizer(self.llm.tokenizer, params.stop) for _ in prompts]

        def is_enough(number: int, token: int) -> bool:
            texts[number] += detokenizers[number].append([token], False)
            return detokenizers[number].stopped

        complete(self.llm, prompts, params, self.meter.observe, is_enough)
        return [text + detokenizer.append([], True) for text, detokenizer in zip(texts, detokenizers, strict=True)]

    def _score(self, sequences: Sequence[tuple[list[int], int]]):
        self.llm.engine.blocks.clear_cache()
        return Scorer(self.llm.engine, self.batch, after_step=self.meter.observe).score(sequences)

    def _params(self, given: dict[str, Any]) -> SamplingParams:
        sampled = bool(given.get("do_sample", float(given.get("temperature") or 0.0) > 0.0))
        until = given.get("until") or ()
        most = int(given.get("max_gen_toks") or given.get("max_tokens") or self.max_gen_toks)
        return SamplingParams(
            max_tokens=max(1, min(most, self.llm.engine.max_model_len - 1)),
            temperature=float(given.get("temperature") or 1.0) if sampled else 0.0,
            top_p=float(given.get("top_p") or 1.0),
            stop=tuple(filter(None, [until] if isinstance(until, str) else until)),
            seed=0,
        ).validate()

    def _encode(self, text: str, special: bool = True) -> list[int]:
        """`special`: with the tokens that the checkpoint puts around a text, unless its chat template wrote them already."""
        return self.llm.tokenizer.encode(text, add_special_tokens=special and not self._templated)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness does: spaces at the context's end belong to the continuation; both are tokenized together."""
        if not context:
            return [self._prefix()], self._encode(continuation, special=False)
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        whole, before = self._encode(bare + continuation), self._encode(bare)
        return (whole[: len(before)], whole[len(before) :]) if before else ([self._prefix()], whole)

    def _prefix(self) -> int:
        """The token before a text that has no context: what the checkpoint begins texts with, else its end-of-text token."""
        begin = self.llm.tokenizer.encode("")
        token = begin[-1] if begin else self.llm.tokenizer.eos_token_id
        if token is None:
            raise ConfigError("the checkpoint names no end-of-text token, which stands before a text without context")
        return token


def main() -> int:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        print("The lm-evaluation-harness is not installed: pip install lm-eval", file=sys.stderr)
        return 1
    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
