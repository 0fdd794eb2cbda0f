"""The commands on a tiny model: a run that was stopped equals one that was not; the export loads everywhere."""

import json

import numpy as np
import pytest
import torch

from backend.demo import export as export_command
from backend.demo import prepare
from backend.demo import train as train_command
from backend.demo.batches import DRILL, FAMILY_NAMES, BatchMaker, BatchSizes, family_mix
from backend.demo.export import export, load_run
from backend.demo.quality import (
    accuracy,
    engine_answerer,
    held_out_tokens,
    load_transformers,
    perplexity,
    transformers_answerer,
)
from backend.demo.tokenizer import load_tokenizer, train_tokenizer, wrap
from backend.errors import ConfigError
from backend.models import load_model

SIZES = BatchSizes(text_rows=1, text_length=32, question_rows=3, question_length=64, drill_rows=1)
_TINY = (
    "--no-compile --hidden 32 --layers 2 --heads 2 --experts 8 --expert-size 16 --shared-size 16 --text-rows 1 "
    "--text-length 32 --question-rows 3 --drill-rows 1 --warmup 2 --save-every 2"
).split()


def _train(phase, data, run, steps, *more):
    return train_command.main([phase, "--data", str(data), "--run", str(run), "--steps", str(steps), *_TINY, *more])


@pytest.fixture(scope="module")
def dense(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("dense")
    assert _train("dense", data, run, 4) == 0
    return run


@pytest.fixture(scope="module")
def trained(data, dense, tmp_path_factory):
    run = tmp_path_factory.mktemp("experts")
    assert _train("experts", data, run, 4, "--dense", str(dense)) == 0
    return run


@pytest.fixture(scope="module")
def checkpoint(data, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    export(load_run(trained), data, folder, "float32")
    return folder


def test_a_stopped_run_goes_on_to_the_same_weights(data, dense, trained, tmp_path, monkeypatch):
    """The first run stops after 2 of 4 steps, as if it had been killed between them."""
    from backend.demo.trainer import Trainer

    step = Trainer.train_step

    def stopping(self):
        if self.step == 2:
            raise KeyboardInterrupt
        return step(self)

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", stopping)
        _train("experts", data, run, 4, "--dense", str(dense))
    assert _train("experts", data, run, 4, "--dense", str(dense)) == 0
    for (name, ours), theirs in zip(
        load_run(run).state_dict().items(), load_run(trained).state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_log_has_losses_and_families(trained):
    line = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 4
    assert 0 < line["loss"] < 20
    assert set(line["families"]) <= set(FAMILY_NAMES)


def test_a_batch_depends_on_seed_step_and_mix_only(data):
    mix = family_mix({})
    first, second = BatchMaker(data, SIZES, 7).make(3, mix), BatchMaker(data, SIZES, 7).make(3, mix)
    assert all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
    assert not np.array_equal(first.questions, BatchMaker(data, SIZES, 7).make(4, mix).questions)


def test_targets_are_what_comes_next(data):
    batch = BatchMaker(data, SIZES, 0).make(0, family_mix({}))
    flat = np.concatenate([batch.text.ravel(), batch.questions.ravel()])
    for position, target, family in zip(batch.positions, batch.targets, batch.families, strict=True):
        last_of_text = family < 0 and (position + 1) % SIZES.text_length == 0
        number = batch.documents.ravel()[position - batch.text.size] if family >= 0 else 0
        following = position + 1 - batch.text.size
        ends = family >= 0 and (following >= batch.documents.size or batch.documents.ravel()[following] != number)
        if not last_of_text and not ends:
            assert flat[position + 1] == target


def test_a_drill_says_everything_twice(data):
    batch = BatchMaker(data, SIZES, 0).make(0, family_mix({}))
    row = batch.questions[0]
    assert np.array_equal(row[:32], row[32:])
    assert np.array_equal(batch.targets[batch.families == DRILL], row[33:])


def test_what_is_not_learned_is_asked_more():
    mix = family_mix({"add": 0.0, "sort_digits": 0.9})
    assert mix["sort_digits"] > 5 * mix["add"] > 0


def test_the_export_gives_the_same_logits_in_transformers_and_in_training(checkpoint, trained):
    model, _ = load_transformers(checkpoint)
    ids = torch.randint(0, 500, (2, 24))
    ours = load_run(trained)
    with torch.no_grad():
        expected = ours.logits(ours([ids], [None])[0]).view(2, 24, -1)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)


def test_the_engine_loads_every_tensor_of_the_export(checkpoint):
    model = load_model(str(checkpoint), device=torch.device("cpu"))
    reference, _ = load_transformers(checkpoint)
    weights = dict(model.weights())
    assert torch.equal(weights["model.embed_tokens.weight"], reference.model.embed_tokens.weight)
    stored = reference.model.layers[1].mlp.experts.down_proj[5]
    assert torch.equal(weights["model.layers.1.mlp.experts.5.down_proj.weight"], stored)


def test_engine_and_transformers_give_the_same_answers(checkpoint):
    prompts = ["<|user|> Sort: 4 7 2<|assistant|>", "<|user|> Hello<|assistant|>"]
    assert engine_answerer(checkpoint)(prompts) == transformers_answerer(checkpoint)(prompts)


def test_accuracy_counts_exact_matches(monkeypatch):
    monkeypatch.setattr("backend.demo.quality.FAMILIES", {"repeat": None})
    found = accuracy(lambda prompts: [prompt.split(": ")[1].split("<")[0] for prompt in prompts], 10, ("free",))
    assert found == {"free": {"repeat": 100.0}}


def test_perplexity_of_an_untrained_model_is_near_the_vocabulary_size(checkpoint, data):
    found = perplexity(checkpoint, data, number=2)
    assert all(100 < values["perplexity"] < 3000 for values in found.values())


def test_held_out_text_is_read_in_the_tokens_of_the_checkpoint_that_is_measured(data, tmp_path):
    own, other = load_tokenizer(data), train_tokenizer(["what was said before"], 300)
    kept = held_out_tokens(data, "chat", wrap(own))
    assert kept.tolist() == np.load(data / "chat.held_out.npy").tolist()
    found = held_out_tokens(data, "chat", wrap(other))
    text = own.decode(kept.tolist(), skip_special_tokens=False)
    assert len(found) > len(kept) and other.decode(found.tolist(), skip_special_tokens=False) == text
    assert len(held_out_tokens(data, "absent", wrap(own))) == 0
    (tmp_path / "chat.held_out.npy").write_bytes((data / "chat.held_out.npy").read_bytes())
    with pytest.raises(ConfigError, match="there is no tokenizer"):
        held_out_tokens(tmp_path, "chat", wrap(own))


def test_a_dense_run_cannot_be_exported(dense, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        export_command.main(["--run", str(dense), "--data", str(data), "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "experts" in capsys.readouterr().err


def test_training_without_data_says_what_to_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        _train("dense", tmp_path, tmp_path / "run", 1)
    assert "backend.demo.prepare" in capsys.readouterr().err


def test_more_drills_than_rows_is_a_usage_error(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        _train("dense", data, tmp_path / "run", 1, "--drill-rows", "3")
    assert "--drill-rows" in capsys.readouterr().err


def test_preparing_with_a_missing_corpus_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--output", str(tmp_path), "--corpus", str(tmp_path / "none")])
    assert "--corpus" in capsys.readouterr().err
