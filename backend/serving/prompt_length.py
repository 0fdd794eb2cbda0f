"""How many tokens a prompt will have, guessed from its length: what is refused anyway need not be tokenized."""

from __future__ import annotations

#: Texts from which on there is a guess, and the weight of each in the moving averages.
_FIRST_GUESS = 16
_WEIGHT = 1 / 16
#: Mean absolute deviations by which the low guess stays below the mean.
_DEVIATIONS = 2.0


class PromptLengths:
    """Moving averages of tokens per character, as TCP keeps them of round trips. Not thread-safe."""

    def __init__(self) -> None:
        self._seen = 0
        self._mean = self._deviation = 0.0

    def observe(self, text: str, num_tokens: int) -> None:
        """A text, not empty, turned out to have so many tokens."""
        ratio = num_tokens / len(text)
        weight = max(_WEIGHT, 1 / (self._seen + 1))
        if self._seen:
            self._deviation += weight * (abs(ratio - self._mean) - self._deviation)
        self._seen += 1
        self._mean += weight * (ratio - self._mean)

    def guess(self, text: str) -> tuple[int, int]:
        """A low guess and the likely number: (1, 1) while too few texts have been seen."""
        if self._seen < _FIRST_GUESS:
            return 1, 1
        low = (self._mean - _DEVIATIONS * self._deviation) * len(text)
        return max(1, int(low)), max(1, round(self._mean * len(text)))
