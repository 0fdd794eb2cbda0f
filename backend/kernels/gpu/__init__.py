"""GPU kernels in the Triton language (not the inference server of that name)."""

from backend.kernels.gpu.grouped_experts import grouped_experts_forward
from backend.kernels.gpu.kv_store import rotate_and_store, store_kv
from backend.kernels.gpu.linear import linear
from backend.kernels.gpu.rmsnorm import add_rms_norm, rms_norm
from backend.kernels.gpu.rope import apply_rope
from backend.kernels.gpu.router import route
from backend.kernels.reference import decode_attention, prefill_attention, remap_experts

__all__ = [
    "add_rms_norm",
    "apply_rope",
    "decode_attention",
    "grouped_experts_forward",
    "linear",
    "prefill_attention",
    "remap_experts",
    "rms_norm",
    "rotate_and_store",
    "route",
    "store_kv",
]
