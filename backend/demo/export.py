"""Write a trained run as a Hugging Face checkpoint folder (Qwen2MoeForCausalLM) in bfloat16.

python -m backend.demo.export --run DIR --data DIR --output DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from backend.demo.model import DemoModel, Shape
from backend.demo.template import END, END_OF_TEXT
from backend.demo.tokenizer import load_tokenizer, save_tokenizer

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
#: Longest context offered. Training sees 256 positions at most; text beyond that is written worse, but is written.
_CONTEXT = 1024


def hugging_face_tensors(model: DemoModel) -> dict[str, Tensor]:
    """The model's weights by the names that Qwen2-MoE checkpoints use; the output head is tied and not repeated."""
    if not model.moe:
        raise ValueError("only a model with experts can be exported: train the experts phase first")
    tensors = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    for layer, (attention, feed) in enumerate(zip(model.attention, model.feed, strict=True)):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = attention.norm
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            tensors[f"{prefix}.self_attn.{name}.weight"] = attention.qkv[i]
            tensors[f"{prefix}.self_attn.{name}.bias"] = attention.qkv_bias[i]
        tensors[f"{prefix}.self_attn.o_proj.weight"] = attention.out
        tensors[f"{prefix}.post_attention_layernorm.weight"] = feed.norm
        tensors[f"{prefix}.mlp.gate.weight"] = feed.router
        tensors |= _ffn(f"{prefix}.mlp.shared_expert", feed.shared_in, feed.shared_out)
        tensors[f"{prefix}.mlp.shared_expert_gate.weight"] = feed.shared_gate
        for expert in range(model.shape.experts):
            tensors |= _ffn(f"{prefix}.mlp.experts.{expert}", feed.expert_in[expert], feed.expert_out[expert])
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _ffn(prefix: str, w_in: Tensor, w_out: Tensor) -> dict[str, Tensor]:
    return {
        f"{prefix}.gate_proj.weight": w_in[0],
        f"{prefix}.up_proj.weight": w_in[1],
        f"{prefix}.down_proj.weight": w_out,
    }


def config_json(shape: Shape, dtype: str, eos_token_id: int, pad_token_id: int) -> dict[str, object]:
    """The content of config.json."""
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "intermediate_size": shape.top_k * shape.expert_size,
        "moe_intermediate_size": shape.expert_size,
        "shared_expert_intermediate_size": shape.shared_size,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
        "hidden_act": "silu",
        "max_position_embeddings": _CONTEXT,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "use_cache": True,
        "dtype": dtype,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }


def load_run(run: Path) -> DemoModel:
    """The model of a run folder. Raises FileNotFoundError if there is none."""
    path = run / "state.pt"
    if not path.is_file():
        raise FileNotFoundError(f"there is no state.pt in {run}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = DemoModel(Shape(**state["shape"]), state["moe"])
    model.load_state_dict(state["model"])
    return model


def export(model: DemoModel, data: Path, output: Path, dtype: str = "bfloat16") -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer of the data folder."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(data)
    ends = [tokenizer.token_to_id(token) for token in (END, END_OF_TEXT)]
    tensors = {name: tensor.to(_DTYPES[dtype]).contiguous() for name, tensor in hugging_face_tensors(model).items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
    _write(output / "config.json", config_json(model.shape, dtype, ends[0], ends[1]))
    _write(output / "generation_config.json", {"eos_token_id": ends, "pad_token_id": ends[1], "do_sample": False})
    save_tokenizer(tokenizer, output)


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="backend.demo.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder of the experts phase")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the tokenizer, written by backend.demo.prepare"
    )
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument(
        "--dtype", choices=sorted(_DTYPES), default="bfloat16", help="type of the weights (default bfloat16)"
    )
    args = parser.parse_args(argv)
    try:
        export(load_run(args.run), args.data, args.output, args.dtype)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    size = sum(path.stat().st_size for path in args.output.iterdir() if path.is_file())
    Console().print(f"Wrote {args.output} ({size / 1e6:.2f} MB).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
