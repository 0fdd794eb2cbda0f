"""The controller's configuration and its metrics."""

from __future__ import annotations

import argparse
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from backend.errors import ConfigError
from controller.config import ControllerConfig, add_flags, read_config
from controller.metrics import Metrics, MetricsServer


def parse(*arguments: str) -> ControllerConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return read_config(parser.parse_args(arguments))


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "controller.toml"
    file.write_text('ttft_slo_s = 0.5\nitl_slo_s = 0.05\nlaw = "salc"\nperiod_s = 0.5\n')
    config = parse("--config", str(file), "--law", "predictive", "--itl-slo", "0.1")
    assert (config.ttft_slo_s, config.itl_slo_s, config.law, config.period_s) == (0.5, 0.1, "predictive", 0.5)
    assert parse("--ttft-slo", "1", "--itl-slo", "1").owner.startswith("controller-")


def test_the_environment_wins_over_the_file_and_flags_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "controller.toml"
    file.write_text("ttft_slo_s = 0.5\nitl_slo_s = 0.05\nperiod_s = 0.5\n")
    for name, value in (("TTFT_SLO_S", "2"), ("ITL_SLO_S", "3"), ("PERIOD_S", "")):
        monkeypatch.setenv(f"CONTROLLER_{name}", value)
    config = parse("--config", str(file), "--itl-slo", "0.1")
    assert (config.ttft_slo_s, config.itl_slo_s, config.period_s) == (2.0, 0.1, 0.5)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "ttft_slo_s is needed .--ttft-slo"),
        (("--law", "magic"), "law: Input should be 'salc', 'predictive' or 'off', got 'magic'"),
        (("--period", "5"), "period_s: .* less than or equal to 1, got '5'"),
        (("--lease", "1", "--period", "0.8"), "lease_s must be at least twice period_s"),
        (("--mechanism", "guess"), "mechanism: .*'united'"),
        (("--config", "/nowhere.toml"), "cannot be read"),
    ],
)
def test_a_bad_setting_is_named(arguments: tuple[str, ...], complaint: str) -> None:
    objectives = ("--ttft-slo", "1", "--itl-slo", "1") if arguments else ()
    with pytest.raises(ConfigError, match=complaint):
        parse(*objectives, *arguments)


def test_an_unknown_key_of_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "controller.toml"
    file.write_text("ttft_slo = 1\n")
    with pytest.raises(ConfigError, match="unknown setting 'ttft_slo': did you mean ttft_slo_s"):
        parse("--config", str(file))


def test_a_mistyped_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROLLER_TTFT_SLO", "1")
    with pytest.raises(ConfigError, match=r"unknown environment variable CONTROLLER_TTFT_SLO: did you mean .*_SLO_S"):
        parse("--ttft-slo", "1", "--itl-slo", "1")


def test_metrics_and_health_over_http() -> None:
    metrics = Metrics()
    server = MetricsServer(metrics, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server._server.server_address[1]}"

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(address + path, timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    assert get("/healthz") == (503, "starting\n")
    metrics.decided(0.5, 0.25)
    metrics.read(0.1, 0.2, None)
    metrics.updated()
    metrics.turned("control")
    assert get("/healthz") == (200, "control\n")
    text = get("/metrics")[1]
    for line in (
        'controller_threshold{phase="prefill"} 0.5',
        'controller_threshold{phase="decode"} 0.25',
        'controller_slo_violation_ratio{slo="ttft"} 0.2',
        'controller_slo_violation_ratio{slo="itl"} NaN',
        "controller_updates_total 1.0",
        "controller_telemetry_age_seconds 0.1",
        'controller_mode{controller_mode="control"} 1.0',
        'controller_mode{controller_mode="hold"} 0.0',
    ):
        assert line in text
    metrics.turned("unreachable")
    assert get("/healthz")[0] == 503
    assert get("/")[0] == 404
    server.close()
