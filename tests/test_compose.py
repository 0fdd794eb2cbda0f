"""compose.yaml names what exists: modules, flags, ports, environment variables and files. No Docker engine is needed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re

import pytest
import yaml

from backend.config import ENV_PREFIX, EngineConfig
from backend.serving.launch_options import ADMIN_TOKEN_ENV, parse_options
from backend.serving.triton_server import PRODUCT_ROOT
from controller.config import ENV_PREFIX as CONTROLLER_PREFIX
from controller.config import TOKEN_ENV, add_flags, read_config

MONITORING = PRODUCT_ROOT / "docs" / "monitoring"
SERVICES = yaml.safe_load((PRODUCT_ROOT / "compose.yaml").read_text())["services"]
DOCKERFILE, MAKEFILE = (PRODUCT_ROOT / "Dockerfile").read_text(), (PRODUCT_ROOT / "Makefile").read_text()
FREE_PORTS = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]


def filled(value: str) -> str:
    """With the defaults of its ${NAME:-default} variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def ports(service: str) -> set[int]:
    """A service's ports, which are published under their own numbers."""
    pairs = [port.split(":") for port in SERVICES[service]["ports"]]
    assert all(outside == inside for outside, inside in pairs)
    return {int(inside) for _, inside in pairs}


def targets(path) -> set[tuple[str, int]]:
    """(host, port) that a Prometheus configuration scrapes."""
    jobs = yaml.safe_load(path.read_text())["scrape_configs"]
    names = [target for job in jobs for config in job["static_configs"] for target in config["targets"]]
    return {(name.split(":")[0], int(name.split(":")[1])) for name in names}


def server_flags(command: list[str], module: str) -> list[str]:
    """The flags of a command that runs this module."""
    assert command[:3] == ["python3", "-m", module]
    return command[3:]


def test_the_image_runs_the_server_with_its_controller_as_make_serve_does(capsys):
    entrypoint = json.loads(re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)[1])
    (target,) = re.findall(r"^serve:.*\n\texec \$\(PY\) -m (\S+)", MAKEFILE, re.M)
    options = parse_options([*server_flags(entrypoint, target), *FREE_PORTS])
    assert options.host == "0.0.0.0"
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    defaults = {int(port) for port in re.findall(r"\(default (\d+)\)", capsys.readouterr().out)}
    assert defaults == ports("server")
    exposed = set(map(int, re.search(r"^EXPOSE (.*)$", DOCKERFILE, re.M)[1].split()))
    assert exposed == ports("server") | ports("controller")
    variables = dict(re.findall(r"^ENV (\w+)=(\S+)$", DOCKERFILE, re.M))
    assert variables.pop("PATH") == "/opt/venv/bin:$PATH" and "venv --without-pip /opt/venv " in DOCKERFILE
    assert variables == {f"{CONTROLLER_PREFIX}METRICS_HOST": "0.0.0.0"}


def test_composed_server_has_no_controller_of_its_own():
    flags = server_flags(SERVICES["server"]["entrypoint"], "backend.serving.launch")
    assert parse_options([*flags, *FREE_PORTS]).host == "0.0.0.0"


def test_the_controller_accepts_its_flags_and_finds_the_server():
    service = SERVICES["controller"]
    assert service["entrypoint"][:2] == ["python3", "-m"] and importlib.util.find_spec(service["entrypoint"][2])
    assert service["image"] == SERVICES["server"]["image"]
    parser = argparse.ArgumentParser()
    add_flags(parser)
    config = read_config(parser.parse_args([filled(argument) for argument in service["command"]]))
    host, port = config.triton.split(":")
    assert host in SERVICES and int(port) in ports(host)
    assert (config.metrics_host, {config.metrics_port}) == ("0.0.0.0", ports("controller"))


def test_prometheus_and_grafana_find_the_services():
    composed = targets(MONITORING / "compose" / "prometheus.yml")
    assert composed == {("server", 8002), ("controller", 8003)}
    assert all(port in ports(service) for service, port in composed)
    assert {port for _, port in targets(MONITORING / "prometheus.yml")} == {8002, 8003}
    source = yaml.safe_load((MONITORING / "compose" / "grafana-datasource.yml").read_text())["datasources"][0]
    assert source["url"] == f"http://prometheus:{min(ports('prometheus'))}"
    provider = yaml.safe_load((MONITORING / "compose" / "grafana-dashboards.yml").read_text())["providers"][0]
    inside = [volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]]
    assert any(path.startswith(provider["options"]["path"]) and path.endswith(".json") for path in inside)


def test_every_variable_and_file_exists():
    known = {ENV_PREFIX + field.name.upper() for field in dataclasses.fields(EngineConfig)} | {
        TOKEN_ENV,
        ADMIN_TOKEN_ENV,
    }
    for name in ("server", "controller"):
        assert set(SERVICES[name]["environment"]) <= known
    files = [filled(volume).split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())]
    assert files and all((PRODUCT_ROOT / file).exists() for file in files)
