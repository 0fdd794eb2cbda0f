"""GPU kernels in the Triton language (not the inference server of that name)."""

from backend.kernels.gpu.attention_decode import decode_attention
from backend.kernels.gpu.attention_mixed import mixed_attention
from backend.kernels.gpu.attention_prefill import prefill_attention
from backend.kernels.gpu.experts_norm import experts_add_rms_norm
from backend.kernels.gpu.gated_mlp import gated_mlp
from backend.kernels.gpu.grouped_experts import grouped_experts_forward
from backend.kernels.gpu.kv_store import rotate_and_store, store_kv
from backend.kernels.gpu.linear import linear, output_logits
from backend.kernels.gpu.remap import remap_experts, select_experts
from backend.kernels.gpu.rmsnorm import add_rms_norm, rms_norm
from backend.kernels.gpu.rope import apply_rope
from backend.kernels.gpu.router import route, router_scores
from backend.kernels.gpu.shared_slots import add_shared_slots

__all__ = [
    "add_rms_norm",
    "add_shared_slots",
    "apply_rope",
    "decode_attention",
    "experts_add_rms_norm",
    "gated_mlp",
    "grouped_experts_forward",
    "linear",
    "mixed_attention",
    "output_logits",
    "prefill_attention",
    "remap_experts",
    "rms_norm",
    "rotate_and_store",
    "route",
    "router_scores",
    "select_experts",
    "store_kv",
]
