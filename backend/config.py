"""Engine configuration: one frozen object, built once from the Triton model parameters and the environment.

Every parameter of `moe_llm` in config.pbtxt has a field here; an environment variable MOE_LLM_<NAME> wins over it and an
empty value means "not set". An unknown or unusable value is a ConfigError that names the parameter and what is allowed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from backend.environment import check_names
from backend.errors import ConfigError, nearest_known
from backend.experts.options import PoolOptions

ENV_PREFIX = "MOE_LLM_"
DTYPES = ("auto", "float32", "bfloat16", "float16")
EXPERT_DTYPES = ("auto", "fp8")
#: The checkpoint that ships, and the name that stands for it.
DEMO = "demo"
DEMO_CHECKPOINT = Path(__file__).resolve().parent / "demo" / "checkpoint"
#: Checked against device, block size and what is installed when the model loads: `backend.kernels.check_attention`.
ATTENTION_BACKENDS = ("auto", "triton", "flash_attn", "torch")
SWITCH = ("auto", "on", "off")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class EngineConfig:
    """Parameters of the engine. Sizes are in tokens unless the name says otherwise."""

    #: A Hugging Face checkpoint folder, `demo` for the small model that ships with the product, or `dummy:SHAPE` for
    #: seeded random weights made on the device.
    checkpoint: str = DEMO
    #: Expert skew of a dummy checkpoint: `uniform` or `zipf:S`.
    routing: str = "uniform"
    #: `auto` (cuda if there is one), `cpu`, `cuda`, `cuda:1` …; a comma-separated list starts one engine per device.
    device: str = "auto"
    #: `auto` is the checkpoint's own type (float32 for a dummy on a CPU).
    dtype: str = "auto"
    #: Bytes for the KV cache (suffixes K M G T); `kv_cache_blocks` is the alternative. Default: what max_running
    #: sequences of max_model_len need, at most 1 GiB on a CPU; for GPUs see `backend.engine.kv_memory`.
    kv_cache_memory: int | None = None
    kv_cache_blocks: int | None = None
    #: Type in which weights of experts are stored: `auto` (dtype) or `fp8` (e4m3 with a factor for each output row, a GPU from
    #: compute capability 8.9 on; made when they are loaded).
    expert_dtype: str = "auto"
    #: Tokens per KV block.
    block_size: int = 16
    #: Prompt and generated tokens of one sequence; default: the checkpoint's limit.
    max_model_len: int | None = None
    #: Token budget of one step.
    max_batch_tokens: int = 2048
    #: Sequences that run at once.
    max_running: int = 256
    #: Requests that wait; one more is refused as UNAVAILABLE.
    max_waiting: int = 1024
    #: Responses handed to Triton per second and stub; default 150 per core.
    max_responses_per_s: int | None = None
    #: United experts: comma-separated files, or ways W for united-W.safetensors of the checkpoint's folder. Default: all
    #: such files there; `none`: none of them. A dummy has seeded ones for the ways listed here.
    united: str = ""
    #: File of expert similarities, for rerouting. Default: expert-similarity.safetensors of the checkpoint's folder, if
    #: it is there; `none`: none; a dummy makes one for `seeded`.
    similarity: str = ""
    #: Calibrated brownout levels and thresholds by layer; default: brownout-profile.json of the checkpoint's folder, if it is
    #: there; `none`: none.
    profile: str = ""
    #: Time to the first token that requests are for: one that can no longer get it in this time is refused early. Default:
    #: none is.
    shed_ttft_s: float | None = None
    #: Mean time between tokens that requests are for: no more sequences run at once than get theirs in this time. Default: as
    #: many as max_running.
    hold_itl_s: float | None = None
    #: `auto`, `triton` and `flash_attn` (GPU only; flash_attn needs its package and a block_size of 256) or `torch`.
    attention_backend: str = "auto"
    #: Replay decode steps, and those of up to 1024 tokens with prompts in them, as CUDA graphs: `auto` (on a GPU), `on`, `off`.
    cuda_graphs: str = "auto"
    #: Launch the next step while one runs: `auto` (on a GPU), `on`, `off`.
    async_scheduling: str = "auto"
    #: Seconds a shutdown waits for running requests before it aborts them.
    drain_timeout_s: float = 5.0
    #: Threads of the engine's CPU kernels; default: torch's own choice.
    cpu_threads: int | None = None
    #: `local`: all experts on the device; `resident`: some of them, the others in the memory-mapped checkpoint (CPU) or pinned
    #: host memory (CUDA), from where those that are expected to be needed are fetched; `workers:N`: on N workers that Ray starts.
    expert_pool: str = "local"
    #: With `resident` and `workers:N`: the share of each layer's experts that the device or each worker holds (0.5), or the
    #: bytes for them (2G).
    resident_experts: str = "0.5"
    #: What serves an expert that is not there: `united` (its group's united expert; requests that are never browned out wait
    #: nevertheless) or `wait` (itself: every step waits for what it needs).
    expert_miss: str = "united"
    #: What experts are fetched by: `predictor` (load-predictor.safetensors beside the checkpoint), `ewma` (past loads), `auto`
    #: (the predictor if there is one) or `none` (nothing is fetched ahead).
    expert_prefetch: str = "auto"
    #: Ray cluster for `workers:N` (host:port, or auto for the one of this machine); default: one of the engine's own, on this
    #: machine, which ends with it.
    ray_address: str = ""
    #: Cores and threads of a worker; default: 1, on a cluster of the engine's own an equal share.
    worker_cpus: int | None = None
    #: Seconds after which a worker that has not answered counts as lost.
    exchange_timeout_s: float = 5.0
    #: Repeat the intermediate neurons of each routed and united expert so often and divide their down projections by it:
    #: the same function at so many times the cost, to see on a small model what a large one gains.
    widen_experts: int = 1

    def __post_init__(self) -> None:
        if self.checkpoint == DEMO:
            object.__setattr__(self, "checkpoint", str(DEMO_CHECKPOINT))

        def check(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise ConfigError(f"parameter {name} must be {allowed}, got {getattr(self, name)!r}")

        check(bool(self.checkpoint.strip()), "checkpoint", "a checkpoint folder, demo or dummy:SHAPE")
        check(self.dtype in DTYPES, "dtype", "one of " + ", ".join(DTYPES))
        check(
            self.attention_backend in ATTENTION_BACKENDS, "attention_backend", "one of " + ", ".join(ATTENTION_BACKENDS)
        )
        check(self.cuda_graphs in SWITCH, "cuda_graphs", "one of " + ", ".join(SWITCH))
        check(self.expert_dtype in EXPERT_DTYPES, "expert_dtype", "one of " + ", ".join(EXPERT_DTYPES))
        check(self.async_scheduling in SWITCH, "async_scheduling", "one of " + ", ".join(SWITCH))
        for name in ("block_size", "max_batch_tokens", "max_running", "max_waiting", "widen_experts"):
            check(getattr(self, name) >= 1, name, "at least 1")
        for name in (
            "kv_cache_memory",
            "kv_cache_blocks",
            "max_model_len",
            "max_responses_per_s",
            "cpu_threads",
            "worker_cpus",
        ):
            check(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1")
        check(
            self.block_size <= 256 and self.block_size & (self.block_size - 1) == 0,
            "block_size",
            "a power of 2 up to 256",
        )
        check(
            self.kv_cache_memory is None or self.kv_cache_blocks is None,
            "kv_cache_blocks",
            "left out when kv_cache_memory is given",
        )
        for name in ("shed_ttft_s", "hold_itl_s"):
            check(getattr(self, name) is None or getattr(self, name) > 0, name, "greater than 0 seconds")
        check(0 < self.exchange_timeout_s <= 3600, "exchange_timeout_s", "greater than 0 and at most 3600 seconds")
        check(0 <= self.drain_timeout_s <= 3600, "drain_timeout_s", "between 0 and 3600 seconds")
        _ = self.pool  # raises for unusable values
        # The resident pool fetches weights in the type of the checkpoint, and looks at loads between steps.
        for name, value, other in (("expert_dtype", "fp8", "auto"), ("async_scheduling", "on", "auto or off")):
            if self.expert_pool != "local" and getattr(self, name) == value:
                raise ConfigError(
                    f"parameter {name} is {value}, which needs expert_pool local, but that is {self.expert_pool}; set {name} "
                    f"to {other}, or expert_pool to local"
                )
        check(
            self.pool.num_workers is None or self.cuda_graphs != "on",
            "cuda_graphs",
            "auto or off with expert_pool workers",
        )
        check(
            self.attention_backend != "torch" or self.cuda_graphs != "on",
            "cuda_graphs",
            "auto or off with attention_backend torch, which reads whole block tables",
        )
        check(bool(self.devices) and all(self.devices), "device", "a device or a comma-separated list of devices")
        check(len(set(self.devices)) == len(self.devices), "device", "a list without repetitions")

    @property
    def pool(self) -> PoolOptions:
        """Which pool serves the experts."""
        names = (field.name for field in fields(PoolOptions))
        return PoolOptions(**{name: getattr(self, name) for name in names})

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(d.strip() for d in self.device.split(","))

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], env: Mapping[str, str] | None = None) -> EngineConfig:
        """Build from string parameters (Triton's `parameters`), the environment winning; empty strings are unset."""
        env = os.environ if env is None else env
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(parameters) - set(known))
        if unknown:
            raise ConfigError(f"unknown parameter {unknown[0]!r}: {nearest_known(unknown[0], known)}")
        check_names(env, ENV_PREFIX, known)
        values: dict[str, object] = {}
        for name, field in known.items():
            text = env.get(ENV_PREFIX + name.upper(), parameters.get(name, "")).strip()
            if text:
                values[name] = _parse(name, text, str(field.type))
        return cls(**values)  # type: ignore[arg-type]


def _parse(name: str, text: str, type_name: str) -> object:
    if name == "kv_cache_memory":
        return parse_bytes(name, text)
    if type_name.startswith("int"):
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"parameter {name} must be a whole number, got {text!r}") from None
    if type_name.startswith("float"):
        try:
            return float(text)
        except ValueError:
            raise ConfigError(f"parameter {name} must be a number, got {text!r}") from None
    return text


def parse_bytes(name: str, text: str) -> int:
    """Bytes from "1073741824", "512M", "1.5G" (binary units)."""
    number, unit = (text[:-1], text[-1].upper()) if text and text[-1].isalpha() else (text, "")
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(
            f"parameter {name} must be a number of bytes, with K, M, G or T if wanted, got {text!r}"
        ) from None
