"""Benchmarks of the engine and the server; each prints a table and, with --json, writes its figures."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from backend.errors import ConfigError
from loadtest.bench import control, engine, everything, kernels, resident, scheduler, server, tune

COMMANDS = {
    "kernels": kernels,
    "scheduler": scheduler,
    "engine": engine,
    "resident": resident,
    "server": server,
    "control": control,
    "tune": tune,
    "all": everything,
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="loadtest.bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_options(commands.add_parser(name, help=module.HELP, description=module.__doc__))
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    console = Console()
    try:
        return COMMANDS[args.command].main(args, console)
    except (ConfigError, ValueError) as error:
        console.print(str(error), style="red", markup=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())
