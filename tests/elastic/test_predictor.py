"""Recording what the engine routes, predicting it, fine-tuning, and the files."""

import ast
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pytest import approx, fixture, raises
from rich.progress import Progress

from backend.config import DEMO_CHECKPOINT
from backend.demo.template import END_OF_TEXT
from backend.demo.tokenizer import save_tokenizer, train_tokenizer
from backend.elastic.predictor import FILE_NAME, Ewma, HiddenLayer, LastWindow, LoadPredictor, load_error, recall
from backend.elastic.recording import Recording, fingerprint_of, record, record_traffic
from backend.elastic.traffic import Traffic, demo_questions, mixed
from backend.elastic.train_predictor import measure, run, split_sequences, steps_of, train
from backend.engine.llm import LLM
from backend.engine.sampling_params import SamplingParams
from backend.errors import ConfigError
from backend.tokenizer import load_tokenizer
from tests.models.tiny_checkpoints import make_checkpoint

PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path, "qwen2_moe", num_hidden_layers=3)
    return path


@fixture(scope="module")
def recorded() -> tuple[LLM, Recording, list[list[int]]]:
    llm = LLM("dummy:tiny", max_model_len=128, kv_cache_blocks=128, max_batch_tokens=32)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 512, (40,), generator=generator).tolist() for _ in range(12)]
    return llm, record(llm, prompts, ["a", "b", "c"] * 4, PARAMS, "print"), prompts


def test_every_computed_token_is_recorded_once_in_the_order_of_its_sequence(recorded):
    llm, recording, prompts = recorded
    # The last generated token is not computed. Chunked prefill (32 tokens a step) changes nothing.
    assert recording.starts.diff().tolist() == [45] * 12
    assert recording.hidden.shape == (2, 540, 32) and recording.experts.shape == (2, 540, 2)
    alone = record(llm, prompts[4:5], ["a"], PARAMS, "print")
    rows = recording.rows_of([4])
    fresh = alone.hidden.shape[1]  # without what the prefix cache has kept
    assert torch.allclose(alone.hidden, recording.hidden[:, rows[-fresh:]], atol=2e-3)


def test_recorded_experts_are_those_that_the_engine_runs(recorded):
    llm, _, prompts = recorded
    recording = record(llm, prompts[:1], ["a"], PARAMS, "print")
    layers = [layer.moe for layer in llm.engine.runner.model.layers]
    # The taps are gone, and the last step's slots are those of the last recorded token.
    for layer, moe in enumerate(layers):
        assert type(moe).__name__ == "MoeBlock"
        assert set(moe.last_slots[-1].tolist()) == set(recording.experts[layer, -1].tolist())


def test_a_failed_run_leaves_the_engine_as_it_was(recorded):
    llm = recorded[0]
    with raises(ValueError, match="at most 127"):
        record(llm, [list(range(200))], ["a"], PARAMS, "print")
    assert all(type(layer.moe).__name__ == "MoeBlock" for layer in llm.engine.runner.model.layers)


def test_a_recording_survives_its_file_and_feeds_the_simulator(recorded, tmp_path):
    recording = recorded[1]
    recording.write(tmp_path / "r.safetensors")
    again = Recording.read(tmp_path / "r.safetensors")
    assert torch.equal(again.hidden, recording.hidden) and again.domain_names == ("a", "b", "c")
    predictor = again.predictor(1)
    pool = again.pool(predictor, 1)
    assert pool.predicted_counts(np.arange(20))[1] == approx(predictor.loads(again.hidden[0, :20], 1, 1).numpy())
    assert pool.experts.shape == (540, 2, 2) and (pool.predicted[:, 0] == -1).all()
    chosen = torch.from_numpy(pool.predicted[:, 1])
    assert pool.recall()[1] == approx(recall(chosen, again.experts[1]), abs=1e-6)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with raises(ConfigError, match="broken"):
        Recording.read(tmp_path / "broken.safetensors")


def synthetic(shift: float, tokens: int = 2400) -> Recording:
    """Two layers whose inputs differ by a rotation: at shift 0 the plain router predicts perfectly."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(tokens, 16, generator=generator)
    turn = torch.linalg.qr(torch.eye(16) + shift * torch.randn(16, 16, generator=generator))[0]
    routers = torch.randn(2, 8, 16, generator=generator)
    hidden = torch.stack([first, first @ turn])
    experts = torch.stack([(x @ router.T).topk(2).indices for x, router in zip(hidden, routers, strict=True)])
    starts, domains = torch.arange(0, tokens + 1, 50), torch.arange(tokens // 50) % 2
    return Recording(
        hidden.half(), experts.short(), starts, domains, routers, torch.zeros(2, 8), ("even", "odd"), "print"
    )


def test_a_poor_router_is_fine_tuned_past_the_bound_and_a_good_one_is_left_alone():
    with Progress(disable=True) as progress:
        predictor, report = run(synthetic(3.0), [1], 0, progress)
        same = train(synthetic(0.0), [1], range(48), 0, progress)
    (row,) = report["held_out"]
    assert row["form"] == "matrix" and row["recall_router"] < 0.6 and row["recall"] >= 0.8
    assert row["load_error"]["predictor"] < min(row["load_error"]["ewma"], row["load_error"]["router"])
    (shifted,) = report["domain_shift"]
    assert shifted["recall"] > shifted["recall_router"]
    assert set(report["by_domain"]) == set(report["by_domain_batched"]) == {"even", "odd"} and predictor.tuned == {
        (1, 1)
    }
    assert not same.tuned
    assert measure(synthetic(0.0), same, range(48))[0]["recall"] > 0.99


def test_where_no_matrix_is_enough_hidden_units_are_added():
    recording = synthetic(0.0)
    # The experts of the second layer hang on products of inputs, of which no matrix knows anything.
    hidden = recording.hidden[0].float()
    second = hidden * hidden.roll(1, dims=1)
    experts = (second @ recording.routers[1].T).topk(2).indices.short()
    bent = replace(
        recording,
        hidden=torch.stack([recording.hidden[0], second.half()]),
        experts=torch.stack([recording.experts[0], experts]),
    )
    with Progress(disable=True) as progress:
        predictor = train(bent, [1], range(48), 0, progress, steps=600)
    matrix = replace(predictor, hidden={})
    rows = bent.rows_of(range(48))
    found, without = (recall(p.choose(hidden[rows], 1, 1), experts[rows]) for p in (predictor, matrix))
    assert set(predictor.hidden) == {(1, 1)} and found > without + 0.15


def library_passages(number: int) -> Traffic:
    """Sources and docstrings of the standard library."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"), key=lambda path: -path.stat().st_size)
    sources = [path.read_text("utf-8") for path in paths[:number]]
    nodes = (node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    docs = "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))
    code = [source[len(source) // 2 :][:900] for source in sources]
    prompts = code + [docs[len(docs) * part // number :][:900] for part in range(number)]
    return Traffic(prompts, ["code"] * number + ["docs"] * number)


def test_the_demo_checkpoints_predictor_finds_four_fifths_of_the_experts_and_beats_past_loads():
    # Text of three of its domains, and questions, the hardest, of a seed that it was not trained on.
    questions, passages = demo_questions(1, seed=99), library_passages(8)
    domains = [family if family == "chat" else "questions" for family in questions.domains]
    traffic = Traffic(questions.prompts + passages.prompts, domains + passages.domains)
    with Progress(disable=True) as progress:
        recording = record_traffic(str(DEMO_CHECKPOINT), traffic, 32, 1, progress)
    predictor = LoadPredictor.read(DEMO_CHECKPOINT / FILE_NAME, recording.fingerprint)
    of = {name: torch.nonzero(recording.domains == i).flatten() for i, name in enumerate(recording.domain_names)}
    recalls = [
        row["recall"] for name in ("chat", "code", "docs") for row in measure(recording, predictor, of[name].tolist())
    ]
    assert len(recalls) == 3 * (recording.num_layers - 1) and np.mean(recalls) >= 0.8
    # Past loads are of chat before the questions come.
    rows = measure(recording, predictor, of["questions"].tolist(), of["chat"].tolist())
    for row in rows:
        assert row["recall"] > row["recall_router"] + 0.1
        assert row["load_error"]["predictor"] < 0.8 * row["load_error"]["ewma"]


def test_mixed_traffic_has_passages_of_every_text_and_questions(tmp_path):
    # The folder's tokenizer is another one than any checkpoint's: what counts is the text.
    tokenizer = train_tokenizer(["one two three"], vocab_size=300)
    save_tokenizer(tokenizer, tmp_path)
    texts = {name: "".join(f"{name} {i:02}; " for i in range(100)) for name in ("code", "prose")}
    for name, text in texts.items():
        ids = tokenizer.encode(text + END_OF_TEXT).ids[-100:]
        np.save(tmp_path / f"{name}.held_out.npy", np.array(ids, dtype=np.uint16))
    traffic = mixed(tmp_path, passages=3, length=30, repeats=1, seed=0)
    assert set(traffic.domains) == {"chat", "code", "prose", "questions"}
    code = [p for p, domain in zip(traffic.prompts, traffic.domains, strict=True) if domain == "code"]
    assert len(set(code)) == 3 and all(passage in texts["code"] + END_OF_TEXT for passage in code)
    assert sum(passage.endswith(END_OF_TEXT) for passage in code) == 1
    with raises(ConfigError, match="4 passages of 30 need more"):
        mixed(tmp_path, passages=4, length=30, repeats=1, seed=0)
    (tmp_path / "tokenizer.json").unlink()
    with raises(ConfigError, match="there is no tokenizer"):
        mixed(tmp_path, passages=3, length=30, repeats=1, seed=0)
    with raises(ConfigError, match="has no texts"):
        mixed(tmp_path / "absent", passages=1, length=1, repeats=1, seed=0)


def test_steps_take_the_tokens_of_sequences_served_together_in_turn():
    recording = synthetic(1.0, tokens=150)  # three sequences of 50
    assert torch.cat(steps_of(recording, [2, 0], 1)).tolist() == [*range(100, 150), *range(50)]
    together = torch.cat(steps_of(recording, [0, 2], 2)).tolist()
    assert together[:4] == [0, 100, 1, 101] and sorted(together) == [*range(50), *range(100, 150)]
    assert [len(step) for step in steps_of(recording, [0, 2], 2)] == [64, 36]


def test_held_out_sequences_are_of_every_domain_and_never_trained_on():
    training, testing = split_sequences(synthetic(1.0), seed=0)
    assert sorted(training + testing) == list(range(48)) and {s % 2 for s in testing} == {0, 1}
    assert split_sequences(synthetic(1.0), seed=0) == (training, testing)


def test_a_predictor_survives_its_file_and_belongs_to_one_checkpoint(checkpoint, tmp_path):
    recording = synthetic(1.0)
    generator = torch.Generator().manual_seed(2)
    added = HiddenLayer(*(torch.randn(*shape, generator=generator) for shape in ((4, 16), (4,), (8, 4))))
    predictor = replace(recording.predictor(1), hidden={(1, 1): added}, tuned=frozenset({(1, 1)}))
    path = tmp_path / "p.safetensors"
    predictor.write(path)
    again = LoadPredictor.read(path, "print")
    hidden = recording.hidden[0, :20]
    assert recall(again.choose(hidden, 1, 1), predictor.choose(hidden, 1, 1)) > 0.97
    assert again.hidden.keys() == predictor.hidden.keys() and again.tuned == predictor.tuned
    assert again.loads(hidden, 1, 1).sum() == approx(40)
    with raises(ConfigError, match="another checkpoint"):
        LoadPredictor.read(path, fingerprint_of(str(checkpoint)))
    with raises(ConfigError, match="no matrix for layer 0 at distance 1"):
        again.choose(hidden, 0, 1)
    path.write_bytes(path.read_bytes()[:100])
    with raises(ConfigError, match="not a readable load predictor"):
        LoadPredictor.read(path)


def test_a_checkpoint_of_transformers_is_recorded(checkpoint, monkeypatch):
    # The tiny checkpoint has no tokenizer; prompts are token ids.
    monkeypatch.setattr("backend.engine.llm.load_tokenizer", lambda *_: load_tokenizer("dummy:tiny", 512))
    llm = LLM(str(checkpoint), max_model_len=64, kv_cache_blocks=16)
    recording = record(llm, [[5, 6, 7, 8]], ["x"], PARAMS, fingerprint_of(str(checkpoint)))
    predictor = recording.predictor(0)
    # At distance 0 the router itself is applied to its own input.
    assert recall(predictor.choose(recording.hidden[1], 1, 0), recording.experts[1]) == 1.0


def test_a_tuned_predictors_load_is_a_sum_of_probabilities():
    # Log-odds 0 and -1000: two experts are equally likely, the third is out of the question.
    pair = (1, 1)
    plain = LoadPredictor({pair: torch.zeros(3, 1)}, {pair: torch.tensor([0.0, 0.0, -1e3])}, 1, "print")
    hidden = torch.ones(10, 1)
    assert sorted(plain.loads(hidden, *pair).tolist()) == [0.0, 0.0, 10.0]
    assert replace(plain, tuned=frozenset({pair})).loads(hidden, *pair).tolist() == approx([5.0, 5.0, 0.0])


def test_baselines_follow_the_past():
    window, ewma = LastWindow(2, steps=2), Ewma(2, decay=0.5)
    for baseline in (window, ewma):
        assert baseline.predict(10.0).tolist() == [5.0, 5.0]
        for loads in ([8, 0], [4, 4], [0, 8]):
            baseline.observe(torch.tensor(loads))
    assert window.predict(10.0).tolist() == approx([2.5, 7.5])
    assert ewma.predict(16.0).tolist() == approx([5.0, 11.0])
    assert load_error(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 3.0])) == approx(0.75)
