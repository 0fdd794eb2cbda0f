"""The training loop's state: model, optimizers, family mix and clock, all saved and restored together."""

from __future__ import annotations

import json
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

from backend.demo.batches import DRILL, FAMILY_NAMES, BatchMaker, family_mix
from backend.demo.model import DemoModel, Shape
from backend.demo.optimizer import make_optimizers
from backend.demo.upcycle import upcycle

_LOG_EVERY = 20
_FEWER_EXPERTS = 2


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn. Learning rates are relative to `muon_lr` and `adam_lr`."""

    steps: int
    minutes: float | None = None
    warmup: int = 100
    decay_start: float = 0.0
    decay_end: float = 0.02
    muon_lr: float = 0.01
    adam_lr: float = 0.003
    #: Muon's learning rate of routed experts, relative to other matrices'.
    expert_lr_scale: float = 1.0
    balance: float = 0.01
    #: Share of steps in which tokens get two experts, so that the model bears to have fewer.
    fewer_share: float = 0.0

    def progress(self, step: int, seconds: float) -> float:
        """How far the run is, from 0 to 1."""
        by_time = seconds / 60 / self.minutes if self.minutes else 0.0
        return min(1.0, max(step / self.steps, by_time))

    def rate(self, step: int, progress: float) -> float:
        """Relative learning rate: up over `warmup` steps, level, then down in a straight line to `decay_end`."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        if progress <= self.decay_start:
            return rise
        fallen = (progress - self.decay_start) / (1 - self.decay_start)
        return rise * (1 - fallen * (1 - self.decay_end))


class Trainer:
    """One phase of training in a run folder."""

    def __init__(
        self,
        shape: Shape,
        schedule: Schedule,
        maker: BatchMaker,
        run: Path,
        device: str,
        seed: int,
        compiled: bool = True,
        low_precision: bool = False,
    ) -> None:
        self.shape, self.schedule, self.maker, self.run, self.seed = shape, schedule, maker, run, seed
        self.device, self.compiled, self.low_precision = torch.device(device), compiled, low_precision
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.losses: dict[str, float] = {}
        self._recent: list[dict[str, float]] = []
        run.mkdir(parents=True, exist_ok=True)

    @property
    def can_continue(self) -> bool:
        return (self.run / "state.pt").is_file()

    @property
    def progress(self) -> float:
        return self.schedule.progress(self.step, self.seconds)

    @property
    def finished(self) -> bool:
        return self.progress >= 1.0

    def start_dense(self) -> None:
        """Fresh weights."""
        torch.manual_seed(self.seed)
        self._set_model(DemoModel(self.shape, moe=False))

    def start_experts(self, dense: Path, noise: float) -> None:
        """Experts made of a dense run's FFNs."""
        state = torch.load(dense / "state.pt", weights_only=True)
        model = DemoModel(Shape(**state["shape"]), moe=False)
        model.load_state_dict(state["model"])
        self.losses = dict(state["losses"])
        self._set_model(upcycle(model, self.shape, noise, self.seed))

    def restore(self) -> None:
        """Go on from state.pt."""
        state = torch.load(self.run / "state.pt", weights_only=True)
        self.shape = Shape(**state["shape"])
        model = DemoModel(self.shape, state["moe"])
        model.load_state_dict(state["model"])
        self._set_model(model)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]
        self.losses = dict(state["losses"])
        self._cut_log()

    def _cut_log(self) -> None:
        """Remove what the log says of steps after the saved one: they are done again."""
        log = self.run / "log.jsonl"
        if log.is_file():
            lines = log.read_text().splitlines()
            log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= self.step))

    def save(self) -> None:
        """Write state.pt, whole or not at all."""
        state = {
            "shape": self.shape.as_dict(), "moe": self.model.moe, "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step, "seconds": self.seconds, "tokens": self.tokens, "losses": self.losses,
        }  # fmt: skip
        torch.save(state, self.run / "state.pt.new")
        (self.run / "state.pt.new").replace(self.run / "state.pt")

    def train_step(self) -> dict[str, float]:
        """One batch; returns the losses, which log.jsonl gets every few steps as means."""
        with torch.compiler.set_stance("default" if self.compiled else "force_eager"):
            return self._train_step()

    def _train_step(self) -> dict[str, float]:
        started = time.monotonic()
        rate = self.schedule.rate(self.step, self.progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * rate
        batch = self.maker.make(self.step, family_mix(self.losses))
        text, questions, documents, positions, targets, weights, families = (
            torch.from_numpy(array).to(self.device) for array in astuple(batch)
        )
        blocks = [(text, None)] if len(text) else []
        ids, numbers = zip(*blocks, (questions, documents), strict=True)
        fewer = torch.rand((), generator=torch.Generator().manual_seed(self.seed * 7_919 + self.step)).item()
        top_k = _FEWER_EXPERTS if fewer < self.schedule.fewer_share else self.shape.top_k
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
            states, balance = self.model(ids, numbers, top_k)
            each = self.model.losses(states[positions], targets)
        loss = (each * weights).sum() / weights.sum()
        (loss + self.schedule.balance * balance).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += text.numel() + questions.numel()
        record = self._note(each.detach(), families, float(loss.detach()), float(balance.detach()))
        self.seconds += time.monotonic() - started
        self._log(record, rate)
        return record

    def _set_model(self, model: DemoModel) -> None:
        self.model = model.to(self.device)
        schedule = self.schedule
        self.optimizers = make_optimizers(self.model, schedule.muon_lr, schedule.adam_lr, schedule.expert_lr_scale)
        if self.compiled:
            self.model.compile()

    def _note(self, each: Tensor, families: Tensor, loss: float, balance: float) -> dict[str, float]:
        """Update the families' running losses, which choose the next mix."""
        size = DRILL + 2
        sums = torch.bincount(families + 1, weights=each.double(), minlength=size).tolist()
        counts = torch.bincount(families + 1, minlength=size).tolist()
        for name, total, count in zip(FAMILY_NAMES, sums[1:-1], counts[1:-1], strict=True):
            if count:
                mean = total / count
                self.losses[name] = 0.95 * self.losses.get(name, mean) + 0.05 * mean
        return {
            "loss": loss,
            "balance": balance,
            "text": sums[0] / max(1, counts[0]),
            "answers": sum(sums[1:-1]) / max(1, sum(counts[1:-1])),
            "drill": sums[-1] / max(1, counts[-1]),
        }

    def _log(self, record: dict[str, float], rate: float) -> None:
        self._recent.append(record)
        if self.step % _LOG_EVERY and not self.finished:
            return
        means = {key: round(sum(entry[key] for entry in self._recent) / len(self._recent), 4) for key in record}
        self._recent.clear()
        line = {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "tokens": self.tokens,
            "rate": round(rate, 4),
            **means,
        }
        line["families"] = {name: round(loss, 3) for name, loss in self.losses.items()}
        with (self.run / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
