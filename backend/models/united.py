"""What brownout needs beside the checkpoint: united experts and expert similarities, found, checked and put in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.brownout.similarity_file import FILE_NAME, read_similarity
from backend.brownout.united_file import UnitedExperts, read_united
from backend.errors import ConfigError
from backend.models.config import ModelConfig
from backend.models.model import MoeModel

#: Value of the parameters `united` and `similarity` that loads nothing, not even what lies in the checkpoint's folder.
NONE = "none"
#: Groups [E] by way and layer.
Groups = dict[int, dict[int, Tensor]]


def find_united(parameter: str, folder: Path, config: ModelConfig) -> dict[int, UnitedExperts]:
    """United experts by way for the checkpoint in `folder`.

    `parameter`: comma-separated files, or whole numbers W for `united-W.safetensors` in the folder; empty: every
    `united-*.safetensors` there; `none`. Raises ConfigError for a file that is missing, broken, built for another checkpoint
    or of sizes that do not fit the model, and for two files of one way.
    """
    if parameter == NONE:
        return {}
    if parameter:
        names = [name.strip() for name in parameter.split(",")]
        if not all(names):
            raise ConfigError(f"parameter united must be files separated by commas, got {parameter!r}")
        paths = [folder / f"united-{name}.safetensors" if name.isdecimal() else Path(name) for name in names]
    else:
        paths = sorted(folder.glob("united-*.safetensors"))
    found: dict[int, UnitedExperts] = {}
    fingerprint = checkpoint_fingerprint(folder) if paths else None
    for path in paths:
        united = read_united(path, fingerprint)
        _check_united(path, united, config)
        if united.way in found:
            raise ConfigError(
                f"united experts file {path} is {united.way}-way as another one is; one file a way, please"
            )
        found[united.way] = united
    return found


def groups_of(united: Mapping[int, UnitedExperts]) -> Groups:
    return {way: {i: layer.groups for i, layer in experts.layers.items()} for way, experts in united.items()}


def fill_united(model: MoeModel, united: Mapping[int, UnitedExperts]) -> None:
    """Copy the weights into the slots that the model has for them."""
    for way, experts in united.items():
        for i, layer in experts.layers.items():
            w13, w2 = model.moe_block(i).united_weights(way)
            w13.copy_(layer.w13)
            w2.copy_(layer.w2)


def load_similarity(model: MoeModel, parameter: str, folder: Path) -> None:
    """Give the MoE blocks their similarity tables.

    `parameter`: a file; empty: `expert-similarity.safetensors` of the checkpoint's folder, if there is one; `none`. Raises
    ConfigError for a file that is missing, broken, made for another checkpoint or of sizes that do not fit the model.
    """
    path = Path(parameter) if parameter else folder / FILE_NAME
    if parameter == NONE or (not parameter and not path.exists()):
        return
    tables, num_experts = read_similarity(path, checkpoint_fingerprint(folder)), model.config.num_experts
    _check_layers(f"expert similarity file {path}", set(tables), model.config)
    for i, table in tables.items():
        if len(table) != num_experts:
            raise ConfigError(
                f"expert similarity file {path}: layer {i} has {len(table)} experts, the checkpoint {num_experts}"
            )
        model.moe_block(i).similarity = table.to(model.device)


def _check_united(path: Path, united: UnitedExperts, config: ModelConfig) -> None:
    _check_layers(f"united experts file {path}", set(united.layers), config)
    for i, layer in united.layers.items():
        found = list(layer.groups.shape), list(layer.w13.shape)
        expected = (
            [config.num_experts],
            [int(layer.groups.max()) + 1, 2 * config.expert_size, config.hidden_size],
        )
        if found != expected:
            raise ConfigError(
                f"united experts file {path}: layer {i} has groups {found[0]} and w13 {found[1]}, expected {expected[0]} "
                f"and {expected[1]} for this checkpoint and these groups"
            )


def _check_layers(what: str, layers: set[int], config: ModelConfig) -> None:
    expected = {i for i, has_experts in enumerate(config.moe_layers) if has_experts}
    if missing := sorted(expected - layers):
        raise ConfigError(f"{what}: layer {missing[0]} is missing")
    if left_over := sorted(layers - expected):
        raise ConfigError(f"{what}: layer {left_over[0]} has no experts in this checkpoint")
