"""United experts and similarities beside a checkpoint: found, put into their slots, and refused by name if they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from backend.brownout.fingerprint import checkpoint_fingerprint
from backend.brownout.similarity_file import read_similarity, write_similarity
from backend.brownout.united_file import UnitedExperts, UnitedLayer, write_united
from backend.errors import ConfigError
from backend.models import MoeModel, load_model
from tests.models.tiny_checkpoints import make_checkpoint

EXPERTS, SIZE, HIDDEN = 7, 20, 48
LAYERS = (0, 1, 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path)
    return path


@pytest.fixture(autouse=True)
def nothing_left_over(checkpoint: Path):
    yield
    for path in [*checkpoint.glob("united*"), *checkpoint.glob("expert-similarity*")]:
        path.unlink()


def load(path: Path, **options: str) -> MoeModel:
    return load_model(str(path), device=torch.device("cpu"), **options)


def make_united(
    checkpoint: Path, way: int, *, layers=LAYERS, experts=EXPERTS, size=SIZE, spare=0, fingerprint=None
) -> UnitedExperts:
    groups = torch.arange(experts) // way
    count = int(groups.max()) + 1 + spare
    torch.manual_seed(way)
    made = {
        i: UnitedLayer(groups.clone(), torch.randn(count, 2 * size, HIDDEN), torch.randn(count, HIDDEN, size))
        for i in layers
    }
    return UnitedExperts(way, fingerprint or checkpoint_fingerprint(checkpoint), "index", made)


def assert_loaded(model: MoeModel, united: UnitedExperts) -> None:
    for i, layer in united.layers.items():
        w13, w2 = model.moe_block(i).united_weights(united.way)
        assert torch.equal(w13, layer.w13) and torch.equal(w2, layer.w2)


def test_files_in_the_folder_are_found_and_originals_stay(checkpoint: Path) -> None:
    plain = load(checkpoint)
    assert plain.ways == () and plain.united_bytes() == 0
    both = [make_united(checkpoint, way) for way in (4, 2)]
    for united in both:
        write_united(checkpoint / f"united-{united.way}.safetensors", united)
    model = load(checkpoint)
    assert model.ways == (2, 4)
    assert model.united_bytes() == 3 * (4 + 2) * 3 * SIZE * HIDDEN * 4
    for united in both:
        assert_loaded(model, united)
    for (name, original), (_, same) in zip(plain.weights(), model.weights(), strict=True):
        assert torch.equal(original, same), name
    assert model.moe_block(1).experts.w13.shape[0] == EXPERTS + 4 + 2
    assert load(checkpoint, united="none").ways == ()


def test_files_are_named_by_way_or_path(checkpoint: Path, tmp_path: Path) -> None:
    near, far = make_united(checkpoint, 2), make_united(checkpoint, 3)
    write_united(checkpoint / "united-2.safetensors", near)
    write_united(checkpoint / "united-4.safetensors", make_united(checkpoint, 4))
    write_united(tmp_path / "mine.safetensors", far)
    model = load(checkpoint, united=f"2, {tmp_path / 'mine.safetensors'}")
    assert model.ways == (2, 3)
    assert_loaded(model, near)
    assert_loaded(model, far)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"fingerprint": "0" * 32}, "built for another checkpoint"),
        ({"layers": (0, 2)}, "layer 1 is missing"),
        ({"layers": (0, 1, 2, 3)}, "layer 3 has no experts in this checkpoint"),
        ({"size": 24}, r"layer 0 has groups \[7\] and w13 \[4, 48, 48\], expected \[7\] and \[4, 40, 48\]"),
        ({"experts": 6}, r"groups \[6\] .* expected \[7\]"),
        ({"spare": 1}, r"w13 \[5, 40, 48\], expected \[7\] and \[4, 40, 48\]"),
    ],
)
def test_united_experts_that_do_not_fit_are_named(checkpoint: Path, parts: dict, message: str) -> None:
    write_united(checkpoint / "united-2.safetensors", make_united(checkpoint, 2, **parts))
    with pytest.raises(ConfigError, match=r"united-2\.safetensors") as error:
        load(checkpoint)
    assert error.match(message)


def test_missing_and_doubled_files_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"united-8\.safetensors is missing"):
        load(checkpoint, united="8")
    with pytest.raises(ConfigError, match="parameter united must be files separated by commas"):
        load(checkpoint, united="2,,4")
    write_united(checkpoint / "united-2.safetensors", make_united(checkpoint, 2))
    write_united(tmp_path / "again.safetensors", make_united(checkpoint, 2))
    with pytest.raises(ConfigError, match=r"again\.safetensors is 2-way as another one"):
        load(checkpoint, united=f"2,{tmp_path / 'again.safetensors'}")


def similarity(experts: int = EXPERTS, layers=LAYERS) -> dict[int, Tensor]:
    return {i: torch.rand(experts, experts) for i in layers}


def test_similarities_are_found_and_read_back(checkpoint: Path, tmp_path: Path) -> None:
    tables, mark = similarity(), checkpoint_fingerprint(checkpoint)
    assert load(checkpoint).moe_block(0).similarity is None
    path = checkpoint / "expert-similarity.safetensors"
    write_similarity(path, mark, tables)
    for i, table in read_similarity(path, mark).items():
        assert torch.equal(table, tables[i])
    assert torch.equal(load(checkpoint).moe_block(2).similarity, tables[2])
    assert load(checkpoint, similarity="none").moe_block(0).similarity is None
    path.rename(tmp_path / "s.safetensors")
    assert torch.equal(load(checkpoint, similarity=str(tmp_path / "s.safetensors")).moe_block(1).similarity, tables[1])


def test_similarities_that_do_not_fit_are_named(checkpoint: Path) -> None:
    path, mark = checkpoint / "expert-similarity.safetensors", checkpoint_fingerprint(checkpoint)

    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=r"similarity\.safetensors") as error:
            load(checkpoint)
        assert error.match(message)

    write_similarity(path, "0" * 32, similarity())
    refused("made for another checkpoint")
    write_similarity(path, mark, similarity(experts=8))
    refused("layer 0 has 8 experts, the checkpoint 7")
    write_similarity(path, mark, similarity(layers=(0, 1)))
    refused("layer 2 is missing")
    write_similarity(path, mark, {**similarity(), 1: torch.full((7, 7), float("nan"))})
    refused("layer 1 has entries that are not finite")
    write_similarity(path, mark, {**similarity(), 1: torch.rand(7, 6)})
    refused(r"expected float32 \[E, E\]")
    path.write_bytes(path.read_bytes()[:-9])
    refused("truncated")
    save_file({"x": torch.zeros(1)}, path)
    refused("not an expert similarity file")
    with pytest.raises(ConfigError, match=r"nowhere\.safetensors is missing"):
        load(checkpoint, similarity="nowhere.safetensors")


def test_widening_keeps_what_united_experts_compute(checkpoint: Path) -> None:
    write_united(checkpoint / "united-4.safetensors", make_united(checkpoint, 4))
    model = load(checkpoint)
    x, slots, weights = torch.randn(3, HIDDEN), torch.tensor([[EXPERTS], [EXPERTS + 1], [0]]), torch.ones(3, 1)

    def out() -> Tensor:
        experts = model.moe_block(1).experts
        return model.kernels.grouped_experts_forward(x, experts.w13, experts.w2, slots, weights)

    expected, size = out(), model.united_bytes()
    model.widen_experts(3)
    torch.testing.assert_close(out(), expected, rtol=1e-4, atol=1e-4)
    assert model.united_bytes() == 3 * size
