"""The demo's questions: some answers shown as they stream, all asked at once over every interface, and prompts for loads."""

from __future__ import annotations

import asyncio
import random

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from backend.demo.families import FAMILIES, sample
from backend.demo.prompts import DemoPrompt
from backend.demo.tasks import FORMS, in_form, is_right
from backend.demo.template import answer_text, prompt_text
from backend.tokenizer import Tokenizer
from loadtest.clients import INTERFACES, Clients
from loadtest.record import RequestRecord, summarize

_SAMPLING = {"max_tokens": 64, "temperature": 0.0}


class ConversationPrompts:
    """Prompts of a load: conversations about questions of mixed families, at most `input_tokens` long if that is possible."""

    def __init__(self, seed: int, tokenizer: Tokenizer) -> None:
        self._seed = seed
        self._tokenizer = tokenizer

    def text(self, number: int, input_tokens: int) -> str:
        rng = random.Random(f"conversation {self._seed} {number}")
        question, _ = self._question(rng)
        text = prompt_text(question)
        while True:
            earlier, answer = self._question(rng)
            longer = prompt_text(earlier) + answer_text(answer) + text
            if len(self._tokenizer.encode(longer)) > input_tokens:
                return text
            text = longer

    def _question(self, rng: random.Random) -> tuple[str, str]:
        return in_form(sample(rng.choice(list(FAMILIES)), rng), rng.choice(FORMS), rng)


async def show_some(clients: Clients, prompts: list[DemoPrompt], console: Console) -> list[RequestRecord]:
    """Ask one after another and print each answer as it streams."""

    def show(piece: str) -> None:
        console.print(piece, end="", style="bold", markup=False, highlight=False, soft_wrap=True)

    records = []
    for number, prompt in enumerate(prompts):
        console.print(prompt.question.replace("\n", "  "), end=" →", markup=False, highlight=False, soft_wrap=True)
        records.append(await clients.http_stream(number, prompt.text, _SAMPLING, on_text=show))
        console.print()
    return records


async def ask_all(clients: Clients, prompts: list[DemoPrompt], console: Console) -> list[RequestRecord]:
    """Ask everything at once, spread over the interfaces."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("questions", total=len(prompts))

        async def ask(number: int, prompt: DemoPrompt) -> RequestRecord:
            interface = getattr(clients, INTERFACES[number % len(INTERFACES)])
            record = await interface(number, prompt.text, _SAMPLING)
            progress.advance(task)
            return record

        return await asyncio.gather(*(ask(number, prompt) for number, prompt in enumerate(prompts)))


def examples(prompts: list[DemoPrompt], each: int = 2) -> list[DemoPrompt]:
    """The first few prompts of every form: free answers, letters, questions in chat."""
    asked = [p for p in prompts if p.form != "chat" or p.question.endswith("?")]
    return [p for form in ("free", "letter", "chat") for p in [q for q in asked if q.form == form][:each]]


def right_answers(prompts: list[DemoPrompt], records: list[RequestRecord]) -> tuple[int, int]:
    """(right answers, prompts that have one right answer)."""
    checked = [(p, r) for p, r in zip(prompts, records, strict=True) if p.answer is not None]
    return sum(is_right(p.form, r.text, p.answer) for p, r in checked if p.answer is not None), len(checked)


def table_of(records: list[RequestRecord]) -> Table:
    """One row per interface and one for all. One-response interfaces have no first token of their own."""
    table = Table(
        title=f"{len(records)} questions at once through Triton Inference Server (ms, p50 / p99)", box=box.SIMPLE_HEAD
    )
    table.add_column("interface", no_wrap=True)
    for column in ("ok", "failed", "first", "per token", "latency", "tok/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in (*INTERFACES, "all"):
        rows = [record for record in records if name in (record.protocol, "all")]
        s = summarize(rows)
        stream = summarize([record for record in rows if record.protocol.endswith("stream")])
        table.add_row(
            name,
            str(s.completed),
            str(s.rejected + s.failed),
            _pair(stream.ttft_p50_s, stream.ttft_p99_s),
            _pair(stream.itl_p50_s, stream.itl_p99_s),
            _pair(s.latency_p50_s, s.latency_p99_s),
            f"{s.output_tokens_per_s:.0f}",
            end_section=name == INTERFACES[-1],
        )
    return table


def _pair(p50_s: float, p99_s: float) -> str:
    """Two times in ms; a dash where there is none."""
    return "–" if p50_s != p50_s else f"{p50_s * 1e3:.0f} / {p99_s * 1e3:.0f}"
