"""The tokens that an engine makes of the same prompts, whatever is done to it between its steps."""

from __future__ import annotations

from collections.abc import Callable

from backend.engine.engine import Engine
from backend.engine.request import TokenOutput
from tests.engine.test_brownout import make_prompts, make_request

PROMPTS = make_prompts(8)


def tokens(engine: Engine, before_step: Callable[[int], object] = lambda step: None) -> dict[object, list[int]]:
    """24 greedy tokens for each prompt; no request may end otherwise, and nothing comes from the prefix cache."""
    engine.blocks.clear_cache()
    for i, prompt in enumerate(PROMPTS):
        engine.add(make_request(i, prompt, 24))
    found: dict[object, list[int]] = {}
    steps = 0
    while engine.has_work:
        before_step(steps)
        for event in engine.step():
            assert isinstance(event, TokenOutput), event
            found.setdefault(event.request_id, []).append(event.token_id)
        steps += 1
    return found
