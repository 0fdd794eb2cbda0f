"""How fast an engine is, measured before anyone has asked it for something.

Whom to refuse is decided by how long steps take. Without that the first crowd after a start would be let in, all of it, or be
refused when it has waited for as long as it takes to find out.
"""

from __future__ import annotations

import random
import time

from backend.brownout.step_model import StepSample
from backend.engine.engine import Engine
from backend.engine.request import Request
from backend.engine.sampling_params import SamplingParams

#: What comes before a step, in turn: so many prompts, each of this share of a step's tokens (at least one token).
_ARRIVALS = ((1, 1.0), (8, 0.0), (1, 0.5), (0, 0.0))
#: Rounds of them; the first one, in which memory is touched for the first time, does not count.
_ROUNDS = 7
#: Longer prompts tell nothing more. Answers have up to so many tokens, so that some run and others start.
_MOST_TOKENS = 512
_MOST_OUTPUT = 16
#: A very slow engine is to start all the same; it learns the rest while it serves.
_LIMIT_S = 10.0


def measure_steps(engine: Engine) -> list[StepSample]:
    """Steps of made-up requests, at the engine's present thresholds. It must be idle; afterwards it is as new."""
    rng, end_s = random.Random(0), time.monotonic() + _LIMIT_S
    most = min(_MOST_TOKENS, engine.config.max_batch_tokens, engine.max_model_len - 1)
    samples = []
    for number in range(_ROUNDS * len(_ARRIVALS)):
        count, share = _ARRIVALS[number % len(_ARRIVALS)]
        for index in range(count):
            if engine.has_room:
                prompt = rng.choices(range(engine.vocab_size), k=max(1, int(share * most)))
                params = SamplingParams(max_tokens=rng.randint(1, _MOST_OUTPUT), ignore_eos=True)
                engine.add(Request((number, index), prompt, params))
        started_s = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - started_s
        counters, settings = engine.counters, engine.settings
        prefill, decode = counters.step_prefill_tokens, counters.step_decode_tokens
        if number >= len(_ARRIVALS) and prefill + decode:
            thetas = settings.threshold_prefill, settings.threshold_decode
            samples.append(StepSample(seconds, prefill, decode, *thetas))
        if time.monotonic() > end_s:
            break
    engine.reset()
    return samples
