"""The sidecar that dims the model just enough to keep its latency objectives: `python -m controller --help`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec

from backend.brownout.profile import Level, read_profile
from backend.brownout.step_model import StepModel
from backend.errors import ConfigError
from controller import stepmodel
from controller.client import BrownoutClient, Refused, Unreachable
from controller.config import EXIT_CONFIG, TOKEN_ENV, ControllerConfig, add_flags, read_config
from controller.event_log import EventLog, read_events
from controller.laws import Predictive
from controller.loop import Controller, make_law
from controller.metrics import Metrics, MetricsServer
from controller.replay import replay

log = logging.getLogger("controller")

_SAVE_PERIOD_S = 30.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m controller",
        description="Dim the model just enough to keep its latency objectives. SIGTERM or SIGINT hands the settings back. "
        f"The server's control token is read from ${TOKEN_ENV}. Exit status: 0 ended on request, {EXIT_CONFIG} usage, "
        "configuration, or the server refuses what is asked for; any other: failed, another start may help.",
    )
    parser.add_argument("--dry-run", action="store_true", help="decide and log, but set nothing")
    parser.add_argument(
        "--replay", type=Path, metavar="LOG", help="run the law over a recorded event log; decisions go to stdout"
    )
    add_flags(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s controller %(message)s", stream=sys.stderr)
    try:
        config = read_config(args)
    except ConfigError as error:
        parser.error(str(error))
    try:
        return _replay(config, args.replay) if args.replay else _run(config, args.dry_run)
    except (ConfigError, Refused) as error:
        print(f"controller: {error}", file=sys.stderr)
        return EXIT_CONFIG


def _replay(config: ControllerConfig, path: Path) -> int:
    levels = read_profile(config.profile).levels if config.profile else ()
    law, _ = make_law(config, levels, _saved_model(config))
    summary = replay(read_events(path), law, config.stale_after_s, sys.stdout)
    print(f"controller: {json.dumps(summary)}", file=sys.stderr)
    return 0


def _run(config: ControllerConfig, dry_run: bool) -> int:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with ExitStack() as stack:
        metrics = Metrics()
        if config.metrics_port:
            server = MetricsServer(metrics, config.metrics_host, config.metrics_port)
            stack.callback(server.close)
        events = EventLog(config.log)
        stack.callback(events.close)
        client = BrownoutClient(config.triton, os.environ.get(TOKEN_ENV, ""))
        stack.callback(client.close)
        levels = _levels(config, client, metrics, stop)
        if stop.is_set():
            return 0
        law, extra = make_law(config, levels, _saved_model(config))
        controller = Controller(config, client, law, extra, events=events, metrics=metrics, dry_run=dry_run)
        stack.callback(controller.hand_back)
        _loop(config, controller, law, stop)
    return 0


def _loop(config: ControllerConfig, controller: Controller, law: object, stop: threading.Event) -> None:
    keep = config.step_model if isinstance(law, Predictive) else None
    last = time.monotonic()
    save_at = last + _SAVE_PERIOD_S
    while not stop.wait(max(0.0, last + config.period_s - time.monotonic())):
        now = time.monotonic()
        # A loop that was suspended saw nothing meanwhile: its law is not told that all this time has passed.
        controller.turn(min(now - last, 2 * config.period_s))
        last = now
        if keep is not None and now >= save_at:
            _save(law.model, keep)
            save_at = now + _SAVE_PERIOD_S
    if keep is not None:
        _save(law.model, keep)


def _save(model: StepModel, path: Path) -> None:
    try:
        stepmodel.save(model, path)
    except OSError as error:
        log.warning("the step model %s cannot be written: %s", path, error.strerror)


def _levels(
    config: ControllerConfig, client: BrownoutClient, metrics: Metrics, stop: threading.Event
) -> tuple[Level, ...]:
    """The profile's levels, the server's if no file is given; waits for the server if they are needed."""
    if config.max_quality_loss is None:
        return ()
    if config.profile is not None:
        return read_profile(config.profile).levels
    while not stop.is_set():
        try:
            levels = client.call()["available"]["levels"]
        except Unreachable as error:
            if metrics.mode != "unreachable":
                log.info("unreachable: %s", error)
            metrics.turned("unreachable")
            stop.wait(config.period_s)
            continue
        return tuple(msgspec.convert(level, Level) for level in levels)
    return ()


def _saved_model(config: ControllerConfig) -> StepModel | None:
    if config.step_model is None or not config.step_model.exists():
        return None
    return stepmodel.load(config.step_model)


if __name__ == "__main__":
    sys.exit(main())
