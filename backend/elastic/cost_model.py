"""What a layer costs on several devices with expert parallelism: a roofline with stated constants.

Attention and the shared expert are replicated and tokens spread evenly over the devices (data parallel); routed experts
live on one or more devices, and tokens travel there and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from backend.errors import ConfigError
from backend.models.config import ModelConfig

#: Assumed constants of the hardware: bytes/s of device memory, FLOP/s of matmuls as kernels reach them, bytes/s per device
#: between devices and from host memory. Those of memory and matmuls can be replaced by measured ones (`kernel_fit`).
HARDWARE: dict[str, dict[str, float]] = {
    # Reference figures of one H200, not measured by this project: its lower copy bandwidth, 55 % of its bf16 matmul rate. NVLink 4
    # and PCIe 5 at about 85 % of nominal.
    "h200": {
        "memory_bandwidth": 4.3e12,
        "matmul_rate": 0.55 * 790e12,
        "peer_bandwidth": 380e9,
        "host_bandwidth": 54e9,
    },
    # Nominal figures of an A100 80 GB (2.0 TB/s, 312 TFLOP/s, NVLink 3, PCIe 4), taken at the same shares.
    "a100": {
        "memory_bandwidth": 1.7e12,
        "matmul_rate": 0.55 * 312e12,
        "peer_bandwidth": 250e9,
        "host_bandwidth": 27e9,
    },
    # Nominal figures of an A6000 without NVLink (768 GB/s, 155 TFLOP/s, everything over PCIe 4), at the same shares.
    "a6000": {
        "memory_bandwidth": 0.65e12,
        "matmul_rate": 0.55 * 155e12,
        "peer_bandwidth": 24e9,
        "host_bandwidth": 24e9,
    },
    # Hosts of two cores, memory and matmul about as measured on such an AMD EPYC; 25 Gbit/s Ethernet at 85 % of nominal, weights
    # from a disk.
    "cpu": {
        "memory_bandwidth": 30e9,
        "matmul_rate": 250e9,
        "peer_bandwidth": 2.7e9,
        "host_bandwidth": 1e9,
        "exchange_s": 100e-6,
    },
}
_WEIGHT_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class CostModel:
    """Seconds of the parts of one layer. Constants are assumptions unless they come from measured kernels (`kernel_fit`)."""

    expert_bytes: float
    #: FLOP of one expert for one token.
    expert_flops: float
    #: Bytes of one token's hidden state.
    token_bytes: float
    #: Weights outside the routed experts, bytes a layer, and their FLOP for one token.
    dense_bytes: float
    dense_flops: float
    #: Keys and values of one token, bytes a layer.
    kv_bytes: float

    memory_bandwidth: float
    matmul_rate: float
    peer_bandwidth: float
    host_bandwidth: float
    #: Fixed time of the routed experts' kernels on a device; with graphs a part of `launch_s`.
    experts_s: float = 0.0
    #: Fixed time of each of the two exchanges of tokens in a layer.
    exchange_s: float = 15e-6
    #: Fixed time of all kernel launches of a layer (small with graphs).
    launch_s: float = 10e-6
    #: Fixed time of a transfer of weights.
    load_s: float = 20e-6
    #: From a prediction to the start of the transfers that it causes.
    planning_s: float = 400e-6

    @classmethod
    def of(cls, model: ModelConfig, hardware: str, **constants: float) -> CostModel:
        """For a model's sizes in bfloat16; raises ConfigError for unknown hardware or a constant that is not positive."""
        if hardware not in HARDWARE:
            raise ConfigError(f"hardware must be one of {', '.join(HARDWARE)}, got {hardware!r}")
        for name, value in constants.items():
            if not value >= 0 or (value == 0 and not name.endswith("_s")):
                raise ConfigError(f"{name} must be positive, got {value}")
        hidden, expert = model.hidden_size, 3 * model.hidden_size * model.expert_size
        heads = 2 * model.num_heads + 2 * model.num_kv_heads
        dense = hidden * heads * model.head_dim + 3 * hidden * model.shared_expert_size
        return cls(
            expert_bytes=expert * _WEIGHT_BYTES,
            expert_flops=2 * expert,
            token_bytes=hidden * _WEIGHT_BYTES,
            dense_bytes=dense * _WEIGHT_BYTES,
            dense_flops=2 * dense,
            kv_bytes=2 * model.num_kv_heads * model.head_dim * _WEIGHT_BYTES,
            **{**HARDWARE[hardware], **constants},
        )

    @property
    def read_s(self) -> float:
        """Seconds to read one expert: the least that a replica costs in a step."""
        return self.expert_bytes / self.memory_bandwidth

    @property
    def ridge_tokens(self) -> float:
        """Tokens for which computing an expert takes as long as reading it; splitting fewer saves nothing."""
        return self.read_s * self.matmul_rate / self.expert_flops

    def replica_s(self, tokens: float) -> float:
        """One replica with `tokens` assignments; of an expected load below one token, the expected time."""
        return max(min(tokens, 1.0) * self.read_s, tokens * self.expert_flops / self.matmul_rate)

    def exchange_seconds(self, device_assignments: Sequence[float]) -> float:
        """Tokens to their experts and back; the device with the most assignments [D] decides. 0 with one device."""
        devices = len(device_assignments)
        if devices == 1:
            return 0.0
        travelling = max(device_assignments) * (1 - 1 / devices)
        return 2 * (self.exchange_s + travelling * self.token_bytes / self.peer_bandwidth)

    def dense_seconds(self, tokens: int, context_tokens: int, devices: int) -> float:
        """Attention, shared expert and launches for a step's tokens over sequences of `context_tokens` in all."""
        read = (self.dense_bytes + context_tokens / devices * self.kv_bytes) / self.memory_bandwidth
        return max(read, tokens / devices * self.dense_flops / self.matmul_rate) + self.launch_s

    def load_seconds(self, from_peer: bool) -> float:
        """Transfer of one expert's weights to a device."""
        return self.load_s + self.expert_bytes / (self.peer_bandwidth if from_peer else self.host_bandwidth)

    def constants(self) -> dict[str, float]:
        return asdict(self)
