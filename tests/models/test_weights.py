"""Loading checkpoints: every layout that works, and a clear sentence for every one that does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backend.errors import ConfigError
from backend.models import MoeModel, load_model
from tests.models.harness import prompt_logits
from tests.models.tiny_checkpoints import make_checkpoint

PROMPT = [5, 9, 100, 42, 7]
NORM = "model.layers.1.input_layernorm.weight"


def load(path: Path, **options: str) -> MoeModel:
    return load_model(str(path), device=torch.device("cpu"), **options)


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the checkpoint's tensors."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_sharded_and_single_files_give_the_same_model(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "single")
    make_checkpoint(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    expected = prompt_logits(load(tmp_path / "single"), PROMPT)
    assert torch.equal(prompt_logits(load(tmp_path / "sharded"), PROMPT), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_weights_stay_sixteen_bit_and_agree(tmp_path: Path, dtype: str) -> None:
    make_checkpoint(tmp_path, dtype=getattr(torch, dtype))
    model = load(tmp_path)
    assert model.dtype == getattr(torch, dtype)
    matrices = [tensor for _, tensor in model.weights() if tensor.dim() == 2]
    assert all(tensor.dtype == model.dtype for tensor in matrices)
    ours, exact = prompt_logits(model, PROMPT), prompt_logits(load(tmp_path, dtype="float32"), PROMPT)
    assert torch.nn.functional.cosine_similarity(ours, exact).min() > 0.99


def test_dtype_parameter_wins_over_the_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    assert load(tmp_path).dtype == torch.float32
    assert load(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    assert load(tmp_path, dtype="bfloat16").weight_bytes() < load(tmp_path).weight_bytes() * 0.6


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop(NORM))
    with pytest.raises(ConfigError, match=f"tensor {NORM} is missing"):
        load(tmp_path)


def test_left_over_tensor_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.9.mlp.gate.weight": torch.zeros(3)}))
    with pytest.raises(ConfigError, match=r"model\.layers\.9\.mlp\.gate\.weight has no place"):
        load(tmp_path)


def test_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({NORM: torch.zeros(47)}))
    with pytest.raises(ConfigError, match=rf"{NORM} has shape \[47\], expected \[48\]"):
        load(tmp_path)


def test_tensor_of_an_integer_type_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({NORM: torch.zeros(48, dtype=torch.int8)}))
    with pytest.raises(ConfigError, match=f"{NORM} has type I8"):
        load(tmp_path)


@pytest.mark.parametrize("kept_share", [0.0, 0.3, 0.99])
def test_truncated_file_is_named(tmp_path: Path, kept_share: float) -> None:
    make_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept_share)])
    with pytest.raises(
        ConfigError, match=r"model\.safetensors is truncated or not safetensors.*copy or download it again"
    ):
        load(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=f"{shard.name} is missing"):
        load(tmp_path)


def test_broken_index_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json is not a safetensors index"):
        load(tmp_path)


def test_folder_without_safetensors_says_what_is_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"has neither model\.safetensors nor"):
        load(tmp_path)


def test_missing_folder_and_bad_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"parameter checkpoint: .* is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        load(tmp_path)


def test_repeated_tied_matrix_must_be_the_embedding(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    expected = prompt_logits(load(tmp_path), PROMPT)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert torch.equal(prompt_logits(load(tmp_path), PROMPT), expected)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(199, 48)}))
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs from the embedding"):
        load(tmp_path)


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    assert load(tmp_path).config.eos_token_ids == (2,)
    edit_json(tmp_path / "generation_config.json", eos_token_id=[7, 8])
    assert load(tmp_path).config.eos_token_ids == (7, 8)
    (tmp_path / "generation_config.json").unlink()
    edit_json(tmp_path / "config.json", eos_token_id=None)
    assert load(tmp_path).config.eos_token_ids == ()
