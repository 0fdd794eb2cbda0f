"""The launcher's command line and what can be checked before anything is started."""

from __future__ import annotations

import argparse
import errno
import os
import random
import re
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path

from backend.config import ENV_PREFIX
from backend.errors import ConfigError
from backend.serving.triton_server import PRODUCT_ROOT

#: The engine's own parameter for the same time; the launcher sets it, so that both wait for the same end.
DRAIN_TIMEOUT_ENV = ENV_PREFIX + "DRAIN_TIMEOUT_S"
#: Picked ports stay below Linux's ephemeral ports: no outgoing connection takes one while the server restarts.
_PICKED_PORTS = range(20000, 32768)
_PICK_ATTEMPTS = 100
#: Opens Triton's administration on a server that has it closed; see `choose_admin_token`.
ADMIN_TOKEN_ENV = "BROWNOUT_ADMIN_TOKEN"


@dataclass(frozen=True)
class LaunchOptions:
    """What to serve and where; ports are real ones."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    log: Path | None
    model_repository: Path
    models: tuple[str, ...]
    startup_timeout_s: float
    drain_timeout_s: float
    stop_with_parent: bool
    #: Value of the header that Triton's administration asks for; None: it is open to everybody who reaches the ports.
    admin_token: str | None = field(repr=False)

    @property
    def ports(self) -> dict[str, int]:
        return {"http": self.http_port, "grpc": self.grpc_port, "metrics": self.metrics_port}

    @property
    def reachable_host(self) -> str:
        """The address by which this machine reaches the server."""
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host


def parse_options(argv: list[str] | None) -> LaunchOptions:
    """Parse and check the command line: usage errors end with status 2, an unusable environment is a ConfigError."""
    parser = argparse.ArgumentParser(
        prog="python -m backend.serving.launch",
        description="Run Triton Inference Server with this repository's models in the foreground and keep it running. "
        "stdout gets one line, READY http=… grpc=… metrics=…, once every model is ready. SIGTERM or SIGINT ends the "
        "server and every process it started; a second one ends them at once. Exit status: 0 ended on request, 1 "
        "failed, 2 usage.",
    )
    option = parser.add_argument
    option(
        "--host",
        default="127.0.0.1",
        help="IPv4 address to listen on; 0.0.0.0 is every interface (default 127.0.0.1). Beyond this machine Triton's "
        f"administration (models, shared memory, trace, log) is closed unless ${ADMIN_TOKEN_ENV} is set",
    )
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        option(f"--{name}-port", type=_port, default=port, metavar="P", help=f"0 picks a free one (default {port})")
    option("--log", type=Path, metavar="FILE", help="append the server's output to it (default: to stderr)")
    option("--model-repository", type=Path, metavar="DIR", help="default: this repository's own")
    option("--models", nargs="+", metavar="NAME", help="models to load (default: every model of the model repository)")
    option(
        "--startup-timeout", type=_seconds, default=600.0, metavar="S", help="for all models to load (default 600 s)"
    )
    option(
        "--drain-timeout",
        type=_seconds,
        default=os.environ.get(DRAIN_TIMEOUT_ENV) or "5",
        metavar="S",
        help=f"on SIGTERM, for running requests to end before they are aborted (default ${DRAIN_TIMEOUT_ENV} or 5 s)",
    )
    option("--stop-with-parent", action="store_true", help="also end when the process that started this one has ended")
    args = parser.parse_args(argv)
    fixed = [port for port in (args.http_port, args.grpc_port, args.metrics_port) if port]
    if len(set(fixed)) < len(fixed):
        parser.error("--http-port, --grpc-port and --metrics-port must differ")
    http, grpc, metrics = claim_ports(args.host, args.http_port, args.grpc_port, args.metrics_port)
    repository = (args.model_repository or PRODUCT_ROOT / "model_repository").absolute()
    return LaunchOptions(
        host=args.host,
        http_port=http,
        grpc_port=grpc,
        metrics_port=metrics,
        log=args.log,
        model_repository=repository,
        models=choose_models(repository, args.models),
        startup_timeout_s=args.startup_timeout,
        drain_timeout_s=args.drain_timeout,
        stop_with_parent=args.stop_with_parent,
        admin_token=choose_admin_token(args.host, os.environ.get(ADMIN_TOKEN_ENV, "")),
    )


def choose_admin_token(host: str, given: str) -> str | None:
    """The token given; without one none for a loopback address, and for others one that nobody knows.

    Whoever may load models runs code of his own in the server.
    """
    if given:
        # It is part of an option in which other characters have a meaning, and of a header.
        if not re.fullmatch(r"[A-Za-z0-9._~-]{16,}", given):
            raise ConfigError(f"{ADMIN_TOKEN_ENV} must be at least 16 letters, digits or any of . _ ~ -")
        return given
    return None if host.startswith("127.") else secrets.token_urlsafe(32)


def choose_models(repository: Path, wanted: list[str] | None) -> tuple[str, ...]:
    """The models to load: those wanted, which must be there, or all."""
    if not repository.is_dir():
        raise ConfigError(f"the model repository {repository} is not a directory (--model-repository)")
    there = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    if not there:
        raise ConfigError(f"the model repository {repository} has no model: no */config.pbtxt (--model-repository)")
    for name in wanted or ():
        if name not in there:
            raise ConfigError(f"there is no model {name!r} in {repository}; it has {', '.join(there)} (--models)")
    return tuple(dict.fromkeys(wanted or there))


def claim_ports(host: str, http: int, grpc: int, metrics: int) -> list[int]:
    """The three ports with a free one for each 0; ConfigError names the first that is taken or not allowed."""
    ports: list[int] = []
    for name, port in (("http", http), ("grpc", grpc), ("metrics", metrics)):
        if port:
            _check_port(host, name, port)
        else:
            port = _pick_port(host, name, {http, grpc, metrics, *ports})
        ports.append(port)
    return ports


def _pick_port(host: str, name: str, avoid: set[int]) -> int:
    for port in random.SystemRandom().sample(_PICKED_PORTS, _PICK_ATTEMPTS):
        if port not in avoid and _bind_error(host, port) is None:
            return port
    _check_port(host, name, 0)  # says why, where the address is the reason
    raise ConfigError(f"no free port found for {name} on {host} among {_PICKED_PORTS[0]} to {_PICKED_PORTS[-1]}")


def _check_port(host: str, name: str, port: int) -> None:
    error = _bind_error(host, port)
    if error is None:
        return
    if error.errno == errno.EADDRINUSE:
        raise ConfigError(
            f"{name} port {port} on {host} is taken: a program, perhaps another start of this server, already listens "
            f"there; end it or choose another port with --{name}-port"
        )
    if error.errno == errno.EACCES:
        raise ConfigError(f"{name} port {port} needs privileges: choose one above 1023 with --{name}-port")
    raise ConfigError(f"cannot listen on {host} (--host): {error.strerror or error}")


def _bind_error(host: str, port: int) -> OSError | None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the server does it: closed connections of an earlier run do not count, a listener does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"must be a number of seconds from 0 to 86400, got {text!r}")
    return seconds
