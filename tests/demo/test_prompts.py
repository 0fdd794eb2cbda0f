"""The shipped prompts and the chat command."""

import asyncio

import pytest
from rich.console import Console

from backend.demo.prompts import demo_prompts, main, make_prompts
from backend.demo.tasks import is_held_out
from backend.tokenizer import load_tokenizer
from loadtest import chat
from loadtest.record import RequestRecord


def test_there_are_at_least_100_different_prompts():
    assert len({prompt.text for prompt in demo_prompts()}) >= 100


def test_the_shipped_prompts_are_what_the_command_writes(tmp_path):
    assert main(["--output", str(tmp_path / "prompts.jsonl")]) == 0
    assert demo_prompts() == make_prompts()


def test_questions_among_the_prompts_are_held_out():
    questions = [prompt for prompt in demo_prompts() if prompt.form == "free"]
    assert questions
    assert all(is_held_out(prompt.family, prompt.question) for prompt in questions)


class _Clients:
    """Answers every prompt with its own number of messages."""

    def __init__(self, outcome: str = "completed") -> None:
        self.prompts: list[str] = []
        self.outcome = outcome

    async def http_stream(self, number, prompt, sampling, on_text):
        self.prompts.append(prompt)
        on_text(" yes")
        return RequestRecord(
            id=number, protocol="http_stream", intended_start_s=0.0, start_s=0.0, text=" yes", outcome=self.outcome
        )


@pytest.mark.parametrize(
    ("history", "second"),
    [(False, "<|user|> again<|assistant|>"), (True, "<|user|> Hi<|assistant|> yes<|end|><|user|> again<|assistant|>")],
)
def test_chat_asks_in_the_checkpoints_format(data, history, second):
    clients = _Clients()
    talk = chat.Chat(clients, load_tokenizer(str(data), None), {}, history)
    console = Console(quiet=True)
    for question in ("Hi", "again"):
        asyncio.run(talk.ask(question, console))
    assert clients.prompts == ["<|user|> Hi<|assistant|>", second]


def test_chat_forgets_what_failed(data):
    clients = _Clients(outcome="failed")
    talk = chat.Chat(clients, load_tokenizer(str(data), None), {}, history=True)
    for _ in range(2):
        asyncio.run(talk.ask("Hi", Console(quiet=True)))
    assert clients.prompts == ["<|user|> Hi<|assistant|>"] * 2


def test_chat_without_a_checkpoint_says_so(tmp_path, capsys):
    assert chat.main(["--checkpoint", str(tmp_path / "none"), "--once", "Hi"]) == 1
    assert "No chat" in capsys.readouterr().out


def test_chat_without_a_server_fails_with_a_reason(data, capsys):
    assert chat.main(["--checkpoint", str(data), "--once", "Hi", "--http", "127.0.0.1:9"]) == 1
    assert "failed" in capsys.readouterr().out
