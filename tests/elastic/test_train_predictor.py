"""The command that records and trains, and the simulation of what it recorded."""

import json

import pytest

from backend.elastic import simulate, train_predictor
from backend.elastic.predictor import LoadPredictor
from backend.elastic.recording import Recording


def test_a_checkpoint_is_recorded_trained_on_and_simulated(tmp_path):
    recording, predictor, report = tmp_path / "r.safetensors", tmp_path / "p.safetensors", tmp_path / "report.json"
    arguments = ["--checkpoint", "dummy:tiny", "--recording", str(recording), "--output", str(predictor)]
    assert (
        train_predictor.main(
            [*arguments, "--new-tokens", "2", "--repeats", "1", "--steps", "50", "--json", str(report)]
        )
        == 0
    )
    rows = json.loads(report.read_text())["held_out"]
    # Two layers with experts: one can be predicted, from the one before it.
    assert [(row["layer"], row["distance"]) for row in rows] == [(1, 1)]
    assert 0 < rows[0]["recall"] <= 1 and set(rows[0]["load_error"]) == {"predictor", "router", "last_window", "ewma"}
    assert LoadPredictor.read(predictor).fingerprint == Recording.read(recording).fingerprint == "dummy:tiny"

    figures = tmp_path / "figures.json"
    small = (
        "--shape tiny --seconds 0.1 --rate 40 --input-tokens 20 --output-tokens 4 --devices 2 --no-ablations".split()
    )
    files = ["--recording", str(recording), "--predictor", str(predictor), "--json", str(figures)]
    assert simulate.main([*small, "--policies", "eplb,moeless", *files]) == 0
    workload = json.loads(figures.read_text())["workload"]
    assert workload["routing"].startswith("recorded") and workload["layers_simulated"] == 2
    assert workload["predictor_recall_by_layer"][0] is None and workload["predictor_recall_by_layer"][1] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "x", "--distances", "0"], "at least 1"),
        (["--checkpoint", "dummy:tiny"], "--output is needed"),
    ],
)
def test_wrong_usage_is_told_apart(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_predictor.main(arguments)
    assert message in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there_is_named(tmp_path, capsys):
    assert train_predictor.main(["--checkpoint", str(tmp_path / "absent")]) == 1
    assert "is not a folder" in " ".join(capsys.readouterr().out.split())
