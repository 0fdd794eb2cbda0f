"""The peer's side of the benchmark: commands and answers as JSON lines on standard input and output.

    {"command": "load", "checkpoint": DIR, "dtype": T, "device": D, "max_model_len": N, "requests": R, "binding": B}
        ->  {"ok": true}
    {"command": "run", "prompts": [[id, …], …], "new_tokens": N}  ->  {"ok": true, "seconds": S, "tokens": [[id, …], …]}

A failure is {"ok": false, "error": MESSAGE}; the end of the input ends the process. It runs in the peer's own environment, so
it uses the standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable

#: Prompts and a number of new tokens -> the new tokens of each prompt.
Generate = Callable[[list[list[int]], int], list[list[int]]]


def serve(load: Callable[[dict], Generate]) -> None:
    """Answer commands until the input ends. `load` takes the load command's fields."""
    # Engines print to standard output, from child processes too: it becomes standard error, and answers get a copy.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    generate: Generate | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer: dict = {"ok": True}
            if command.pop("command") == "load":
                generate = load(command)
            else:
                if generate is None:
                    raise RuntimeError("run came before load")
                started = time.perf_counter()
                tokens = generate(command["prompts"], command["new_tokens"])
                answer |= {"seconds": time.perf_counter() - started, "tokens": tokens}
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
