"""One self-contained HTML page, and a PNG per chart, of one or more load runs.

python -m loadtest.report off=results/off.jsonl on=results/on.jsonl --output results/report
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from backend.errors import ConfigError
from loadtest.report.page import write_report
from loadtest.report.run_data import load_run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="loadtest.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="records file of a run (its summary beside it), or a folder with one run; the first is compared with",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results/report"), help="folder to write (default %(default)s)"
    )
    parser.add_argument(
        "--profile",
        type=Path,
        help="brownout-profile.json of the served checkpoint: what dimming cost in quality (default: that in a run's folder)",
    )
    parser.add_argument("--title", default="Serving through a burst", help="heading of the page")
    args = parser.parse_args(argv)
    try:
        runs = [load_run(text, args.profile) for text in args.runs]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    path = write_report(runs, args.output, title=args.title)
    print(f"Wrote {path} and {len(list(args.output.glob('*.png')))} pictures in {args.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
