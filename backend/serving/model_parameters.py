"""The engine's parameters as Triton's model configuration has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from backend.errors import ConfigError

#: The model whose config.pbtxt holds the engine's parameters; it also reports the engine-wide metrics.
ENGINE_MODEL = "moe_llm"


def own_parameters(model_config: Mapping) -> dict[str, str]:
    """The parameters of a model's configuration, as Triton's JSON has it."""
    return {key: value["string_value"] for key, value in model_config.get("parameters", {}).items()}


def engine_parameters(model_name: str, model_config: Mapping, args: Mapping[str, str]) -> dict[str, str]:
    """The engine's parameters: this model's own, or those of the engine model beside it in the repository."""
    if model_name != ENGINE_MODEL:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2

        path = Path(args["model_repository"]).parent / ENGINE_MODEL / "config.pbtxt"
        try:
            config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        except (OSError, text_format.ParseError) as error:
            raise ConfigError(f"the engine's parameters could not be read from {path}: {error}") from None
        return {key: value.string_value for key, value in config.parameters.items()}
    return own_parameters(model_config)
