"""What a caller may ask of the sampler; values are checked by `backend.serving.parse` and by `validate`."""

from __future__ import annotations

import math
import reprlib
from typing import Literal

import msgspec

from backend.errors import InvalidRequestError

#: Upper bound of counts and ids, so that they are 32-bit integers everywhere.
MAX_COUNT = 2**31 - 1
MAX_N = 64
MAX_LOGPROBS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 256
#: A step of priority is worth seconds of arrival time (backend.engine.request); beyond this it would mean starvation.
MAX_PRIORITY = 100
#: Temperatures below this are greedy: dividing by them would leave float32's range.
GREEDY_BELOW = 1e-5


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request; names and meanings as in vLLM unless said otherwise.

    `temperature` 0 or `top_k` 1 is greedy; `top_k` 0 or -1 and `top_p` 1 and `min_p` 0 are off. Filters act in the
    order temperature, top_k, top_p, min_p; of equally likely tokens the lowest ids stay. The penalties act on the
    logits first: repetition over prompt and output, presence and frequency over the output. Until `min_tokens` are made
    no stop token is chosen. `logprobs` asks for the N best log-probabilities beside the chosen token's (None: none).
    `brownout` "never" keeps the request on its original experts. `priority`: lower goes first. `timeout_s` counts from
    arrival.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    priority: int = 0
    brownout: Literal["auto", "never"] = "auto"
    timeout_s: float | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken: temperature (almost) 0, or top_k 1."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    def validate(self) -> SamplingParams:
        """Return the same parameters with their exact types.

        Raises:
            InvalidRequestError: naming the first key of a wrong type or out of range, and what is allowed.
        """

        try:
            if isinstance(self.brownout, str):  # the conversion would not say what is allowed
                self._check_brownout()
            checked = msgspec.convert(msgspec.structs.asdict(self), SamplingParams)
        except msgspec.ValidationError as error:
            reason, _, path = str(error).partition(" - at ")
            raise InvalidRequestError(f"{path.strip('`$.')}: {reason}") from None
        checked.check_ranges()
        return checked

    def check_ranges(self) -> None:
        """`validate` for parameters that have their exact types.

        Raises:
            InvalidRequestError: naming the first key out of range, and what is allowed.
        """
        check = self._check
        self._check_brownout()
        for key in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            check(math.isfinite(getattr(self, key)), key, "a finite number")
        check(1 <= self.max_tokens <= MAX_COUNT, "max_tokens", f"between 1 and {MAX_COUNT}")
        check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", f"between 0 and max_tokens ({self.max_tokens})")
        check(0 <= self.temperature <= 100, "temperature", "between 0 and 100")
        check(0 < self.top_p <= 1, "top_p", "greater than 0 and at most 1")
        check(-1 <= self.top_k <= MAX_COUNT, "top_k", f"-1 or 0 (off) or a number up to {MAX_COUNT}")
        check(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        check(0 < self.repetition_penalty <= 100, "repetition_penalty", "greater than 0 and at most 100")
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "between -2 and 2")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "between -2 and 2")
        check(self.seed is None or 0 <= self.seed < 2**63, "seed", "between 0 and 2^63 - 1")
        check(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings")
        check(all(self.stop), "stop", "made of non-empty strings")
        check(len(self.stop_token_ids) <= MAX_STOP_TOKENS, "stop_token_ids", f"at most {MAX_STOP_TOKENS} ids")
        check(all(0 <= t <= MAX_COUNT for t in self.stop_token_ids), "stop_token_ids", f"made of ids up to {MAX_COUNT}")
        check(self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"between 0 and {MAX_LOGPROBS}")
        check(1 <= self.n <= MAX_N, "n", f"between 1 and {MAX_N}")
        check(abs(self.priority) <= MAX_PRIORITY, "priority", f"between {-MAX_PRIORITY} and {MAX_PRIORITY}")
        check(
            self.timeout_s is None or (math.isfinite(self.timeout_s) and self.timeout_s > 0),
            "timeout_s",
            "greater than 0 seconds",
        )

    def _check_brownout(self) -> None:
        self._check(self.brownout in ("auto", "never"), "brownout", '"auto" or "never"')

    def _check(self, ok: bool, key: str, allowed: str) -> None:
        if not ok:
            raise InvalidRequestError(f"{key} must be {allowed}, got {reprlib.repr(getattr(self, key))}")
