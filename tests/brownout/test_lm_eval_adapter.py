"""The harness's requests get what transformers would give."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from backend.brownout.lm_eval_adapter import BrownoutLM
from backend.demo.template import CHAT_TEMPLATE
from backend.engine.sampling_params import SamplingParams
from backend.errors import ConfigError


def _requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.fixture(scope="module")
def model(text_checkpoint):
    return BrownoutLM(str(text_checkpoint), batch_size="4", device=None, max_batch_size=64)


@pytest.fixture(scope="module")
def reference(text_checkpoint):
    network = AutoModelForCausalLM.from_pretrained(text_checkpoint, dtype=torch.float32).eval()
    return network, AutoTokenizer.from_pretrained(text_checkpoint)


@torch.no_grad()
def _expected(reference, before: list[int], after: list[int]) -> tuple[float, bool]:
    logprobs = reference[0](torch.tensor([before + after])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
    targets = torch.tensor(after)
    return float(logprobs.gather(1, targets.unsqueeze(1)).sum()), bool((logprobs.argmax(1) == targets).all())


def test_loglikelihoods_are_those_of_transformers(model, reference):
    encode = reference[1].encode
    pairs = [("The quick brown", " fox"), ("One, two ", "three"), ("", "lone"), ("a", "b"), ("x" * 30, " y" * 20)]
    found = model.loglikelihood(_requests(*pairs))
    bare = [(("One, two", " three") if context == "One, two " else (context, said)) for context, said in pairs]
    for (context, said), (logprob, greedy) in zip(bare, found, strict=True):
        wanted = _expected(reference, encode(context) or [reference[1].eos_token_id], encode(said))
        assert logprob == pytest.approx(wanted[0], abs=1e-3) and greedy == wanted[1]


def test_a_greedy_continuation_is_told(model, reference):
    ids = reference[1].encode("The quick brown")
    best = int(reference[0](torch.tensor([ids])).logits[0, -1].argmax())
    scored = model._score([([*ids, best], len(ids)), ([*ids, best - 1 if best else 1], len(ids))])
    assert [bool(found.greedy.all()) for found in scored] == [True, False]


def test_long_texts_are_scored_in_windows_that_follow_one_another(model, reference):
    text = "".join(chr(97 + i * i % 26) for i in range(700))
    (found,) = model.loglikelihood_rolling(_requests((text,)))
    ids = [reference[1].eos_token_id, *reference[1].encode(text)]
    size = 511
    wanted = sum(_expected(reference, ids[i - 1 : i], ids[i : i + size])[0] for i in range(1, len(ids), size))
    assert len(ids) == 701 and found == pytest.approx(wanted, abs=1e-2)


def test_generation_is_that_of_the_engine_with_its_stop_strings_and_limits(model):
    contexts = ["The quick", "One, two", "x" * 40]
    limits = [{"max_gen_toks": 12}, {"max_gen_toks": 5, "do_sample": False}, {"max_gen_toks": 9, "temperature": 0.0}]
    (full,), *_ = model.llm.generate(contexts[:1], SamplingParams(max_tokens=12, temperature=0.0))
    stops = [(), (full.text[2],), (full.text[3:5], "\n\n\n")]
    assert len(full.text) > 6
    asked = [(c, {**most, "until": list(until)}) for c in contexts for most in limits for until in stops]
    for (context, given), text in zip(asked, model.generate_until(_requests(*asked)), strict=True):
        params = SamplingParams(max_tokens=given["max_gen_toks"], temperature=0.0, stop=tuple(given["until"]))
        assert text == model.llm.generate([context], params)[0][0].text
        assert not any(until in text for until in given["until"])


def test_generation_ends_with_the_stop_string(model):
    arguments = ("The quick", {"max_gen_toks": 40})
    (full,) = model.generate_until(_requests(arguments))
    before = model.meter.steps
    assert model.generate_until(_requests((arguments[0], arguments[1] | {"until": full[0]}))) == [""]
    assert model.meter.steps - before < 8 and not model.llm.engine.has_work


def test_chats_are_written_by_the_checkpoints_template(text_checkpoint, tmp_path):
    folder = shutil.copytree(text_checkpoint, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    model = BrownoutLM(str(folder), batch_size=2)
    history = [{"role": "user", "content": "1 + 1"}]
    prompt = model.apply_chat_template(history)
    assert prompt == "<|user|> 1 + 1<|assistant|>" and model.chat_template(True) == CHAT_TEMPLATE
    assert model.tokenizer_name.endswith("chat") and "/" not in model.tokenizer_name
    begun = model.apply_chat_template([*history, {"role": "assistant", "content": "2"}], add_generation_prompt=False)
    assert begun == prompt + " 2"


def test_settings_act_and_are_checked(text_checkpoint, model):
    # The harness's command names cuda:0 by itself: without a GPU that is the CPU.
    device = "auto" if torch.cuda.is_available() else "cuda:0"
    dimmed = BrownoutLM(str(text_checkpoint), threshold="0", way="4", batch_size=4, device=device)
    request = _requests(("The quick brown fox jumps over the lazy dog", " again and again"))
    assert dimmed.loglikelihood(request)[0][0] != pytest.approx(model.loglikelihood(request)[0][0], abs=1e-3)
    assert dimmed.steps()["united_share"] > 0.5 and model.steps()["united_share"] == 0
    with pytest.raises(ConfigError, match="way 8 is not loaded"):
        BrownoutLM(str(text_checkpoint), threshold=0, way=8)
    with pytest.raises(ConfigError, match="unknown model argument 'colour'"):
        BrownoutLM(str(text_checkpoint), colour=1)
