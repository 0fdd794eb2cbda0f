"""How many sequences may run at once so that each gets its tokens in time.

More sequences in a step make it longer, for all of them. Dimming shortens steps; beyond the deepest that is allowed only
fewer sequences do, and who would be one too many waits, or is refused at once (`shedding`).
"""

from __future__ import annotations

import numpy as np

from backend.brownout.step_model import Slowed, StepModel

#: Share of the limit that is kept for what the step model does not know, such as the way to the client.
_MARGIN = 0.1
#: Weight of a new estimate among those before it: whoever was let in by a passing one stays for long.
_SMOOTHING = 0.2


def sustainable(
    model: StepModel | Slowed,
    itl_s: float,
    most: int,
    max_batch_tokens: int,
    prompt_per_output: float,
    theta_prefill: float,
    theta_decode: float,
) -> int:
    """The most sequences, 1 to `most`, whose steps take `itl_s` on average.

    As one starts whenever one ends, a step has a token of each of them and `prompt_per_output` as many prompt tokens.
    """
    decodes = np.arange(1, most + 1)
    prefill = np.minimum(prompt_per_output * decodes, max_batch_tokens - decodes)
    too_slow = model.predict_s(prefill, decodes, theta_prefill, theta_decode) > itl_s
    return max(1, int(np.argmax(too_slow))) if too_slow.any() else most


class Concurrency:
    """The limit that an engine's scheduler keeps, followed from estimate to estimate."""

    def __init__(self, itl_s: float, most: int, max_batch_tokens: int) -> None:
        self._allowed_s, self._most, self._max_batch_tokens = itl_s * (1 - _MARGIN), most, max_batch_tokens
        self._smooth: float | None = None

    def update(
        self,
        model: StepModel | Slowed,
        prompt_tokens: float,
        output_tokens: float,
        theta_prefill: float,
        theta_decode: float,
    ) -> int:
        """The new limit. Lengths are means of the sequences that ended lately.

        Until one has (0 output tokens), as many may run as would be in time if no prompts came; and answers of one token have
        no time between tokens.
        """
        if 0 < output_tokens <= 1:
            return self._most
        per_output = prompt_tokens / output_tokens if output_tokens else 0.0
        estimate = sustainable(
            model, self._allowed_s, self._most, self._max_batch_tokens, per_output, theta_prefill, theta_decode
        )
        if not output_tokens:
            return estimate
        before = estimate if self._smooth is None else self._smooth
        self._smooth = before + _SMOOTHING * (estimate - before)
        return round(self._smooth)
