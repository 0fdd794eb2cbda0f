"""What a model is: one frozen description, read from a Hugging Face config.json by the model's family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from backend.errors import ConfigError
from backend.models.rope import RopeConfig


@dataclass(frozen=True)
class WeightNames:
    """How a family names its MoE tensors in a checkpoint."""

    moe_block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with grouped-query attention and, in most layers, a mixture of experts. Sizes are in elements."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    #: Longest context in tokens for which the position embedding holds.
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    #: float32, bfloat16 or float16: the type the checkpoint was saved in.
    dtype: str

    num_experts: int
    top_k: int
    #: Intermediate size of one routed expert.
    expert_size: int
    #: Whether the chosen experts' gate weights are made to sum to 1.
    norm_topk_prob: bool
    #: Whether each layer has experts.
    moe_layers: tuple[bool, ...]
    #: Tokens a query of each layer sees, itself included; None: all.
    sliding_windows: tuple[int | None, ...]
    #: Tokens that end a sequence.
    eos_token_ids: tuple[int, ...]

    #: Intermediate size of the shared expert; 0: there is none.
    shared_expert_size: int = 0
    #: Intermediate size of the MLP in layers without experts.
    dense_size: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    #: RMSNorm of queries and keys: per head, or over all heads at once.
    qk_norm: Literal["none", "head", "full"] = "none"
    #: Queries, keys and values are clamped to +- this.
    clip_qkv: float | None = None
    names: WeightNames = field(default_factory=WeightNames)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads ({self.num_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim must be even, got {self.head_dim}")
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"config.json: num_experts_per_tok ({self.top_k}) is more than the number of experts ({self.num_experts})"
            )
        if not any(self.moe_layers):
            raise ConfigError("config.json: the model has no layer with experts")


class RawConfig:
    """Typed access to a config.json; every complaint names the key and what is allowed."""

    def __init__(self, raw: Mapping[str, object]) -> None:
        self.raw = raw

    def integer(self, *names: str, default: int | None = None, minimum: int = 1) -> int:
        """The first of `names` that is present and not null; without a default one of them must be."""
        for name in names:
            value = self.raw.get(name)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                    raise ConfigError(
                        f"config.json: {name} must be a whole number of at least {minimum}, got {value!r}"
                    )
                return value
        if default is None:
            raise ConfigError(f"config.json: {names[0]} is missing")
        return default

    def number(self, name: str, default: float) -> float:
        """A positive number, or the default if absent or null."""
        value = self.optional_number(name)
        return default if value is None else value

    def optional_number(self, name: str) -> float | None:
        """A positive number, or None if absent or null."""
        value = self.raw.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"config.json: {name} must be a number greater than 0, got {value!r}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {name} must be true or false, got {value!r}")
        return value

    def require(self, name: str, *allowed: object) -> None:
        """An option this engine has only in some values; absent and null count as the first of them."""
        value = self.raw.get(name)
        if value is not None and value not in allowed:
            raise ConfigError(f"config.json: {name} {value!r} is not supported, only {', '.join(map(repr, allowed))}")

    def refuse(self, *names: str) -> None:
        """Options this engine does not have at all; null, false and 0 mean that they are off."""
        for name in names:
            if self.raw.get(name):
                raise ConfigError(f"config.json: option {name} is not supported")


def base_config(
    config: RawConfig,
    architecture: str,
    *,
    expert_size_key: str,
    default_theta: float = 10_000.0,
    default_eps: float = 1e-6,
) -> ModelConfig:
    """What all families read alike: full attention and experts in every layer. A family replaces what it has otherwise."""
    config.refuse("quantization_config", "dual_chunk_attention_config", "use_mrope", "pruned_heads")
    config.require("hidden_act", "silu")
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.raw.get("head_dim") is None and hidden_size % num_heads:
        raise ConfigError(
            f"config.json: hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_heads})"
        )
    num_layers = config.integer("num_hidden_layers")
    trained_length = config.integer("max_position_embeddings")
    rope = RopeConfig.from_raw(config.raw, default_theta, trained_length)
    dtype = str(config.raw.get("dtype") or config.raw.get("torch_dtype") or "float32")
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", default=num_heads),
        head_dim=config.integer("head_dim", default=hidden_size // num_heads),
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=rope.context_length(trained_length),
        rms_norm_eps=config.number("rms_norm_eps", default_eps),
        rope=rope,
        tie_word_embeddings=config.boolean("tie_word_embeddings", False),
        dtype=dtype.removeprefix("torch."),
        num_experts=config.integer("num_experts", "num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        expert_size=config.integer(expert_size_key),
        norm_topk_prob=config.boolean("norm_topk_prob", False),
        moe_layers=(True,) * num_layers,
        sliding_windows=(None,) * num_layers,
        eos_token_ids=token_ids("config.json", config.raw.get("eos_token_id")),
    )


def qwen_sparse_layers(config: RawConfig, num_layers: int) -> tuple[bool, ...]:
    """Qwen's choice of the layers with experts: `mlp_only_layers` and `decoder_sparse_step`."""
    dense = config.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise ConfigError(f"config.json: mlp_only_layers must be a list of layer numbers, got {dense!r}")
    step = config.integer("decoder_sparse_step", default=1)
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def token_ids(where: str, value: object) -> tuple[int, ...]:
    """Token ids given as null, one number or a list of numbers."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"{where}: eos_token_id must be a token id or a list of token ids, got {value!r}")
    return tuple(ids)
