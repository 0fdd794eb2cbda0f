"""Environment variables that give settings: a mistyped name is an error, as a mistyped parameter is."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from backend.errors import ConfigError, nearest_known

#: What Kubernetes sets for a service whose name gives our prefix, such as `moe-llm`: MOE_LLM_SERVICE_HOST, MOE_LLM_PORT …
_SERVICE_LINK = re.compile(r"SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?")


def check_names(env: Mapping[str, str], prefix: str, settings: Collection[str]) -> None:
    """Raise ConfigError for a variable of `env` that has the prefix, but not the name of a setting in capitals after it."""
    known = {prefix + setting.upper() for setting in settings}
    for name in sorted(env):
        if name.startswith(prefix) and name not in known and not _SERVICE_LINK.fullmatch(name.removeprefix(prefix)):
            raise ConfigError(f"unknown environment variable {name}: {nearest_known(name, sorted(known))}")
