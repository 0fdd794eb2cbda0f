"""The fitted step model on disk: `python -m controller.stepmodel FILE` shows what it says and how good it is."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from backend.brownout.step_model import DECODE_UNIT, PREFILL_UNIT, StepModel
from backend.errors import ConfigError
from backend.serving.protocol import replace_file

_FORMAT = "step-model-1"


def save(model: StepModel, path: Path) -> None:
    """Write the model; a reader sees the old file or the new one."""
    document = {
        "format": _FORMAT,
        "units": {"weights": "seconds", "prefill_tokens": PREFILL_UNIT, "decode_tokens": DECODE_UNIT},
        "usable_weights": model.weights,
        **model.state(),
    }
    replace_file(path, (json.dumps(document, indent=1) + "\n").encode())


def load(path: Path) -> StepModel:
    """Read a model that `save` wrote. Raises ConfigError, saying what is wrong with the file."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the step model {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"the step model {path} is not JSON: {error}") from None
    try:
        if document["format"] != _FORMAT:
            raise ValueError(f"its format is {document['format']!r}, not {_FORMAT!r}")
        return StepModel.from_state(document)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a step model: {type(error).__name__} {error}") from None


def describe(model: StepModel) -> str:
    """A few lines for people: weights, error, and step times of typical steps at three thresholds."""
    error = "unknown yet" if model.error is None else f"{100 * model.error:.1f} % (mean absolute, of the last steps)"
    lines = [f"fitted to {model.num_samples} steps, prediction error {error}"]
    units = {
        "step": "a step",
        "prefill": f"{PREFILL_UNIT:g} prefill tokens",
        "decode": f"{DECODE_UNIT:g} decode tokens",
    }
    weights = model.weights
    for name, unit in units.items():
        fixed, savable = 1e3 * weights[name], 1e3 * weights[f"{name}_theta"]
        lines.append(f"{unit:>20}: {fixed:8.3f} ms + {savable:8.3f} ms · threshold")
    lines.append(f"{'prefill':>10} {'decode':>7} tokens {'1.0':>9} {'0.5':>9} {'0.0':>9}  predicted ms by threshold")
    for prefill, decode in ((0, 1), (0, 8), (0, 32), (256, 0), (256, 32)):
        times = (1e3 * float(model.predict_s(prefill, decode, theta, theta)) for theta in (1.0, 0.5, 0.0))
        lines.append(f"{prefill:>10} {decode:>7} {'':6} " + " ".join(f"{ms:9.2f}" for ms in times))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m controller.stepmodel", description=__doc__)
    parser.add_argument("file", type=Path, help="as the controller writes it with --step-model FILE")
    args = parser.parse_args(argv)
    try:
        print(describe(load(args.file)))
    except ConfigError as error:
        print(f"stepmodel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
