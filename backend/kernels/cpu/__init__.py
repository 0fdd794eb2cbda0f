"""CPU kernels: compiled where few rows meet many weights, torch's own operators elsewhere."""

from backend.kernels.cpu.attention_decode import decode_attention
from backend.kernels.cpu.attention_prefill import prefill_attention
from backend.kernels.cpu.experts_norm import experts_add_rms_norm
from backend.kernels.cpu.gated_mlp import gated_mlp
from backend.kernels.cpu.grouped_experts import grouped_experts_forward
from backend.kernels.cpu.kv_store import rotate_and_store
from backend.kernels.cpu.linear import linear, output_logits
from backend.kernels.cpu.remap import remap_experts, select_experts
from backend.kernels.cpu.rmsnorm import add_rms_norm, rms_norm
from backend.kernels.cpu.router import route
from backend.kernels.reference import add_shared_slots, apply_rope, mixed_attention, router_scores, store_kv

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
