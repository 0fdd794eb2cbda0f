"""What a prompt must be; checked where it arrives and again where it is queued."""

from __future__ import annotations

from backend.errors import InvalidRequestError


def check_prompt(prompt_ids: list[int], max_model_len: int, vocab_size: int) -> None:
    """Raise InvalidRequestError unless the prompt is non-empty, leaves room for a token, and has known token ids."""
    if not prompt_ids:
        raise InvalidRequestError("the prompt is empty: at least one token is needed")
    if len(prompt_ids) >= max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(prompt_ids)} tokens, but the context of {max_model_len} tokens takes prompts of at most "
            f"{max_model_len - 1}"
        )
    low, high = min(prompt_ids), max(prompt_ids)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequestError(f"input_ids must be between 0 and {vocab_size - 1}, got {wrong}")
