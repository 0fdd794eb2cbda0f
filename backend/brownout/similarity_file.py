"""The file of expert similarities for `reroute`: `expert-similarity.safetensors`, bound to one checkpoint by a fingerprint.

Tensors: `layers.<l>.similarity` float32 [E, E] for every MoE layer l; entry [e, f] says how well expert f stands in for e, at
most 1 (SERE, arXiv 2602.07616: the similarity of their outputs on calibration tokens). The safetensors metadata entry
`similarity` is JSON: format and fingerprint (see `backend.brownout.united_file.checkpoint_fingerprint`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backend.errors import ConfigError

FORMAT = 1
FILE_NAME = "expert-similarity.safetensors"


def write_similarity(path: Path, fingerprint: str, layers: Mapping[int, Tensor]) -> None:
    """Write the file, whole or not at all; `layers` are [E, E] by index of the model's layer."""
    tensors = {f"layers.{i}.similarity": table.to("cpu", torch.float32).contiguous() for i, table in layers.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    save_file(tensors, unfinished, {"similarity": json.dumps({"format": FORMAT, "fingerprint": fingerprint})})
    unfinished.replace(path)


def read_similarity(path: Path, fingerprint: str | None = None) -> dict[int, Tensor]:
    """Read and check a file; with `fingerprint` also that it belongs to that checkpoint. Returns [E, E] by layer.

    Raises ConfigError naming the file and what is wrong with it. E is checked against a model where it is loaded.
    """
    if not path.is_file():
        raise ConfigError(f"expert similarity file {path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["similarity"])
            layers = {int(name.split(".")[1]): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        found, version = header["fingerprint"], header["format"]
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"expert similarity file {path} is truncated or not safetensors: {error}; write it again "
            f"(python -m backend.brownout.build)"
        ) from None
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"{path} is not an expert similarity file: {error!r}") from None
    if version != FORMAT:
        raise ConfigError(f"expert similarity file {path} has format {version}, this version reads {FORMAT}")
    if fingerprint is not None and found != fingerprint:
        raise ConfigError(
            f"expert similarity file {path} was made for another checkpoint (fingerprint {found}, this one has {fingerprint})"
        )
    for index, table in layers.items():
        if table.dtype != torch.float32 or table.dim() != 2 or table.shape[0] != table.shape[1]:
            raise ConfigError(
                f"expert similarity file {path}: layer {index} is {table.dtype} {list(table.shape)}, expected float32 [E, E]"
            )
        if not table.isfinite().all():
            raise ConfigError(f"expert similarity file {path}: layer {index} has entries that are not finite numbers")
    return layers
