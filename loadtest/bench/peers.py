"""Other engines on the same checkpoint and prompts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.brownout.united_file import UnitedExperts, UnitedLayer, write_united
from backend.models import load_model
from backend.models.dummy import raw_config
from backend.models.model import MoeModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Run(NamedTuple):
    """One measured run: seconds from handing over all prompts to the last token, and each prompt's new tokens."""

    seconds: float
    tokens: list[list[int]]


class Peer(Protocol):
    """An engine that can be measured in turn with ours."""

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        """Complete all prompts greedily with exactly `new_tokens` tokens each. Raises RuntimeError."""


def shape_config(checkpoint: str) -> PretrainedConfig:
    """transformers' configuration of a `dummy:SHAPE`. Raises ValueError for a family whose shapes it is not written for."""
    from transformers import Qwen2MoeConfig

    raw = {"num_key_value_heads": None, **raw_config(checkpoint)}
    if raw["num_key_value_heads"] is None:
        raw["num_key_value_heads"] = raw["num_attention_heads"]
    if raw.pop("architectures") != ["Qwen2MoeForCausalLM"]:
        raise ValueError(f"{checkpoint} cannot be exported for a peer: only Qwen2-MoE shapes can")
    return Qwen2MoeConfig(**raw, rope_parameters={"rope_theta": raw.pop("rope_theta"), "rope_type": "default"})


def export_shape(checkpoint: str, folder: Path, dtype: str) -> None:
    """Write a `dummy:SHAPE` as a Hugging Face checkpoint with transformers' own random weights."""
    from transformers import AutoModelForCausalLM

    config = shape_config(checkpoint)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype))
    model.save_pretrained(folder)


def export_united(folder: Path, way: int, path: Path) -> None:
    """Write united experts of neighbouring experts' means for the exported checkpoint in `folder`."""
    model = load_model(str(folder), device=torch.device("cpu"), united="none")
    groups = torch.arange(model.config.num_experts) // way
    layers = {}
    for i, layer in enumerate(model.layers):
        if layer.moe is not None:
            stacks = (layer.moe.experts.w13, layer.moe.experts.w2)
            w13, w2 = (torch.stack([part.float().mean(0) for part in s.split(way)]).to(s.dtype) for s in stacks)
            layers[i] = UnitedLayer(groups.clone(), w13, w2)
    united = UnitedExperts(way, checkpoint_fingerprint(folder), "index", layers)
    write_united(path, united)


class TransformersPeer:
    """transformers' `generate` with its grouped-matmul experts, in this process."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device

    @classmethod
    def of_checkpoint(cls, checkpoint: str, device: torch.device, dtype: str) -> TransformersPeer:
        """Loads the checkpoint."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch_dtype(dtype), experts_implementation="grouped_mm"
        )
        return cls(model.to(device), device)

    @classmethod
    def of_model(cls, model: MoeModel, checkpoint: str) -> TransformersPeer:
        """Takes the weights of our model of a `dummy:SHAPE`: on a GPU there is neither time nor memory for another set."""
        from transformers import AutoModelForCausalLM

        config = shape_config(checkpoint)
        with torch.device("meta"):
            theirs = AutoModelForCausalLM.from_config(
                config, dtype=model.dtype, experts_implementation="grouped_mm", attn_implementation="sdpa"
            )
        theirs.load_state_dict(_stacked(model), strict=True, assign=True)
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(model.device)
        return cls(theirs.eval(), model.device)

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
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
        tokens = out[:, ids.shape[1] :].tolist()  # the copy to the host waits for the device
        elapsed = time.perf_counter() - started
        if len(tokens[0]) != new_tokens:
            raise RuntimeError(f"transformers made {len(tokens[0])} tokens instead of {new_tokens}")
        return Run(elapsed, tokens)


def _stacked(model: MoeModel) -> dict[str, torch.Tensor]:
    """Our weights under the names of transformers' modules, which stack experts as we do."""
    state = {name: tensor for name, tensor in model.weights() if ".experts." not in name}
    for i, layer in enumerate(model.layers):
        if layer.moe is not None:
            count = model.config.num_experts
            prefix = f"model.layers.{i}.mlp.experts"
            state[f"{prefix}.gate_up_proj"] = layer.moe.experts.w13[:count]
            state[f"{prefix}.down_proj"] = layer.moe.experts.w2[:count]
    return state


def tokens_equal(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of sequences with the same tokens from the first to the last."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def torch_dtype(name: str) -> torch.dtype:
    return torch.float32 if name == "auto" else getattr(torch, name)
