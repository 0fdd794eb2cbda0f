"""Reference kernels in plain torch: what every other implementation is compared with; correct on any device."""

from backend.kernels.reference.attention_decode import decode_attention
from backend.kernels.reference.attention_mixed import mixed_attention
from backend.kernels.reference.attention_prefill import prefill_attention
from backend.kernels.reference.experts_norm import experts_add_rms_norm
from backend.kernels.reference.gated_mlp import gated_mlp
from backend.kernels.reference.grouped_experts import grouped_experts_forward
from backend.kernels.reference.kv_store import rotate_and_store, store_kv
from backend.kernels.reference.linear import linear, output_logits
from backend.kernels.reference.remap import remap_experts, select_experts
from backend.kernels.reference.rmsnorm import add_rms_norm, rms_norm
from backend.kernels.reference.rope import apply_rope
from backend.kernels.reference.router import route, router_scores
from backend.kernels.reference.shared_slots import add_shared_slots

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
