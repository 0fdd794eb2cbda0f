"""How soon the control plane acts: from reading the telemetry to a step that ran with what was decided on it.

The server is kept busy. Each change is one turn of the controller: read the status, ask the law `predictive`, set thresholds
(over gRPC and HTTP in turn), and then wait for telemetry that says that every engine has run a step with them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from backend.config import ENV_PREFIX
from backend.serving.launch_client import RunningServer, running_server
from controller.laws import Limits, Predictive
from controller.window import Window
from loadtest.bench import options
from loadtest.bench.workload import machine, write_json
from loadtest.prompts import GeneratedPrompts

# Imported where they are used: other benchmarks run where no client is installed.
if TYPE_CHECKING:
    from controller.client import BrownoutClient
    from loadtest.clients import Clients

HELP = "how soon a decision of the controller acts"
#: Alternating thresholds, so that every setting is a change; `drop` needs no united experts.
_THRESHOLDS = (0.5, 0.9)
_PAUSE_S = 0.05
_ACTING_TIMEOUT_S = 30.0


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_place(parser)
    parser.add_argument("--requests", type=options.positive, default=16, help="running all the while (default 16)")
    parser.add_argument("--changes", type=options.positive, default=100, help="measured (default 100)")
    options.add_output(parser)


def main(args: argparse.Namespace, console: Console) -> int:
    checkpoint = options.checkpoint_of(args)
    with console.status(f"measuring {args.changes} changes on {checkpoint}"):
        result = run(checkpoint, dtype=args.dtype, device=args.device, requests=args.requests, changes=args.changes)
    console.print(table(result, checkpoint))
    if args.json:
        write_json(args.json, result)
        console.print(f"Wrote {args.json}.")
    return 0


def table(result: dict, checkpoint: str) -> Table:
    made = Table(title=f"{checkpoint}, {result['changes']} changes with {result['requests']} requests running, ms")
    made.add_column("")
    for name in ("median", "p99"):
        made.add_column(name, justify="right")
    for name, figures in result["ms"].items():
        made.add_row(name, f"{figures['p50']:.1f}", f"{figures['p99']:.1f}")
    return made


def run(checkpoint: str, *, dtype: str, device: str, requests: int, changes: int) -> dict:
    """Milliseconds, median and p99 over all changes, of each part and of all from reading to acting."""
    from controller.client import BrownoutClient
    from controller.config import TOKEN_ENV

    token = os.environ.get(TOKEN_ENV, "")
    settings = {"checkpoint": checkpoint, "dtype": dtype, "device": device}
    env = {ENV_PREFIX + name.upper(): value for name, value in settings.items()}
    parts: dict[str, list[float]] = {}
    with running_server(env=env) as server, _kept_busy(server, requests):
        client = BrownoutClient(server.grpc, token)
        law = Predictive(Limits(1.0, 0.1))
        window = Window(law.window_s, law.limits)
        setters = {
            "set over gRPC": client.call,
            "set over HTTP": lambda **values: _set_over_http(server, token, **values),
        }
        for number in range(changes + 10):
            setter = list(setters)[number // 2 % 2]
            measured = _turn(client, law, window, setters[setter], _THRESHOLDS[number % 2])
            measured[setter] = measured.pop("set")
            if number >= 10:  # before, the law learns and everything warms up
                for name, seconds in measured.items():
                    parts.setdefault(name, []).append(1e3 * seconds)
            time.sleep(_PAUSE_S)
        steps = [step[0] for entry in client.call()["telemetry"] for step in entry["steps"]]
        client.call(owner="bench", lease_s=0)
        client.close()
    parts["a step, for comparison"] = [1e3 * seconds for seconds in steps]
    return {
        "ms": {
            name: {"p50": float(np.median(values)), "p99": float(np.quantile(values, 0.99))}
            for name, values in parts.items()
        },
        "changes": changes,
        "requests": requests,
        "settings": settings,
        "machine": machine(),
    }


def _turn(
    client: BrownoutClient, law: Predictive, window: Window, setter: Callable[..., dict], threshold: float
) -> dict[str, float]:
    """Seconds of the parts of one turn; what the law decides is not set, so that each turn is a change."""
    times = [time.perf_counter()]
    status = client.call()
    times.append(time.perf_counter())
    law.update(window.add(status), 0.25)
    times.append(time.perf_counter())
    status = setter(
        threshold_prefill=threshold, threshold_decode=threshold, mechanism="drop", owner="bench", lease_s=30.0
    )
    times.append(time.perf_counter())
    version, deadline = status["settings"]["version"], time.monotonic() + _ACTING_TIMEOUT_S
    while any(entry["settings_version"] < version for entry in status["telemetry"]):
        if time.monotonic() > deadline:
            raise RuntimeError(f"settings version {version} did not act within {_ACTING_TIMEOUT_S:g} s")
        status = client.call()
    times.append(time.perf_counter())
    read, decided, was_set, acted = np.diff(times)
    return {
        "read": read,
        "law and window": decided,
        "set": was_set,
        "from set to a step that ran with it": acted,
        "from reading to acting": times[-1] - times[0],
    }


def _set_over_http(server: RunningServer, token: str, **values: float | str) -> dict:
    from controller.client import MODEL

    body = json.dumps(values | ({"token": token} if token else {})).encode()
    request = urllib.request.Request(f"http://{server.http}/v2/models/{MODEL}/generate", body)
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.loads(json.load(response)["status"])


@contextlib.contextmanager
def _kept_busy(server: RunningServer, requests: int) -> Iterator[None]:
    """So many requests at once, each followed by another; their answers come whole, so that clients cost little."""
    from loadtest.clients import Clients

    stop = threading.Event()
    prompts = GeneratedPrompts(0)
    sampling = {"max_tokens": 200, "temperature": 0, "ignore_eos": True}

    async def one(clients: Clients, number: int) -> None:
        while not stop.is_set():
            record = await clients.grpc_infer(number, prompts.text(number, 32), sampling)
            if record.outcome != "completed":
                raise RuntimeError(f"a request {record.outcome}: {record.error}")

    async def all_of_them() -> None:
        async with Clients(server.http, server.grpc) as clients, asyncio.TaskGroup() as group:
            for number in range(requests):
                group.create_task(one(clients, number))

    thread = threading.Thread(target=asyncio.run, args=(all_of_them(),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
