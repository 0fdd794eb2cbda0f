"""Other engines on the same checkpoint and prompts."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from backend.brownout.united_file import UnitedExperts, UnitedLayer, checkpoint_fingerprint, write_united
from backend.models import load_model
from backend.models.dummy import raw_config


def export_shape(checkpoint: str, folder: Path, dtype: str) -> Path:
    """Write a `dummy:SHAPE` as a Hugging Face checkpoint with transformers' own random weights."""
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig

    raw = {"num_key_value_heads": None, **raw_config(checkpoint)}
    if raw["num_key_value_heads"] is None:
        raw["num_key_value_heads"] = raw["num_attention_heads"]
    if raw.pop("architectures") != ["Qwen2MoeForCausalLM"]:
        raise ValueError(f"{checkpoint} cannot be exported for a peer: only Qwen2-MoE shapes can")
    torch.manual_seed(0)
    config = Qwen2MoeConfig(**raw, rope_parameters={"rope_theta": raw.pop("rope_theta"), "rope_type": "default"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype))
    model.save_pretrained(folder)
    return folder


def export_united(folder: Path, way: int) -> None:
    """Write united experts of neighbouring experts' means beside an exported checkpoint."""
    model = load_model(str(folder), device=torch.device("cpu"), united="none")
    groups = torch.arange(model.config.num_experts) // way
    layers = {}
    for i, layer in enumerate(model.layers):
        if layer.moe is not None:
            stacks = (layer.moe.experts.w13, layer.moe.experts.w2)
            w13, w2 = (torch.stack([part.float().mean(0) for part in s.split(way)]).to(s.dtype) for s in stacks)
            layers[i] = UnitedLayer(groups.clone(), w13, w2)
    united = UnitedExperts(way, checkpoint_fingerprint(folder), "index", layers)
    write_united(folder / f"united-{way}.safetensors", united)


class TransformersPeer:
    """transformers' `generate` with its grouped-matmul experts."""

    def __init__(self, checkpoint: str, device: torch.device, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch_dtype(dtype), experts_implementation="grouped_mm"
        ).to(device)
        self._device = device

    @torch.inference_mode()
    def time_s(self, prompts: list[list[int]], new_tokens: int) -> float:
        ids = torch.tensor(prompts, device=self._device)
        started = time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        tokens = out.shape[1] - ids.shape[1]  # reading the shape waits for nothing; the copy below does
        out.cpu()
        elapsed = time.perf_counter() - started
        if tokens != new_tokens:
            raise RuntimeError(f"transformers made {tokens} tokens instead of {new_tokens}")
        return elapsed


def torch_dtype(name: str) -> torch.dtype:
    return torch.float32 if name == "auto" else getattr(torch, name)
