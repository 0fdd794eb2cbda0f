"""Training the united experts of all layers together, the originals frozen, towards the full model's predictions.

Layer-wise distillation cannot see what an error in one layer does to the next. Here the browned-out model is run as a whole
on calibration text and the united experts learn to give the full model's next-token distribution (Kullback-Leibler
divergence), each step at a way, a threshold and a batch composition drawn at random.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from backend.brownout.differentiable import Packed, Serve, final_states, head_logits, pack, run_slots
from backend.brownout.united_file import UnitedExperts, UnitedLayer
from backend.kernels.reference.remap import remap_experts
from backend.models.model import MoeModel

#: Tokens that share one decision which experts are kept, as in decode and prefill steps; None: all of the batch.
_COMPOSITIONS = (64, 256, None)
#: How often held-out text is looked at.
_CHECKS = 10
#: Steps in which the rate rises to its highest.
_WARMUP = 20


@dataclass(frozen=True)
class EndToEndOptions:
    """`tokens` of a step; `rate` as in DistillOptions; half of the steps are at threshold 0, the rest up to `threshold`."""

    steps: int = 0
    tokens: int = 4096
    rate: float = 0.01
    threshold: float = 0.8
    seed: int = 0


#: Trainable weights (w13, w2) in float32 by layer.
_Weights = dict[int, tuple[Tensor, Tensor]]


def train_end_to_end(
    model: MoeModel,
    united: Mapping[int, UnitedExperts],
    windows: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    options: EndToEndOptions,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[int, UnitedExperts]:
    """United experts by way, trained on `windows`; of each way the state that was best on `held_out` is returned.

    The report of each way gains `end_to_end`: the divergence on held-out text at threshold 0, before and after, in nats per
    token. The layers' own errors in it stay those before this training, which need not lower them.
    """
    rng = random.Random(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    length = max(map(len, windows))

    def batch_of(texts: Sequence[Sequence[int]]) -> Packed:
        return pack(_draw(texts, options.tokens, rng), length, model.device)

    measured = batch_of(held_out)
    students = {way: _Student(experts, model.device) for way, experts in united.items()}
    for student in students.values():
        student.look(model, measured, generator)
    optimizer, schedule = _optimizer(students.values(), options)
    in_turn = [students[way] for way in sorted(students)]
    for step in range(1, options.steps + 1):
        student = in_turn[step % len(in_turn)]
        theta = 0.0 if rng.random() < 0.5 else rng.uniform(0.0, options.threshold)
        serve = _browned(model, student.weights, student.groups, theta, rng.choice(_COMPOSITIONS), generator)
        loss = _divergence(model, batch_of(windows), serve)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        advance(1)
        if step % max(1, options.steps // _CHECKS) == 0 or step == options.steps:
            for student in in_turn:
                student.look(model, measured, generator)
    return {way: student.result(model.dtype, options.steps) for way, student in students.items()}


class _Student:
    """The united experts of one way in training, and the state of them that was best on held-out text so far."""

    def __init__(self, united: UnitedExperts, device: torch.device) -> None:
        self._united = united
        self.weights = _trainable(united, device)
        self.groups = {i: layer.groups.to(device) for i, layer in united.layers.items()}
        self._best: _Weights = {}
        #: Divergence on held-out text in nats per token: before training, and of the best state.
        self._before: float | None = None
        self._lowest = float("inf")

    def look(self, model: MoeModel, held_out: Packed, generator: torch.Generator) -> None:
        """Measure the divergence at threshold 0 and keep the present state if it is the best one."""
        # As they will be stored: rounding counts.
        rounded = {i: tuple(w.detach().to(model.dtype).float() for w in pair) for i, pair in self.weights.items()}
        with torch.no_grad():
            serve = _browned(model, rounded, self.groups, 0.0, None, generator)
            found = float(_divergence(model, held_out, serve))
        if self._before is None:
            self._before = found
        if found < self._lowest:
            self._lowest, self._best = found, rounded

    def result(self, dtype: torch.dtype, steps: int) -> UnitedExperts:
        """The best state, its report with what these steps of training have brought."""
        layers = {
            i: UnitedLayer(layer.groups, *(w.to(dtype) for w in self._best[i]))
            for i, layer in self._united.layers.items()
        }
        note = {"steps": steps, "divergence_before": self._before, "divergence_after": self._lowest}
        return replace(self._united, layers=layers, report=self._united.report | {"end_to_end": note})


def _optimizer(
    students: Iterable[_Student], options: EndToEndOptions
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam with steps relative to the size of the weights; after a warm-up the rate falls along half a cosine."""
    parameters = [
        {"params": [w], "lr": options.rate * max(float(w.detach().square().mean().sqrt()), 1e-8)}
        for student in students
        for pair in student.weights.values()
        for w in pair
    ]

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / _WARMUP)
        return warm * 0.5 * (1.02 + torch.cos(torch.tensor(torch.pi * step / options.steps)).item())

    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.98))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def end_to_end_bytes(model: MoeModel, united_elements: int, options: EndToEndOptions) -> int:
    """Memory that `train_end_to_end` takes at most beside the model, in bytes, for so many elements of united weights."""
    config = model.config
    experts = (config.top_k * (3 * config.expert_size + 2 * config.hidden_size)) + 3 * config.shared_expert_size
    attention = 4 * config.num_heads * config.head_dim + 4 * config.hidden_size
    per_token = 4 * config.num_layers * (experts + attention + 6 * config.hidden_size) + 16 * config.vocab_size
    return 24 * united_elements + options.tokens * per_token


def _draw(windows: Sequence[Sequence[int]], tokens: int, rng: random.Random) -> list[Sequence[int]]:
    """Random windows of at least `tokens` tokens together, or all."""
    drawn, total = [], 0
    for i in rng.sample(range(len(windows)), len(windows)):
        drawn.append(windows[i])
        total += len(windows[i])
        if total >= tokens:
            break
    return drawn


def _trainable(experts: UnitedExperts, device: torch.device) -> _Weights:
    return {
        i: tuple(w.to(device, torch.float32, copy=True).requires_grad_() for w in (layer.w13, layer.w2))
        for i, layer in experts.layers.items()
    }  # type: ignore[return-value]


def _original(model: MoeModel) -> Serve:
    """The experts as the router chose them."""

    def serve(layer: int, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        store = model.moe_block(layer).experts
        return run_slots(x, experts, weights, lambda slot: (store.w13[slot], store.w2[slot]))

    return serve


def _browned(
    model: MoeModel,
    united: _Weights,
    groups: Mapping[int, Tensor],
    theta: float,
    composition: int | None,
    generator: torch.Generator,
) -> Serve:
    """The experts after brownout at one threshold, decided for `composition` tokens together."""
    count = model.config.num_experts
    thresholds = torch.tensor([theta], device=model.device)
    own = torch.arange(count, device=model.device)

    def serve(layer: int, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        store = model.moe_block(layer).experts
        order = torch.randperm(len(x), generator=generator).to(x.device)
        parts = []
        for rows in order.split(composition or len(x)):
            classes = torch.zeros(len(rows), dtype=torch.int8, device=x.device)
            parts.append(
                remap_experts(
                    experts[rows], weights[rows], own, thresholds, classes, united_slots=count + groups[layer]
                )
            )
        back = order.argsort()
        slots, merged = (torch.cat(tensors)[back] for tensors in zip(*parts, strict=True))
        w13, w2 = united[layer]

        def expert(slot: int) -> tuple[Tensor, Tensor]:
            return (store.w13[slot], store.w2[slot]) if slot < count else (w13[slot - count], w2[slot - count])

        return run_slots(x, slots, merged, expert)

    return serve


def _divergence(model: MoeModel, batch: Packed, serve: Serve) -> Tensor:
    """Mean KL divergence of the served model's next-token distribution from the full model's, in nats per token."""
    with torch.no_grad():
        wanted = head_logits(model, final_states(model, batch, _original(model))).log_softmax(-1)
    found = head_logits(model, final_states(model, batch, serve)).log_softmax(-1)
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean")
