"""Streaming a checkpoint's safetensors files into a model's tensors, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backend.errors import ConfigError
from backend.models.model import MoeModel

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOAT_TYPES = ("F32", "BF16", "F16")
#: Buffers of old checkpoints that follow from config.json.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"


def load_weights(model: MoeModel, folder: Path) -> dict[str, Tensor]:
    """Fill every tensor of the model from a checkpoint folder; returns, memory-mapped, those that have no storage there.

    A tensor that is missing, left over, of another shape or not a plain float type, and a file that is missing or
    truncated, is a ConfigError that names it.
    """
    targets = dict(model.weights())
    tied_head = None
    if "lm_head.weight" not in targets:
        # Some checkpoints repeat the tied matrix; a different one would mean that it is not tied.
        tied_head = targets["lm_head.weight"] = torch.empty_like(model.lm_head)
    seen: set[str] = set()
    absent: dict[str, Tensor] = {}
    for path in _files(folder):
        _load_file(path, targets, seen, absent)
    missing = sorted(set(targets) - seen - ({"lm_head.weight"} if tied_head is not None else set()))
    if missing:
        raise ConfigError(f"checkpoint {folder}: tensor {missing[0]} is missing" + _and_more(missing))
    if tied_head is not None and "lm_head.weight" in seen and not torch.equal(tied_head, model.lm_head):
        raise ConfigError(f"checkpoint {folder}: lm_head.weight differs from the embedding it is tied to")
    return absent


def _files(folder: Path) -> list[Path]:
    """The checkpoint's files: the single one, else those of the index."""
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.exists():
        raise ConfigError(f"checkpoint {folder} has neither {_SINGLE} nor {_INDEX}; other formats are not read")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ConfigError(f"checkpoint file {index} is not a safetensors index") from None
    return [folder / name for name in names]


def _load_file(path: Path, targets: dict[str, Tensor], seen: set[str], absent: dict[str, Tensor]) -> None:
    if not path.exists():
        raise ConfigError(f"checkpoint file {path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                if name.endswith(_DERIVED_SUFFIX):
                    continue
                if name not in targets:
                    raise ConfigError(f"checkpoint file {path}: tensor {name} has no place in this model")
                if name in seen:
                    raise ConfigError(f"checkpoint file {path}: tensor {name} appears twice")
                target, stored = targets[name], file.get_slice(name)
                if stored.get_dtype() not in _FLOAT_TYPES:
                    raise ConfigError(
                        f"checkpoint file {path}: tensor {name} has type {stored.get_dtype()}, only "
                        f"{', '.join(_FLOAT_TYPES)} are read"
                    )
                if list(stored.get_shape()) != list(target.shape):
                    raise ConfigError(
                        f"checkpoint file {path}: tensor {name} has shape {stored.get_shape()}, expected {list(target.shape)}"
                    )
                if target.is_meta:
                    absent[name] = file.get_tensor(name)
                else:
                    target.copy_(file.get_tensor(name))
                seen.add(name)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"checkpoint file {path} is truncated or not safetensors: {error}; copy or download it again"
        ) from None


def _and_more(names: Iterable[str]) -> str:
    rest = len(list(names)) - 1
    return f" (and {rest} more)" if rest else ""
