"""Which experts a checkpoint uses for what, and how alike they are; seen by hooks on the model in transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from backend.demo.corpus import DOMAINS
from backend.demo.families import FAMILIES, sample
from backend.demo.quality import load_transformers, windows
from backend.demo.tasks import FORMS, in_form
from backend.demo.template import answer_text, prompt_text

#: Positions of the model's input to each layer's experts, [layer][…] of [tokens, hidden].
Inputs = list[list[Tensor]]


class Routing:
    """The experts' inputs and choices on mixed text: the held-out text of each domain and held-out questions."""

    def __init__(self, checkpoint: Path, data: Path | None, rows: int = 12, seed: int = 0) -> None:
        self.model, self.tokenizer = load_transformers(checkpoint)
        self.layers = [layer.mlp for layer in self.model.model.layers]
        self.experts = int(self.model.config.num_experts)
        self.top_k = int(self.model.config.num_experts_per_tok)
        #: Inputs of the experts [layers, tokens, hidden] by domain; "questions" beside the text domains.
        self.inputs: dict[str, Tensor] = {}
        for domain in DOMAINS if data else ():
            batch = windows(data, domain, rows, self.tokenizer)  # type: ignore[arg-type]
            if batch is not None:
                self.inputs[domain] = self._run([row[:-1] for row in batch])
        self.inputs["questions"] = self._run(self._questions(rows * 16, random.Random(f"routing {seed}")))

    def chosen(self, domain: str) -> Tensor:
        """[layers, tokens, K] experts of a domain's tokens."""
        return torch.stack(
            [
                F.linear(inputs, mlp.gate.weight).topk(self.top_k, dim=-1).indices
                for inputs, mlp in zip(self.inputs[domain], self.layers, strict=True)
            ]
        )

    def shares(self, domain: str) -> Tensor:
        """[layers, E] share of a domain's assignments that each expert gets."""
        counts = torch.stack([torch.bincount(layer.flatten(), minlength=self.experts) for layer in self.chosen(domain)])
        return counts / counts.sum(dim=1, keepdim=True)

    def report(self, seed: int = 0) -> dict[str, object]:
        """The figures of docs/results/demo-model.md."""
        by_domain = {domain: self.shares(domain) for domain in self.inputs}
        mixed = torch.stack(list(by_domain.values())).mean(dim=0)  # every domain counts alike
        top = {
            domain: [set(layer.topk(12).indices.tolist()) for layer in shares] for domain, shares in by_domain.items()
        }
        names = list(by_domain)
        common = {
            f"{a} and {b}": [len(x & y) for x, y in zip(top[a], top[b], strict=True)]
            for i, a in enumerate(names)
            for b in names[i + 1 :]
        }
        return {
            "least_used_times_uniform": (mixed.min(dim=1).values * self.experts).tolist(),
            "most_used_times_uniform": (mixed.max(dim=1).values * self.experts).tolist(),
            "active_experts_of_32_tokens": self._active(32, random.Random(seed)),
            "top12_in_common": common,
            "top12": {domain: [sorted(layer) for layer in layers] for domain, layers in top.items()},
            "output_cosine": [self._cosine_summary(similarity) for similarity in self.similarities()],
        }

    @torch.no_grad()
    def similarities(self, tokens: int = 512) -> Tensor:
        """[layers, E, E] mean cosine between the outputs of two experts on the same tokens of the mix."""
        each = max(1, tokens // len(self.inputs))
        mixed = torch.cat(
            [inputs[:, :: max(1, inputs.shape[1] // each)][:, :each] for inputs in self.inputs.values()], dim=1
        )
        found = []
        for inputs, mlp in zip(mixed, self.layers, strict=True):
            outputs = [expert_output(mlp.experts, expert, inputs) for expert in range(self.experts)]
            outputs = F.normalize(torch.stack(outputs), dim=-1)  # [E, tokens, H]
            found.append(torch.einsum("eth,fth->ef", outputs, outputs) / inputs.shape[0])
        return torch.stack(found)

    def _active(self, tokens: int, rng: random.Random) -> list[float]:
        """Mean number of different experts that `tokens` tokens drawn evenly from all domains use, by layer."""
        chosen = {domain: self.chosen(domain) for domain in self.inputs}
        names, trials = list(chosen), 50
        totals = [0] * len(self.layers)
        for _ in range(trials):
            picks = []
            for i in range(tokens):
                domain = chosen[names[i % len(names)]]
                picks.append(domain[:, rng.randrange(domain.shape[1])])
            batch = torch.cat(picks, dim=1)
            for layer, experts in enumerate(batch):
                totals[layer] += len(experts.unique())
        return [total / trials for total in totals]

    def _cosine_summary(self, similarity: Tensor) -> dict[str, float]:
        off = similarity - 2 * torch.eye(self.experts)
        pairs = similarity[~torch.eye(self.experts, dtype=torch.bool)]
        return {
            "mean": pairs.mean().item(),
            "mean_nearest": off.max(dim=1).values.mean().item(),
            "max": off.max().item(),
        }

    def _questions(self, number: int, rng: random.Random) -> list[Tensor]:
        rows = []
        for i in range(number):
            question = sample(list(FAMILIES)[i % len(FAMILIES)], rng, held_out=True)
            prompt, answer = in_form(question, FORMS[i // len(FAMILIES) % 2], rng)
            rows.append(torch.tensor(self.tokenizer(prompt_text(prompt) + answer_text(answer)).input_ids))
        return rows

    @torch.no_grad()
    def _run(self, rows: list[Tensor]) -> Tensor:
        """[layers, tokens, hidden]: what the experts of each layer see."""
        caught: Inputs = [[] for _ in self.layers]
        with self._hooks(caught):
            for row in rows:
                self.model(input_ids=row[None])
        return torch.stack([torch.cat(layer) for layer in caught])

    @contextmanager
    def _hooks(self, caught: Inputs) -> Iterator[None]:
        handles = [
            mlp.gate.register_forward_pre_hook(lambda _, args, to=to: to.append(args[0].reshape(-1, args[0].shape[-1])))
            for mlp, to in zip(self.layers, caught, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def expert_output(experts: torch.nn.Module, expert: int, x: Tensor) -> Tensor:
    """x [tokens, H] -> what one routed expert of a transformers block makes of it."""
    gate, up = F.linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)  # type: ignore[index, arg-type]
    return F.linear(F.silu(gate) * up, experts.down_proj[expert])  # type: ignore[index]


def similar_pairs(similarity: Tensor) -> list[tuple[int, int]]:
    """All experts in pairs, the most similar pair first, then the most similar of the rest. similarity [E, E]."""
    experts = similarity.shape[0]
    order = sorted(
        ((a, b) for a in range(experts) for b in range(a + 1, experts)), key=lambda pair: -similarity[pair].item()
    )
    used: set[int] = set()
    pairs = []
    for a, b in order:
        if a not in used and b not in used:
            used |= {a, b}
            pairs.append((a, b))
    return pairs
