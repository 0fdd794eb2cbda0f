"""The step model's file and its command."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.brownout.step_model import StepModel
from backend.errors import ConfigError
from controller import stepmodel
from tests.controller.readings import measured_steps


def test_a_saved_model_is_shown_with_its_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = StepModel()
    model.learn(measured_steps())
    file = tmp_path / "model.json"
    stepmodel.save(model, file)
    assert stepmodel.load(file).weights == pytest.approx(model.weights)
    assert stepmodel.main([str(file)]) == 0
    shown = capsys.readouterr().out
    assert "fitted to 300 steps" in shown
    assert f"{100 * model.error:.1f} %" in shown


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "not a step model"),
        ('{"format": "step-model-1"}', "num_samples"),
        ('{"format": "other"}', "its format is 'other'"),
    ],
)
def test_a_wrong_file_is_a_named_error(
    tmp_path: Path, capsys: pytest.CaptureFixture, contents: str | None, complaint: str
) -> None:
    file = tmp_path / "model.json"
    if contents is not None:
        file.write_text(contents)
    with pytest.raises(ConfigError, match=complaint):
        stepmodel.load(file)
    assert stepmodel.main([str(file)]) == 1
    assert complaint in capsys.readouterr().err
