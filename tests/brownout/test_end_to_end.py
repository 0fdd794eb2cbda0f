"""Training all layers together brings the browned-out model closer to the full one and touches nothing else."""

from __future__ import annotations

import pytest
import torch

from backend.brownout.builder import BuildOptions, build_united
from backend.brownout.calibration_text import read_calibration
from backend.brownout.differentiable import final_states, pack
from backend.brownout.distill import DistillOptions
from backend.brownout.end_to_end import EndToEndOptions, _browned, _original, train_end_to_end
from backend.models import load_model


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(str(checkpoint), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def windows(calibration):
    return read_calibration([calibration], None, 199, 1500, 32, 0)


def test_it_comes_closer_to_the_full_model_the_same_way_each_time(model, windows, tmp_path):
    averaged = build_united(
        model, "f", windows, BuildOptions((4, 8), "index", 0, DistillOptions(steps=0)), tmp_path
    ).united
    before = {name: tensor.clone() for name, tensor in model.weights()}
    options = EndToEndOptions(steps=24, tokens=300, rate=0.05)
    first, second = (train_end_to_end(model, averaged, windows[5:], windows[:5], options) for _ in range(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.weights())
    for way, united in first.items():
        report = united.report["end_to_end"]
        assert report["divergence_after"] < 0.97 * report["divergence_before"]
        assert torch.equal(united.layers[1].w2, second[way].layers[1].w2)
        assert torch.equal(united.layers[1].groups, averaged[way].layers[1].groups)


def test_at_threshold_one_the_originals_serve(model, windows):
    batch = pack(windows[:3], 32, model.device)
    nothing = dict.fromkeys(range(3), (None, None))
    groups = {i: torch.arange(8) // 4 for i in range(3)}
    with torch.no_grad():
        full = final_states(model, batch, _original(model))
        served = final_states(model, batch, _browned(model, nothing, groups, 1.0, 8, torch.Generator()))
    assert torch.equal(full, served)
