"""The chat format: special tokens, the Jinja template that the checkpoint ships, and the same in plain Python.

<|user|> How many: a b c<|assistant|> 3<|end|>
"""

from __future__ import annotations

from collections.abc import Iterable

END_OF_TEXT = "<|endoftext|>"
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
#: In the order of their ids, from 0.
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT, END)

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|> ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|> ' + message['content'] + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def chat_text(turns: Iterable[tuple[str, str]]) -> str:
    """(role, words) turns as the template writes them."""
    return "".join(f"{USER} {words}" if role == "user" else f"{ASSISTANT} {words}{END}" for role, words in turns)


def prompt_text(question: str) -> str:
    """A question as a prompt that asks for the answer."""
    return f"{USER} {question}{ASSISTANT}"


def answer_text(answer: str) -> str:
    """What the model is to write after `prompt_text`."""
    return f" {answer}{END}"
