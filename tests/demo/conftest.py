"""A tiny data folder and tiny shapes, so that every command of the demo runs in seconds."""

from pathlib import Path

import numpy as np
import pytest
import torch

from backend.demo.corpus import DOMAINS
from backend.demo.families import FAMILIES, sample
from backend.demo.model import DemoModel, Shape
from backend.demo.prepare import token_ids
from backend.demo.smalltalk import SMALLTALK
from backend.demo.tasks import FORMS, in_form
from backend.demo.template import chat_text, prompt_text
from backend.demo.tokenizer import save_tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """What `prepare` writes, from a little text."""
    import random

    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("data")
    texts = [chat_text([("user", asked), ("assistant", said)]) for asked, said in SMALLTALK] * 8
    questions = (in_form(sample(family, rng), form, rng) for family in FAMILIES for form in FORMS for _ in range(10))
    tokenizer = train_tokenizer([*texts, *(f"{prompt_text(prompt)} {answer}" for prompt, answer in questions)], 700)
    save_tokenizer(tokenizer, folder)
    for domain in DOMAINS:
        for side in ("train", "held_out"):
            np.save(folder / f"{domain}.{side}.npy", token_ids(tokenizer, texts, 3000))
    return folder


@pytest.fixture(scope="session")
def shape() -> Shape:
    """A model of two layers with 8 experts, 4 per token, for the tiny tokenizer."""
    return Shape(
        vocab_size=700, hidden=32, layers=2, heads=2, experts=8, top_k=4, expert_size=16, dense_size=64, shared_size=16
    )


@pytest.fixture
def moe(shape) -> DemoModel:
    """A random model with experts."""
    torch.manual_seed(3)
    return DemoModel(shape, moe=True)
