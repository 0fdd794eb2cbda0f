"""Which controller that ended is started again beside the server; shell commands stand in for it."""

from __future__ import annotations

import time

from controller import serve
from controller.__main__ import main
from controller.config import EXIT_CONFIG
from controller.serve import Pair
from tests.waiting import wait_until


def ended(pair: Pair, *command: str) -> float | None:
    """Seconds after which this controller, which ends at once, is started again; None: never."""
    pair._control = list(command)
    again = pair._look_after_controller()
    if pair._controller is not None:
        wait_until(lambda: pair._controller.poll() is not None)
        again = pair._look_after_controller()
    assert pair._controller is None
    return None if again is None else round(again - time.monotonic())


def test_a_controller_that_fails_is_started_again_after_longer_and_longer_pauses(monkeypatch, capfd) -> None:
    """Whatever it fails of, and if it cannot even be started; one that ran for long has recovered."""
    pair = Pair([], [])
    failures = [["sh", "-c", "exit 1"], ["sh", "-c", "kill -9 $$"], ["/no/such/program"]]
    assert [ended(pair, *failure) for failure in failures * 2] == [1, 2, 5, 10, 30, 30]
    assert "serve: the controller died with status 1; it is started again in 1 s" in capfd.readouterr().err
    monkeypatch.setattr(serve, "_HEALTHY_AFTER_S", 0.0)
    assert ended(pair, "sh", "-c", "exit 1") == 1


def test_a_controller_whose_configuration_cannot_be_is_not_started_again(capfd) -> None:
    assert main(["--replay", "/no/such/log", "--ttft-slo", "1", "--itl-slo", "1"]) == EXIT_CONFIG
    assert ended(Pair([], []), "sh", "-c", f"exit {EXIT_CONFIG}") is None
    assert "the server goes on at its baseline" in capfd.readouterr().err
