"""Chat with the running server: answers stream from generate_stream in the checkpoint's own chat format.

python -m loadtest.chat [--http HOST:PORT] [--checkpoint DIR] [--once QUESTION]

Start the server first (`make serve`), with the same checkpoint. Blank lines are skipped; the end of input
(Ctrl-D) ends the chat.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from backend.config import DEMO_CHECKPOINT
from backend.errors import ConfigError, InvalidRequestError
from backend.tokenizer import Tokenizer, load_tokenizer
from loadtest.clients import Clients
from loadtest.record import RequestRecord

_PROMPT = "you> "


class Chat:
    """A conversation: what was said, and asking the server for the next answer."""

    def __init__(self, clients: Clients, tokenizer: Tokenizer, sampling: Mapping[str, object], history: bool) -> None:
        """`history`: send the whole conversation with every question, not the question alone."""
        self._clients, self._tokenizer, self._sampling, self._history = clients, tokenizer, dict(sampling), history
        self._messages: list[dict[str, str]] = []
        self._number = 0

    async def ask(self, question: str, console: Console) -> RequestRecord:
        """Stream the answer to the console; a failed request is not kept in the conversation."""
        asked = {"role": "user", "content": question}
        prompt = self._tokenizer.apply_chat_template([*self._messages, asked])
        self._number += 1

        def show(piece: str) -> None:
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)

        record = await self._clients.http_stream(self._number, prompt, self._sampling, on_text=show)
        console.print()
        if record.outcome == "completed" and self._history:
            self._messages += [asked, {"role": "assistant", "content": record.text.strip()}]
        return record


async def converse(args: argparse.Namespace, tokenizer: Tokenizer, console: Console) -> int:
    """Ask `--once`'s question, or one question per line of input, until the input ends."""
    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    async with Clients(args.http, args.http) as clients:
        chat = Chat(clients, tokenizer, sampling, args.history)
        while True:
            question = args.once if args.once is not None else await _read_line(console)
            if question is None:
                return 0
            record = await chat.ask(question, console)
            if record.outcome != "completed":
                console.print(f"[red]{record.outcome}:[/red] {record.error}")
                return 1
            if args.once is not None:
                return 0


async def _read_line(console: Console) -> str | None:
    """The next line that is not blank; None at the end of the input."""
    try:
        while True:
            line = await asyncio.to_thread(console.input, _PROMPT if sys.stdin.isatty() else "")
            if line.strip():
                return line.strip()
    except EOFError:
        return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="loadtest.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--http", default="127.0.0.1:8000", help="the server's HTTP address (default %(default)s)")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=DEMO_CHECKPOINT,
        help="folder whose chat template to use: the server's checkpoint",
    )
    parser.add_argument("--once", metavar="QUESTION", help="ask this one question and end")
    parser.add_argument("--max-tokens", type=int, default=96, help="longest answer in tokens (default 96)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token (default 0)")
    parser.add_argument("--history", action="store_true", help="send the whole conversation with every question")
    args = parser.parse_args(argv)
    if args.max_tokens < 1:
        parser.error(f"--max-tokens must be at least 1, got {args.max_tokens}")
    console = Console()
    try:
        tokenizer = load_tokenizer(str(args.checkpoint), None)
        return asyncio.run(converse(args, tokenizer, console))
    except (ConfigError, InvalidRequestError) as error:
        console.print(f"[red]No chat:[/red] {error}")
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
