"""From a checkpoint to a model that is ready to run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.brownout.settings import NEVER, TOKEN_CLASSES
from backend.elastic.expert_plan import check_room
from backend.elastic.expert_worker import WorkerShape
from backend.elastic.predictor import FILE_NAME as PREDICTOR_NAME
from backend.elastic.predictor import LoadPredictor
from backend.elastic.ray_workers import RayHost
from backend.elastic.worker_pool import WorkerPool
from backend.errors import ConfigError
from backend.experts.mover import mover_for
from backend.experts.options import PoolOptions
from backend.experts.resident import ResidentPool
from backend.kernels.transfer import pinned
from backend.models import dummy, mixtral, olmoe, qwen2_moe, qwen3_moe
from backend.models.config import ModelConfig, token_ids
from backend.models.model import MoeModel
from backend.models.united import fill_united, find_united, groups_of, load_similarity
from backend.models.weights import load_weights

_FAMILIES = (qwen2_moe, qwen3_moe, mixtral, olmoe)
#: Parser of config.json by architecture name.
_PARSERS: dict[str, Callable[[Mapping[str, object]], ModelConfig]] = {f.ARCHITECTURE: f.parse_config for f in _FAMILIES}
LOCAL = PoolOptions()
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """ModelConfig from a config.json's content; an unsupported architecture or option is a ConfigError that names it."""
    architectures = raw.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    for name in names:
        if name in _PARSERS:
            return _PARSERS[name](raw)
    raise ConfigError(
        f"config.json: architecture {names or raw.get('model_type')!r} is not supported; supported are "
        + ", ".join(sorted(_PARSERS))
    )


def load_model(
    checkpoint: str,
    *,
    routing: str = "uniform",
    device: torch.device,
    dtype: str = "auto",
    seed: int = 0,
    united: str = "",
    similarity: str = "",
    attention: str = "auto",
    pool: PoolOptions = LOCAL,
) -> MoeModel:
    """Load a Hugging Face checkpoint folder, or make the random weights of `dummy:SHAPE`; with them what brownout needs.

    `routing` and `seed` act on dummies only. `united` and `similarity` as `find_united` and `load_similarity` say; for a dummy
    ways as whole numbers ("2,8") and "seeded". `dtype` auto is the checkpoint's own type; for a dummy float32 on a CPU and
    bfloat16 elsewhere. `attention` as in `kernels_for`; `pool` says which experts have slots. Raises ConfigError naming what
    is wrong.
    """
    weights = weight_type(checkpoint, dtype, device)
    if checkpoint.startswith(dummy.PREFIX):
        config = parse_config(dummy.raw_config(checkpoint))
        slots = _resident_slots(pool, config, weights)
        model = MoeModel(config, weights, device, dummy.united_groups(united, config), attention, slots)
        absent = dummy.fill(model, routing, seed)
        _use_pool(model, pool, absent, None)
        dummy.fill_brownout(model, similarity, seed)
        return model
    folder = Path(checkpoint)
    config = read_config(folder)
    found = find_united(united, folder, config)
    slots = _resident_slots(pool, config, weights)
    model = MoeModel(config, weights, device, groups_of(found), attention, slots)
    _use_pool(model, pool, load_weights(model, folder), folder)
    fill_united(model, found)
    load_similarity(model, similarity, folder)
    return model


def weight_type(checkpoint: str, dtype: str, device: torch.device) -> torch.dtype:
    """The type that `load_model` stores weights in; raises ConfigError for one that is not supported."""
    if dtype != "auto" and dtype not in _DTYPES:
        raise ConfigError(f"parameter dtype must be auto or one of {', '.join(_DTYPES)}, got {dtype!r}")
    if dtype == "auto" and checkpoint.startswith(dummy.PREFIX):
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    elif dtype == "auto":
        dtype = read_config(Path(checkpoint)).dtype
        if dtype not in _DTYPES:
            raise ConfigError(
                f"config.json: dtype {dtype!r} is not supported; set the parameter dtype to one of {', '.join(_DTYPES)}"
            )
    return _DTYPES[dtype]


def _resident_slots(pool: PoolOptions, config: ModelConfig, dtype: torch.dtype) -> int | None:
    expert_bytes = 3 * config.expert_size * config.hidden_size * dtype.itemsize
    slots = pool.slots(config.num_experts, sum(config.moe_layers), expert_bytes)
    return slots if pool.num_workers is None else 0


def _worker_pool(model: MoeModel, options: PoolOptions) -> WorkerPool:
    config, num_workers = model.config, options.num_workers
    assert num_workers is not None
    num_layers = sum(config.moe_layers)
    expert_bytes = 3 * config.expert_size * config.hidden_size * model.dtype.itemsize
    capacity = options.slots(config.num_experts, num_layers, expert_bytes)
    assert capacity is not None
    shape = WorkerShape(
        num_layers, config.num_experts, config.top_k, config.hidden_size, config.expert_size, capacity, model.dtype
    )
    check_room(config.num_experts, [capacity] * num_workers)
    host = RayHost(options.ray_address, num_workers, options.worker_cpus, shape, model.device)
    waits = [True] * len(TOKEN_CLASSES)
    return WorkerPool(host, num_workers, shape, model.device, model.kernels, waits, options.exchange_timeout_s)


def _use_pool(model: MoeModel, options: PoolOptions, absent: Mapping[str, Tensor], folder: Path | None) -> None:
    """Give the model the pool that the options ask for; `absent` are the experts' tensors by name."""
    if not absent:
        return
    if options.num_workers is not None:
        model.use_pool(_worker_pool(model, options), absent)
        return
    if options.expert_miss == "united" and not model.ways:
        raise ConfigError(
            "parameter expert_pool is resident and expert_miss united, which needs united experts, but none are loaded "
            "(parameter united); build them, or set expert_miss to wait"
        )
    path = None if folder is None else folder / PREDICTOR_NAME
    predictor = None
    if options.expert_prefetch == "predictor" and (path is None or not path.exists()):
        raise ConfigError(
            f"parameter expert_prefetch is predictor, but the checkpoint has no {PREDICTOR_NAME}: make it with "
            "backend.elastic.train_predictor, or use auto, ewma or none"
        )
    if path is not None and path.exists() and options.expert_prefetch in ("auto", "predictor"):
        predictor = LoadPredictor.read(path, checkpoint_fingerprint(folder))
    if model.device.type == "cuda":
        absent = pinned(absent, model.dtype)
    waits = [options.expert_miss == "wait" or index >= NEVER for index in range(len(TOKEN_CLASSES))]
    mover, prefetch = mover_for(model.device), options.expert_prefetch != "none"
    pool = ResidentPool(mover, model.kernels, waits, predictor, prefetch, len(model.moe_blocks))
    model.use_pool(pool, absent)


def read_config(folder: Path) -> ModelConfig:
    """ModelConfig of a checkpoint folder, with the end tokens of its generation_config.json if it has one."""
    if not folder.is_dir():
        raise ConfigError(
            f"parameter checkpoint: {str(folder)!r} is not a folder; give a Hugging Face checkpoint folder or "
            f"{dummy.PREFIX}SHAPE with one of {', '.join(dummy.SHAPES)}"
        )
    config = parse_config(_read_json(folder / "config.json"))
    generation = folder / "generation_config.json"
    if generation.exists():
        value = _read_json(generation).get("eos_token_id")
        if value is not None:
            config = replace(config, eos_token_ids=token_ids("generation_config.json", value))
    return config


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"checkpoint file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"checkpoint file {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"checkpoint file {path} must hold a JSON object")
    return content
