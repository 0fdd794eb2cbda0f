"""What an engine's expert layers saw: their inputs and the experts chosen, token by token, for predictors and simulations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.elastic.predictor import LoadPredictor
from backend.elastic.routing import RoutingPool
from backend.elastic.traffic import Traffic
from backend.engine.engine import Engine
from backend.engine.llm import LLM
from backend.engine.sampling_params import SamplingParams
from backend.errors import ConfigError
from backend.models.dummy import PREFIX
from backend.models.moe import MoeBlock

FORMAT = 1


@dataclass(frozen=True)
class Recording:
    """N tokens of S sequences through L layers with experts; M hidden size, E experts, K of them per token."""

    hidden: Tensor  # [L, N, M] float16: input of each expert layer
    experts: Tensor  # [L, N, K] int16: experts the router chose
    starts: Tensor  # [S + 1] int64: first token of each sequence; last entry N
    domains: Tensor  # [S] int64: index into domain_names
    routers: Tensor  # [L, E, M] float32
    biases: Tensor  # [L, E] float32: added to the router's logits (zero except in dummy checkpoints)
    domain_names: tuple[str, ...]
    fingerprint: str

    @property
    def num_layers(self) -> int:
        return self.hidden.shape[0]

    @property
    def num_experts(self) -> int:
        return self.routers.shape[1]

    @property
    def top_k(self) -> int:
        return self.experts.shape[2]

    def rows_of(self, sequences: Sequence[int]) -> Tensor:
        """Tokens [T] of some sequences, in their order."""
        parts = [torch.arange(int(self.starts[s]), int(self.starts[s + 1])) for s in sequences]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def predictor(self, *distances: int) -> LoadPredictor:
        """The routers themselves as the predictor at these distances, not fine-tuned."""
        pairs = [(layer, d) for d in distances for layer in range(d, self.num_layers)]
        return LoadPredictor(
            {(layer, d): self.routers[layer] for layer, d in pairs},
            {(layer, d): self.biases[layer] for layer, d in pairs},
            self.top_k,
            self.fingerprint,
        )

    def pool(self, predictor: LoadPredictor, distance: int) -> RoutingPool:
        """Routing for the simulator, with what the predictor says `distance` layers ahead."""
        predicted = torch.full_like(self.experts, -1)
        expected = torch.zeros((*self.experts.shape[:2], self.num_experts), dtype=torch.float16)
        for layer in range(distance, self.num_layers):
            inputs = self.hidden[layer - distance]
            predicted[layer] = predictor.choose(inputs, layer, distance).to(torch.int16)
            expected[layer] = predictor.expected(inputs, layer, distance).to(torch.float16)
        return RoutingPool(
            self.num_experts,
            self.experts.transpose(0, 1).contiguous().numpy(),
            predicted.transpose(0, 1).contiguous().numpy(),
            self.starts.numpy(),
            self.domains.numpy(),
            f"recorded: checkpoint {self.fingerprint[:8]}, {len(self.domains)} sequences, "
            f"{len(self.domain_names)} domains, distance {distance}",
            expected.transpose(0, 1).contiguous().numpy(),
        )

    def write(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        header = {"format": FORMAT, "fingerprint": self.fingerprint, "domains": self.domain_names}
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".new")
        save_file(tensors, unfinished, {"recording": json.dumps(header)})
        unfinished.replace(path)

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Raises ConfigError naming the file and what is wrong with it."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["recording"])
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
            if header["format"] != FORMAT:
                raise ConfigError(f"recording {path} has format {header['format']}, this version reads {FORMAT}")
            return cls(**tensors, domain_names=tuple(header["domains"]), fingerprint=header["fingerprint"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"{path} is not a readable recording: {error!r}") from None


_TENSORS = ("hidden", "experts", "starts", "domains", "routers", "biases")


class _Tap:
    """Stands in for a MoeBlock and keeps what it is given."""

    def __init__(self, block: MoeBlock) -> None:
        self.block = block
        self.inputs: list[Tensor] = []

    def add_to(self, residual: Tensor, x: Tensor, *args: object) -> Tensor:
        """See MoeBlock."""
        # A copy: the block may work in place.
        self.inputs.append(x.detach().to("cpu", torch.float16, copy=True))
        return self.block.add_to(residual, x, *args)

    def __getattr__(self, name: str) -> object:
        return getattr(self.block, name)


@contextmanager
def _tapped(engine: Engine) -> Iterator[tuple[list[_Tap], list[object]]]:
    """Record the inputs of every expert layer, and for each row of each step the id of its request."""
    layers = [layer for layer in engine.runner.model.layers if layer.moe is not None]
    taps = [_Tap(layer.moe) for layer in layers]
    owners: list[object] = []
    run = engine.runner.run

    def noting(schedule, *args, **kwargs):
        for sequence, count in zip(schedule.sequences, schedule.num_tokens, strict=True):
            owners.extend([sequence.request.request_id] * count)
        return run(schedule, *args, **kwargs)

    try:
        for layer, tap in zip(layers, taps, strict=True):
            layer.moe = tap  # type: ignore[assignment]
        engine.runner.run = noting  # type: ignore[method-assign]
        yield taps, owners
    finally:
        engine.runner.run = run  # type: ignore[method-assign]
        for layer, tap in zip(layers, taps, strict=True):
            layer.moe = tap.block


def record(
    llm: LLM, prompts: Sequence[str | Sequence[int]], domains: Sequence[str], params: SamplingParams, fingerprint: str
) -> Recording:
    """Complete the prompts together, as the engine would serve them, and keep what every expert layer saw.

    The experts are those of the router without brownout. Prompts that share a prefix lose what the prefix cache saves.
    """
    with _tapped(llm.engine) as (taps, owners):
        llm.generate(prompts, params)
    # Rows of a sequence stand in the order of its tokens, since steps and chunks are in order.
    owner = np.array(owners, np.int64)
    order = torch.from_numpy(np.argsort(owner, kind="stable"))
    lengths = torch.from_numpy(np.bincount(owner, minlength=len(prompts)))
    names = sorted(set(domains))
    hidden = torch.stack([torch.cat(tap.inputs)[order] for tap in taps])
    routers = torch.stack([tap.block.router.detach().to("cpu", torch.float32) for tap in taps])
    none = torch.zeros(routers.shape[1])
    biases = torch.stack([none if tap.block.router_bias is None else tap.block.router_bias.cpu() for tap in taps])
    top_k = taps[0].block.top_k
    chosen = [
        (x.float() @ router.T + bias).topk(top_k).indices
        for x, router, bias in zip(hidden, routers, biases, strict=True)
    ]
    return Recording(
        hidden,
        torch.stack(chosen).to(torch.int16),
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        torch.tensor([names.index(domain) for domain in domains]),
        routers,
        biases,
        tuple(names),
        fingerprint,
    )


def record_traffic(checkpoint: str, traffic: Traffic, new_tokens: int, seed: int, progress: Progress) -> Recording:
    """Record a checkpoint on some traffic, sampling at temperature 1; see `record`."""
    task = progress.add_task(f"recording {len(traffic.prompts)} prompts", total=None)
    # A replayed graph would pass the taps by, and a step ahead may compute a row that nobody asked for.
    llm = LLM(checkpoint, cuda_graphs="off", async_scheduling="off")
    params = SamplingParams(max_tokens=new_tokens, temperature=1.0, seed=seed)
    recording = record(llm, traffic.prompts, traffic.domains, params, fingerprint_of(checkpoint))
    progress.remove_task(task)
    return recording


def fingerprint_of(checkpoint: str) -> str:
    """The checkpoint's fingerprint; of a dummy its name."""
    return checkpoint if checkpoint.startswith(PREFIX) else checkpoint_fingerprint(Path(checkpoint))
