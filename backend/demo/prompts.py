"""The demo's prompts: held-out questions of every family in both forms, and chat written for it.

python -m backend.demo.prompts [--output FILE] [--seed N]

The file that ships was written by this command; `demo_prompts()` reads it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from backend.demo.families import FAMILIES, sample
from backend.demo.tasks import FORMS, in_form
from backend.demo.template import prompt_text

PROMPTS_FILE = Path(__file__).with_name("prompts.jsonl")
CHAT = (
    "Hello",
    "Hi there",
    "Good morning",
    "Who are you?",
    "What can you do?",
    "How are you?",
    "What is an expert?",
    "What is a brownout?",
    "Do you make mistakes?",
    "What should I ask you?",
    "I would like a large latte with milk, please.",
    "Can I get a small coffee to go?",
    "I want a mocha for my friend.",
    "Please order me a green tea.",
    "Do you have iced coffee today?",
    "I would like to order a cappuccino and a muffin.",
    "What do you like to do in the evening?",
    "Do you have any pets?",
    "I love to read books. What about you?",
    "I went to the park with my dog today.",
    "What is your favorite color?",
    "I am a teacher. What do you do for a living?",
    "Do you like music?",
    "I live in a small town by the sea.",
    "What did you have for breakfast?",
    "I like to cook for my family.",
    "Do you play any sports?",
    "Tell me about your day.",
    "Thank you!",
    "Goodbye",
)


@dataclass(frozen=True)
class DemoPrompt:
    """A question and, where there is one right answer, that answer."""

    family: str
    form: str
    question: str
    answer: str | None

    @property
    def text(self) -> str:
        """The prompt in the checkpoint's chat format."""
        return prompt_text(self.question)


def make_prompts(seed: int = 0) -> list[DemoPrompt]:
    """One held-out question of every family and form, and the chat, in a mixed but fixed order."""
    rng = random.Random(f"prompts {seed}")
    prompts = [DemoPrompt("chat", "chat", question, None) for question in CHAT]
    for family in FAMILIES:
        for form in FORMS:
            question, answer = in_form(sample(family, rng, held_out=True), form, rng)
            prompts.append(DemoPrompt(family, form, question, answer))
    rng.shuffle(prompts)
    return prompts


def demo_prompts() -> list[DemoPrompt]:
    """The prompts that ship with the product."""
    return [DemoPrompt(**json.loads(line)) for line in PROMPTS_FILE.read_text("utf-8").splitlines()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="backend.demo.prompts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=PROMPTS_FILE, help="file to write (default: the one that ships)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions (default 0)")
    args = parser.parse_args(argv)
    prompts = make_prompts(args.seed)
    lines = (json.dumps(asdict(prompt), ensure_ascii=False) for prompt in prompts)
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    Console().print(f"Wrote {len(prompts)} prompts into {args.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
