"""United experts files: what is written is read back, and what is wrong is named."""

import pytest
import torch
from safetensors.torch import save_file

from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.brownout.united_file import UnitedExperts, UnitedLayer, read_united, write_united
from backend.errors import ConfigError


def _united(way=2):
    groups = torch.tensor([0, 1, 0, 1, 2])
    layers = {
        layer: UnitedLayer(groups.clone(), torch.randn(3, 8, 6), torch.randn(3, 6, 4).bfloat16()) for layer in (0, 2)
    }
    return UnitedExperts(way, "f" * 32, "output", layers, {"0": {"relative_error": 0.1}})


def test_what_is_written_is_read_back(tmp_path):
    path, united = tmp_path / "sub" / "united-2.safetensors", _united()
    write_united(path, united)
    found = read_united(path, "f" * 32)
    assert (found.way, found.grouping, found.report) == (2, "output", united.report)
    assert sorted(found.layers) == [0, 2]
    for layer, expected in united.layers.items():
        for name in ("groups", "w13", "w2"):
            assert torch.equal(getattr(found.layers[layer], name), getattr(expected, name))
            assert getattr(found.layers[layer], name).dtype == getattr(expected, name).dtype


def test_a_file_of_another_checkpoint_is_refused(tmp_path):
    write_united(tmp_path / "u.safetensors", _united())
    with pytest.raises(ConfigError, match="built for another checkpoint"):
        read_united(tmp_path / "u.safetensors", "0" * 32)


def test_a_missing_a_truncated_and_a_foreign_file_are_named(tmp_path):
    path = tmp_path / "u.safetensors"
    with pytest.raises(ConfigError, match=r"u\.safetensors is missing"):
        read_united(path)
    write_united(path, _united())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="truncated"):
        read_united(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match="not a united experts file"):
        read_united(path)


def test_groups_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "u.safetensors"
    united = _united()
    united.layers[2].groups[0] = 3
    write_united(path, united)
    with pytest.raises(ConfigError, match="layer 2 has groups outside 0 to 2"):
        read_united(path)
    united.layers[2].groups[:] = 0
    write_united(path, united)
    with pytest.raises(ConfigError, match="layer 2 has a group of more than 2 experts"):
        read_united(path)


def test_the_fingerprint_depends_on_weights_and_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no model"):
        checkpoint_fingerprint(tmp_path)
    save_file({"x": torch.zeros(4)}, tmp_path / "model.safetensors")
    first = checkpoint_fingerprint(tmp_path)
    assert checkpoint_fingerprint(tmp_path) == first
    save_file({"x": torch.ones(4)}, tmp_path / "model.safetensors")
    second = checkpoint_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert len({first, second, checkpoint_fingerprint(tmp_path)}) == 3
