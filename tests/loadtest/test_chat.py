"""The chat: which lines are questions, and when it ends."""

from __future__ import annotations

import argparse
import asyncio
import io
from unittest.mock import Mock

import pytest
from rich.console import Console

from loadtest import chat


class FakeClients:
    """A server that is asked and answers nothing."""

    def __init__(self, *_addresses: str) -> None:
        self.prompts: list[str] = []
        FakeClients.last = self

    async def __aenter__(self) -> FakeClients:
        return self

    async def __aexit__(self, *_error: object) -> None:
        pass

    async def http_stream(self, _number: int, prompt: str, *_rest: object, **_named: object) -> Mock:
        self.prompts.append(prompt)
        return Mock(outcome="completed", text="")


def test_blank_lines_are_skipped_and_the_end_of_input_ends_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "Clients", FakeClients)
    monkeypatch.setattr("sys.stdin", io.StringIO("\nHow are you?\n  \n\nAnd now?"))
    tokenizer = Mock(apply_chat_template=lambda messages: messages[-1]["content"])
    args = argparse.Namespace(http="", once=None, max_tokens=4, temperature=0.0, history=True)
    assert asyncio.run(chat.converse(args, tokenizer, Console(file=io.StringIO()))) == 0
    assert FakeClients.last.prompts == ["How are you?", "And now?"]
