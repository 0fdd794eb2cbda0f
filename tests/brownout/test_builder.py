"""The builder: planted groups are found, training helps, and a build goes on where it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.brownout import builder
from backend.brownout.activations import layer_activations
from backend.brownout.alignment import mean_expert
from backend.brownout.build import main
from backend.brownout.builder import BuildOptions, build_united, check_input, check_memory, needed_bytes
from backend.brownout.calibration_text import read_calibration
from backend.brownout.distill import DistillOptions, make_pairs
from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.brownout.grouping import expert_output
from backend.brownout.settings import Settings
from backend.brownout.united_file import read_united
from backend.config import EngineConfig
from backend.engine.engine import Engine
from backend.engine.scoring import Scorer
from backend.errors import ConfigError
from backend.models import load_model
from tests.models.harness import Runner

CPU = torch.device("cpu")
QUICK = BuildOptions((4,), "index", 0, DistillOptions(steps=60, rows=64))


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(str(checkpoint), device=CPU)


@pytest.fixture(scope="module")
def windows(calibration):
    return read_calibration([calibration], None, 199, 2000, 64, 0)


def _same(a, b) -> bool:
    return all(
        torch.equal(getattr(a.layers[i], name), getattr(b.layers[i], name))
        for i in a.layers
        for name in ("groups", "w13", "w2")
    )


def _planted(checkpoint, folder):
    """A copy of the checkpoint whose expert e + 4 is expert e with its neurons in another order."""
    tensors = load_file(checkpoint / "model.safetensors")
    order = torch.randperm(20)
    for name in [name for name in tensors if ".experts." in name]:
        prefix, _, rest = name.partition(".experts.")
        expert, _, kind = rest.partition(".")
        if int(expert) >= 4:
            twin = tensors[f"{prefix}.experts.{int(expert) - 4}.{kind}"]
            tensors[name] = (twin[:, order] if kind.startswith("down") else twin[order]).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())


def _scores(folder, united: str):
    """Log-probabilities of some tokens with every expert replaced that can be, and the active slots of each layer."""
    engine = Engine(EngineConfig(str(folder), united=united, max_model_len=128, kv_cache_blocks=40))
    if united != "none":
        engine.set_settings(Settings(threshold_prefill=0.0, threshold_decode=0.0))
    texts = torch.randint(199, (4, 120), generator=torch.Generator().manual_seed(0)).tolist()
    scored = Scorer(engine, 4).score([(ids, 1) for ids in texts])
    return torch.cat([torch.as_tensor(found.logprobs) for found in scored]), engine.runner.model.slot_usage()[0]


def test_groups_of_equal_experts_are_found_and_cost_nothing(checkpoint, calibration, tmp_path, capsys):
    planted = tmp_path / "planted"
    _planted(checkpoint, planted)
    arguments = [str(planted), "--way", "2", "--calibration", str(calibration), "--window", "64", "--tokens", "1500"]
    for group in ("output", "index"):
        output = str(tmp_path / group)
        assert main([*arguments, "--steps", "10", "--group", group, "--output", output]) == 0, capsys.readouterr().out
    united = read_united(tmp_path / "output/united-2.safetensors", checkpoint_fingerprint(planted))
    assert [int(i) for i in united.report] == [0, 1, 2]
    for layer in united.layers.values():
        assert torch.equal(layer.groups[:4], layer.groups[4:])
    assert all(report["relative_error"] < 1e-3 for report in united.report.values())
    assert not (tmp_path / "output/united-work").exists()
    # Neighbours by number are strangers: with as many slots they lose what the twins keep.
    full, _ = _scores(planted, "none")
    twins, slots = _scores(planted, str(tmp_path / "output/united-2.safetensors"))
    strangers, same_slots = _scores(planted, str(tmp_path / "index/united-2.safetensors"))
    assert list(slots) == list(same_slots) == [4, 4, 4]
    assert 10 * (twins - full).abs().max() < (strangers - full).abs().max()


def test_distilled_is_better_than_averaged_is_better_than_dropped(model, windows, tmp_path):
    for loss in ("chosen", "mean"):
        options = replace(QUICK, distill=replace(QUICK.distill, loss=loss))
        for report in build_united(model, "f", windows, options, tmp_path).united[4].report.values():
            assert report["relative_error"] <= report["averaged_error"] <= 1.0
            assert loss == "mean" or report["relative_error"] < 0.9 * report["averaged_error"]


def test_the_same_seed_gives_the_same_experts(model, windows, tmp_path):
    first, second = (build_united(model, "f", windows, QUICK, tmp_path / name).united[4] for name in "ab")
    other = build_united(model, "f", windows, replace(QUICK, seed=1), tmp_path).united[4]
    assert _same(first, second) and not _same(first, other)


def test_a_build_that_was_interrupted_goes_on_and_ends_the_same(model, windows, tmp_path, monkeypatch):
    whole = build_united(model, "f", windows, QUICK, tmp_path / "whole").united[4]
    original, calls = builder.united_layer, []

    def stopping(acts, *arguments):
        calls.append(acts.layer)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return original(acts, *arguments)

    monkeypatch.setattr(builder, "united_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_united(model, "f", windows, QUICK, tmp_path / "cut")
    assert _same(build_united(model, "f", windows, QUICK, tmp_path / "cut").united[4], whole)
    assert calls == [0, 1, 1, 2]


def test_activations_are_those_of_the_running_model(model, windows, monkeypatch):
    monkeypatch.setattr("backend.brownout.activations.BATCH_TOKENS", 100)
    seen = {}
    for i, layer in enumerate(model.layers):
        if layer.moe is not None:
            note = lambda residual, x, *rest, i=i, f=layer.moe.add_to: (  # noqa: E731
                seen.setdefault(i, x.clone()),
                f(residual, x, *rest),
            )[1]
            monkeypatch.setattr(layer.moe, "add_to", note)
    Runner(model).generate([windows[3]], 1)
    monkeypatch.undo()
    start = sum(map(len, windows[:3]))
    for acts in layer_activations(model, windows):
        torch.testing.assert_close(acts.inputs[start : start + len(windows[3])], seen[acts.layer], atol=1e-4, rtol=1e-4)
        assert acts.experts.shape == acts.weights.shape == (2000, 2)


def test_a_pair_asks_for_what_the_chosen_members_of_its_group_give(model, windows):
    acts = next(iter(layer_activations(model, windows)))
    moe, groups = model.layers[0].moe, torch.arange(8) // 4
    pairs = make_pairs(acts, torch.tensor([5, 9, 14]), groups, moe.experts.w13, moe.experts.w2)
    for token, group, scale, target in zip(pairs.token, pairs.group, pairs.scale, pairs.target, strict=True):
        mine = [(e, w) for e, w in zip(acts.experts[token], acts.weights[token], strict=True) if groups[e] == group]
        expected = sum(expert_output(acts.inputs[token], moe.experts.w13[e], moe.experts.w2[e]) * w for e, w in mine)
        torch.testing.assert_close(target, expected)
        torch.testing.assert_close(scale, sum(w for _, w in mine))
    assert len(pairs.token) == sum(len(set((acts.experts[t] // 4).tolist())) for t in (5, 9, 14))


def test_alignment_undoes_a_change_of_the_neurons_order():
    w13, w2, order = torch.randn(2 * 6, 5), torch.randn(5, 6), torch.randperm(6)
    turned = torch.cat([half[order] for half in w13.chunk(2)]), w2[:, order]
    pair, usage = (torch.stack([w13, turned[0]]), torch.stack([w2, turned[1]])), torch.tensor([3.0, 1.0])
    aligned = mean_expert(*pair, usage)
    torch.testing.assert_close(aligned[0], w13)
    torch.testing.assert_close(aligned[1], w2)
    assert not torch.allclose(mean_expert(*pair, usage, align=False)[1], w2)


def test_too_little_text_a_wrong_way_and_too_little_memory_are_named(model, windows):
    with pytest.raises(ConfigError, match="has 64 tokens in 1 windows, but a model with 8 experts needs at least 128"):
        check_input(model.config, windows[:1], QUICK)
    with pytest.raises(ConfigError, match=r"--way must be from 2 to the number of experts \(8\), got 9"):
        check_input(model.config, windows, replace(QUICK, ways=(9,)))
    with pytest.raises(ConfigError, match="lower --tokens"):
        check_memory(model, needed_bytes(model, 10**13, QUICK))


def test_the_command_says_what_is_wrong(checkpoint, calibration, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(checkpoint), "--calibration", str(calibration), "--way", "two"])
    assert stop.value.code == 2
    assert main([str(tmp_path), "--calibration", str(calibration)]) == 1
    assert "no model*.safetensors" in " ".join(capsys.readouterr().out.split())
