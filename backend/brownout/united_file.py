"""The file of united experts of one way: `united-<way>.safetensors`, bound to one checkpoint by a fingerprint.

Tensors, for every MoE layer l of the model, with E experts, G groups, I and M the sizes of an expert:
`layers.<l>.groups` int64 [E] (each expert's group), `layers.<l>.w13` [G, 2 * I, M] (gate rows above up rows) and
`layers.<l>.w2` [G, M, I]. The safetensors metadata entry `united` is JSON: format, way, fingerprint, grouping and
`layers` with what the builder says of each layer (relative error on held-out tokens).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backend.errors import ConfigError

FORMAT = 1


@dataclass(frozen=True)
class UnitedLayer:
    """United experts of one layer: groups [E] int64, w13 [G, 2 * I, M], w2 [G, M, I]."""

    groups: Tensor
    w13: Tensor
    w2: Tensor


@dataclass(frozen=True)
class UnitedExperts:
    """United experts of one way, by index of the model's layer (layers without experts are left out)."""

    way: int
    fingerprint: str
    grouping: str
    layers: dict[int, UnitedLayer]
    #: What the builder says of each layer, for example {"0": {"relative_error": 0.12}}.
    report: dict[str, Any] = field(default_factory=dict)


def write_united(path: Path, united: UnitedExperts) -> None:
    """Write the file, whole or not at all."""
    tensors = {}
    for index, layer in united.layers.items():
        tensors[f"layers.{index}.groups"] = layer.groups.to("cpu", torch.int64).contiguous()
        tensors[f"layers.{index}.w13"] = layer.w13.cpu().contiguous()
        tensors[f"layers.{index}.w2"] = layer.w2.cpu().contiguous()
    header = {
        "format": FORMAT, "way": united.way, "fingerprint": united.fingerprint, "grouping": united.grouping,
        "layers": united.report,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    save_file(tensors, unfinished, {"united": json.dumps(header)})
    unfinished.replace(path)


def read_united(path: Path, fingerprint: str | None = None) -> UnitedExperts:
    """Read and check a file; with `fingerprint` also that it belongs to that checkpoint.

    Raises ConfigError naming the file and what is wrong with it. Sizes are checked against a model where it is loaded.
    """
    if not path.is_file():
        raise ConfigError(f"united experts file {path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["united"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        if header["format"] != FORMAT:
            raise ConfigError(f"united experts file {path} has format {header['format']}, this version reads {FORMAT}")
        way, found, grouping, report = header["way"], header["fingerprint"], header["grouping"], header["layers"]
        layers = {
            int(name.split(".")[1]): UnitedLayer(
                tensors[name], tensors[name.replace(".groups", ".w13")], tensors[name.replace(".groups", ".w2")]
            )
            for name in tensors
            if name.endswith(".groups")
        }
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"united experts file {path} is truncated or not safetensors: {error}; build it again "
            f"(python -m backend.brownout.build)"
        ) from None
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"{path} is not a united experts file: {error!r}") from None
    if fingerprint is not None and found != fingerprint:
        raise ConfigError(
            f"united experts file {path} was built for another checkpoint (fingerprint {found}, this one has {fingerprint}); "
            "build it again with backend.brownout.build"
        )
    for index, layer in layers.items():
        _check_layer(path, index, layer, way)
    return UnitedExperts(way, found, grouping, layers, report)


def _check_layer(path: Path, index: int, layer: UnitedLayer, way: int) -> None:
    groups, w13, w2 = layer.groups, layer.w13, layer.w2
    sizes = groups.dim() == 1 and w13.dim() == 3 and w2.dim() == 3 and len(w13) == len(w2)
    if not sizes or w13.shape[1:] != (2 * w2.shape[2], w2.shape[1]):
        raise ConfigError(
            f"united experts file {path}: layer {index} has shapes groups {list(groups.shape)}, w13 {list(w13.shape)}, "
            f"w2 {list(w2.shape)}, expected [E], [G, 2 I, M], [G, M, I]"
        )
    if groups.dtype != torch.int64 or groups.numel() == 0 or groups.min() < 0 or groups.max() >= len(w13):
        raise ConfigError(f"united experts file {path}: layer {index} has groups outside 0 to {len(w13) - 1}")
    if int(torch.bincount(groups).max()) > way:
        raise ConfigError(f"united experts file {path}: layer {index} has a group of more than {way} experts")
