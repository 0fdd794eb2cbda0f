"""The controller's own metrics and health, over HTTP."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from backend.errors import ConfigError

#: control: in charge. hold: telemetry is missing or stale. handed_back: it was for too long. standby: another owner has the
#: lease. unreachable: the server does not answer. dry_run: decides, but sets nothing.
MODES = ("starting", "control", "hold", "handed_back", "standby", "unreachable", "dry_run")
#: A loop that has not turned for so long is not healthy.
_HEALTHY_S = 10.0


class Metrics:
    """Collected by the loop, read by the HTTP threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options = {"registry": self.registry}
        self._threshold = Gauge("controller_threshold", "Threshold decided on", ["phase"], **options)
        self._violations = Gauge(
            "controller_slo_violation_ratio", "Share beyond the objective in the last window", ["slo"], **options
        )
        self._updates = Counter("controller_updates", "Settings sent to the server", **options)
        self._age = Gauge("controller_telemetry_age_seconds", "Age of the oldest engine's telemetry", **options)
        self._mode = Enum("controller_mode", "What the controller is doing", states=list(MODES), **options)
        self._turned_s = time.monotonic()
        self.mode = "starting"

    def turned(self, mode: str) -> None:
        self.mode = mode
        self._mode.state(mode)
        self._turned_s = time.monotonic()

    def decided(self, threshold_prefill: float, threshold_decode: float) -> None:
        self._threshold.labels("prefill").set(threshold_prefill)
        self._threshold.labels("decode").set(threshold_decode)

    def read(self, age_s: float, ttft_violations: float | None, itl_violations: float | None) -> None:
        """Of a reading; a ratio that is unknown (nothing was served) is NaN, not 0."""
        self._age.set(age_s)
        for slo, ratio in (("ttft", ttft_violations), ("itl", itl_violations)):
            self._violations.labels(slo).set(float("nan") if ratio is None else ratio)

    def updated(self) -> None:
        self._updates.inc()

    @property
    def healthy(self) -> bool:
        """Whether the loop turns and the server answers."""
        return self.mode not in ("starting", "unreachable") and time.monotonic() - self._turned_s < _HEALTHY_S


class MetricsServer:
    """Serves /metrics and /healthz from a thread until closed."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Raises ConfigError if the port cannot be had."""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, generate_latest(metrics.registry))
                elif self.path == "/healthz":
                    self._answer(200 if metrics.healthy else 503, "text/plain", f"{metrics.mode}\n".encode())
                else:
                    self._answer(404, "text/plain", b"/metrics and /healthz are here\n")

            def _answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass  # a line per scrape helps nobody

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} for metrics: {error.strerror} (--metrics-port)"
            ) from None
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
