"""The controller's configuration: a TOML file, the environment over it, flags over both, and one check of all."""

from __future__ import annotations

import argparse
import os
import socket
import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from backend.brownout.settings import MECHANISMS
from backend.environment import check_names
from backend.errors import ConfigError, nearest_known
from controller.laws.predictive import BRIGHTEN_PER_S, HYSTERESIS, MARGIN

#: Exit status of a controller whose configuration is wrong or refused by the server: another start would not help.
EXIT_CONFIG = 2
TOKEN_ENV = "BROWNOUT_CONTROL_TOKEN"
#: A setting's name in capitals after this is an environment variable that gives it.
ENV_PREFIX = "CONTROLLER_"


def _default_owner() -> str:
    return f"controller-{socket.gethostname()}-{os.getpid()}"


class ControllerConfig(BaseModel):
    """Every field is a key of the file, an environment variable CONTROLLER_<NAME> and, without `_s` and with dashes, a flag.

    Times in seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    triton: str = Field(
        "127.0.0.1:8001", pattern=r"^[^\s:]+:\d{1,5}$", description="HOST:PORT of the server's gRPC service"
    )
    ttft_slo_s: float = Field(gt=0, le=3600, description="objective for the time to the first token")
    itl_slo_s: float = Field(gt=0, le=3600, description="objective for the latency between tokens")
    law: Literal["salc", "predictive", "off"] = Field("predictive", description="salc, predictive or off")
    period_s: float = Field(0.25, ge=0.1, le=1.0, description="time between two readings")
    lease_s: float = Field(
        5.0, ge=1.0, le=3600, description="after this long without the controller the baseline holds"
    )
    owner: str = Field(default_factory=_default_owner, min_length=1, max_length=128, description="name in the lease")
    min_threshold_prefill: float = Field(0.0, ge=0, le=1, description="never dim prefill below this")
    min_threshold_decode: float = Field(0.0, ge=0, le=1, description="never dim decode below this")
    max_quality_loss: float | None = Field(
        None, ge=0, le=100, description="percent; dim no further than a level of the profile that loses so much"
    )
    profile: Path | None = Field(None, description="calibrated levels (default: those that the server has)")
    margin: float = Field(MARGIN, ge=0, le=0.5, description="predictive: share of the objectives that is kept free")
    hysteresis: float = Field(
        HYSTERESIS, ge=0, le=0.5, description="predictive: share that must be free beyond the margin to brighten"
    )
    brighten_rate: float = Field(
        BRIGHTEN_PER_S, gt=0, le=10, description="predictive: how far thresholds rise in a second at most"
    )
    mechanism: Literal[MECHANISMS] | None = Field(None, description="default: the level's, else the server's baseline")
    way: int | None = Field(None, ge=0, le=64, description="experts per united expert; default as for mechanism")
    resident_share: float | None = Field(
        None, ge=0, le=1, description="share of each layer's experts to hold while in charge; default: the server's"
    )
    stale_after_s: float = Field(2.0, gt=0, description="older telemetry is unknown: hold")
    hand_back_after_s: float = Field(10.0, gt=0, description="hold for so long, then give the settings back")
    log: Path | None = Field(None, description="event log to append to, JSON lines")
    step_model: Path | None = Field(None, description="file to keep the fitted step model in, between runs")
    metrics_port: int = Field(8003, ge=0, le=65535, description="for /metrics and /healthz; 0: none")
    metrics_host: str = Field("127.0.0.1", description="address to listen on for these")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lease_s < 2 * self.period_s:
            raise ValueError("lease_s must be at least twice period_s, or the lease ends between two readings")
        return self


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field, without a default: what is not given comes from the file."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file with any of the settings below, which also come from the environment as CONTROLLER_<NAME>",
    )
    for name, field in ControllerConfig.model_fields.items():
        default = "" if field.is_required() or field.default in (None, "") else field.default
        shown = f" (default {default})" if isinstance(default, str | int | float) and default != "" else ""
        parser.add_argument(
            "--" + name.removesuffix("_s").replace("_", "-"),
            dest=name,
            metavar="S" if name.endswith("_s") else "VALUE",
            help=f"{field.description}{shown}".replace("%", "%%"),
        )


def read_config(args: argparse.Namespace) -> ControllerConfig:
    """The file's values, the environment's over them (an empty one is none) and the flags' over these.

    Raises ConfigError, naming each bad one.
    """
    values: dict[str, object] = {}
    if args.config is not None:
        try:
            values = tomllib.loads(args.config.read_text())
        except OSError as error:
            raise ConfigError(f"the configuration {args.config} cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"the configuration {args.config} is not TOML: {error}") from None
    check_names(os.environ, ENV_PREFIX, ControllerConfig.model_fields)
    for name in ControllerConfig.model_fields:
        flag, variable = getattr(args, name), os.environ.get(ENV_PREFIX + name.upper())
        if flag is not None or variable:
            values[name] = variable if flag is None else flag
    try:
        return ControllerConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(detail) for detail in error.errors())) from None


def _sentence(detail) -> str:
    name = ".".join(map(str, detail["loc"]))
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"unknown setting {name!r}: {nearest_known(name, ControllerConfig.model_fields)}"
    if detail["type"] == "missing":
        flag = name.removesuffix("_s").replace("_", "-")
        return f"{name} is needed (--{flag}, or in the configuration file)"
    return f"{name}: {message}, got {detail['input']!r}" if name else message
