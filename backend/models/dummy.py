"""Models with seeded random weights: real shapes without a checkpoint, for benchmarks and tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backend.errors import ConfigError
from backend.models.config import ModelConfig
from backend.models.model import MoeModel

PREFIX = "dummy:"

_QWEN2_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 8192,
    "rope_theta": 1_000_000.0,
}
#: config.json of each shape.
SHAPES: dict[str, dict[str, object]] = {
    "qwen1.5-moe-a2.7b": {
        **_QWEN2_MOE,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "vocab_size": 151936,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_theta": 1_000_000.0,
        "vocab_size": 151936,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1_000_000.0,
        "vocab_size": 32000,
    },
    "cpu-m": {
        **_QWEN2_MOE,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 1408,
        "moe_intermediate_size": 352,
        "shared_expert_intermediate_size": 1408,
        "vocab_size": 8192,
    },
    "cpu-s": {
        **_QWEN2_MOE,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 512,
        "vocab_size": 4096,
    },
    "tiny": {
        **_QWEN2_MOE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
    },
}
#: Standard deviation of a Gumbel variable.
_GUMBEL_STD = math.pi / math.sqrt(6)


def raw_config(checkpoint: str) -> dict[str, object]:
    """The config.json of `dummy:SHAPE`."""
    shape = checkpoint.removeprefix(PREFIX)
    if shape not in SHAPES:
        raise ConfigError(f"parameter checkpoint: unknown dummy shape {shape!r}; shapes are {', '.join(SHAPES)}")
    return SHAPES[shape]


def fill(model: MoeModel, routing: str, seed: int) -> dict[str, Tensor]:
    """Seeded random weights, scaled so that activations and logits keep a standard deviation near 1.

    Returns those of tensors that have no storage in the model, in host memory.

    `routing`: `uniform` spreads tokens evenly over the experts of a layer; `zipf:S` adds log(rank^-S), in an order of its own
    for each layer, to router logits that vary like Gumbel noise: experts are then drawn with probability near rank^-S.
    """
    exponent = _zipf_exponent(routing)
    generator = torch.Generator(model.device).manual_seed(seed)
    # Each layer adds two outputs to the residual stream, whose variance would otherwise grow with the depth.
    depth_scale = 1 / math.sqrt(2 * model.config.num_layers)
    absent: dict[str, Tensor] = {}
    for name, place in model.weights():
        tensor = torch.empty_like(place, device=model.device) if place.is_meta else place
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        elif name.endswith(".bias"):
            _normal(tensor, 0.02, generator)
        elif name == "model.embed_tokens.weight":
            _normal(tensor, 1.0, generator)
        elif name.endswith(".gate.weight"):
            _normal(tensor, _GUMBEL_STD / math.sqrt(tensor.shape[1]), generator)
        else:
            writes_residual = name.endswith(
                (".o_proj.weight", f".{model.config.names.down}.weight", ".down_proj.weight")
            )
            _normal(tensor, (depth_scale if writes_residual else 1.0) / math.sqrt(tensor.shape[1]), generator)
        if place.is_meta:
            absent[name] = tensor.cpu()
    if exponent:
        for layer in model.layers:
            if layer.moe is not None:
                layer.moe.router_bias = _zipf_bias(model.config.num_experts, exponent, generator)
    return absent


def united_groups(parameter: str, config: ModelConfig) -> dict[int, dict[int, Tensor]]:
    """Groups [E] of neighbouring experts by way and layer; `parameter` lists ways as whole numbers, empty or `none`: no way."""
    names = [] if parameter in ("", "none") else [name.strip() for name in parameter.split(",")]
    if not all(name.isdecimal() and 2 <= int(name) <= min(64, config.num_experts) for name in names):
        raise ConfigError(
            "parameter united of a dummy checkpoint must be whole numbers from 2 to the number of experts (at most 64), "
            f"separated by commas, or none; got {parameter!r}"
        )
    groups = torch.arange(config.num_experts)
    layers = [i for i, has_experts in enumerate(config.moe_layers) if has_experts]
    return {int(name): {i: groups // int(name) for i in layers} for name in names}


def fill_brownout(model: MoeModel, similarity: str, seed: int) -> None:
    """Each united expert becomes the mean of its group's experts; `similarity` "seeded" makes random tables from 0 to 1."""
    if similarity not in ("", "none", "seeded"):
        raise ConfigError(f"parameter similarity of a dummy checkpoint must be seeded or none, got {similarity!r}")
    generator = torch.Generator(model.device).manual_seed(seed)
    num_experts = model.config.num_experts
    for block in model.moe_blocks:
        for way in model.ways:
            for united, originals in zip(block.united_weights(way), block.original_weights(), strict=True):
                for group, members in enumerate(originals.split(way)):
                    united[group].copy_(members.float().mean(0))
        if similarity == "seeded":
            block.similarity = torch.rand(num_experts, num_experts, generator=generator, device=model.device)


def _normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    tensor.normal_(0.0, std, generator=generator)


def _zipf_exponent(routing: str) -> float:
    """0 for uniform."""
    if routing == "uniform":
        return 0.0
    kind, _, number = routing.partition(":")
    try:
        exponent = float(number)
    except ValueError:
        exponent = math.nan
    if kind != "zipf" or not 0 <= exponent <= 100:
        raise ConfigError(f"parameter routing must be uniform or zipf:S with S between 0 and 100, got {routing!r}")
    return exponent


def _zipf_bias(num_experts: int, exponent: float, generator: torch.Generator) -> Tensor:
    device = generator.device
    ranks = torch.randperm(num_experts, generator=generator, device=device) + 1
    return -exponent * ranks.float().log()
