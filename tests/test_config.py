"""Parameters: what is read from where, and that every unusable value is named with what is allowed."""

import pytest

from backend.config import EngineConfig
from backend.errors import ConfigError


def test_environment_wins_and_empty_means_default():
    parameters = {"max_running": "4", "max_waiting": "", "kv_cache_memory": "1.5G"}
    config = EngineConfig.from_parameters(parameters, {"MOE_LLM_MAX_RUNNING": " 8 ", "MOE_LLM_KV_CACHE_MEMORY": ""})
    assert config.max_running == 8
    assert config.max_waiting == EngineConfig.max_waiting
    assert config.kv_cache_memory is None, "an empty environment value unsets the parameter"
    assert EngineConfig.from_parameters(parameters, {}).kv_cache_memory == 3 * 2**29


def test_config_survives_the_way_to_the_engine_process():
    config = EngineConfig(checkpoint="dummy:tiny", device="cpu,cuda:1", kv_cache_blocks=7)
    assert EngineConfig(**config.to_dict()) == config
    assert config.devices == ("cpu", "cuda:1")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_runing": "4"}, "unknown parameter 'max_runing': did you mean max_running"),
        ({"zzz": "4"}, "unknown parameter 'zzz': known are .*max_running"),
        ({"max_running": "four"}, "max_running must be a whole number, got 'four'"),
        ({"max_running": "-1"}, "max_running must be at least 1, got -1"),
        ({"max_batch_tokens": "0"}, "max_batch_tokens must be at least 1"),
        ({"block_size": "24"}, "block_size must be a power of 2"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32"),
        ({"attention_backend": "magic"}, "attention_backend must be one of auto, triton, flash_attn, torch"),
        ({"cuda_graphs": "maybe"}, "cuda_graphs must be one of auto, on, off"),
        ({"kv_cache_memory": "lots"}, "kv_cache_memory must be a number of bytes"),
        ({"kv_cache_memory": "nan"}, "kv_cache_memory must be a number of bytes"),
        ({"kv_cache_memory": "1G", "kv_cache_blocks": "5"}, "kv_cache_blocks must be left out when kv_cache_memory"),
        ({"expert_pool": "some"}, "expert_pool must be local, resident or workers:N .*got 'some'"),
        ({"expert_miss": "drop"}, "expert_miss must be one of united, wait"),
        ({"expert_prefetch": "all"}, "expert_prefetch must be one of auto, predictor, ewma, none"),
        ({"resident_experts": "0"}, "resident_experts must be a share .* above 0 and up to 1, or the bytes"),
        ({"resident_experts": "nan"}, "resident_experts must be a share"),
        ({"resident_experts": "half"}, "resident_experts must be a share .*got 'half'"),
        ({"expert_dtype": "int4"}, "expert_dtype must be one of auto, fp8"),
        ({"expert_dtype": "fp8", "expert_pool": "resident"}, "expert_dtype is fp8, which needs expert_pool local"),
        (
            {"async_scheduling": "on", "expert_pool": "resident"},
            "async_scheduling is on, which needs expert_pool local",
        ),
        ({"drain_timeout_s": "-3"}, "drain_timeout_s must be between 0 and 3600"),
        ({"drain_timeout_s": "nan"}, "drain_timeout_s must be between 0 and 3600"),
        ({"device": "cpu,,cpu"}, "device must be a device or a comma-separated list"),
        ({"device": "cpu,cpu"}, "device must be a list without repetitions"),
    ],
)
def test_unusable_values_are_named(parameters, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_parameters(parameters, {})


def test_a_mistyped_environment_variable_is_named():
    with pytest.raises(
        ConfigError, match="unknown environment variable MOE_LLM_CHEKPOINT: did you mean MOE_LLM_CHECKPOINT"
    ):
        EngineConfig.from_parameters({}, {"MOE_LLM_CHEKPOINT": "/models/x"})


def test_variables_that_kubernetes_sets_for_a_service_are_no_settings():
    service = {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT_HTTP": "8000",
        "PORT": "tcp:",
        "PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    env = {f"MOE_LLM_{name}": value for name, value in service.items()}
    assert EngineConfig.from_parameters({}, env) == EngineConfig()
