"""The dashboard asks only for metrics that exist. What the server exports is compared on a real one in tests/server."""

import json
import re

from backend.serving.triton_server import PRODUCT_ROOT

DASHBOARD = PRODUCT_ROOT / "docs" / "monitoring" / "grafana-dashboard.json"
CONTROLLER = PRODUCT_ROOT / "controller"


def queried(prefix: str) -> set[str]:
    """Names of metrics in the dashboard's queries, histograms without their suffix."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    return {name.removesuffix("_bucket") for name in re.findall(rf"\b{prefix}_\w+", queries)}


def defined_in(sources) -> set[str]:
    names = {name for path in sources for name in re.findall(r'"((?:moe|controller)_[a-z0-9_]+)"', path.read_text())}
    return names | {f"{name}_total" for name in names}  # prometheus_client adds it to a counter's name


def test_every_server_metric_of_the_dashboard_exists():
    assert queried("moe") <= defined_in([PRODUCT_ROOT / "backend" / "serving" / "metrics.py"])


def test_every_controller_metric_of_the_dashboard_exists():
    assert queried("controller") <= defined_in(CONTROLLER.rglob("*.py"))
