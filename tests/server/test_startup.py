"""Bad start-up input: the launcher ends with status 1 and one sentence that names the parameter and the remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from backend.serving.triton_server import PRODUCT_ROOT
from tests.models.tiny_checkpoints import build_synthetic_tokenizer, make_checkpoint

pytestmark = pytest.mark.server

VOCAB = 300


def missing_checkpoint(folder: Path) -> dict:
    return {"env": {"MOE_LLM_CHECKPOINT": str(folder / "nowhere")}}


def unknown_parameter(folder: Path) -> dict:
    """A copy of the repository with an edited config.pbtxt."""
    # Beside the product's package, as in the repository: model.py finds the package two folders up.
    repository = folder / "product" / "model_repository"
    shutil.copytree(PRODUCT_ROOT / "model_repository", repository, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "product" / "backend").symlink_to(PRODUCT_ROOT / "backend")
    config = repository / "moe_llm" / "config.pbtxt"
    config.write_text(config.read_text() + 'parameters { key: "max_runing" value { string_value: "4" } }\n')
    return {"arguments": ["--model-repository", str(repository)]}


def truncated_weights(folder: Path) -> dict:
    _checkpoint(folder, VOCAB)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return {"env": {"MOE_LLM_CHECKPOINT": str(folder)}}


def wrong_tokenizer(folder: Path) -> dict:
    _checkpoint(folder, VOCAB + 50)
    return {"env": {"MOE_LLM_CHECKPOINT": str(folder)}}


def workers_without_cluster(folder: Path) -> dict:
    """Says so where Ray is installed; elsewhere that it is not."""
    env = {"MOE_LLM_CHECKPOINT": "dummy:tiny", "MOE_LLM_EXPERT_POOL": "workers:2", "MOE_LLM_RAY_ADDRESS": "127.0.0.1:1"}
    return {"env": env}


def _checkpoint(folder: Path, tokenizer_size: int) -> None:
    make_checkpoint(folder, vocab_size=VOCAB)
    build_synthetic_tokenizer(tokenizer_size).save_pretrained(folder)


#: What prepares the start (in a folder of its own), and what the sentence must have: the parameter and the remedy.
CASES: dict[Callable[[Path], dict], tuple[str, ...]] = {
    missing_checkpoint: ("parameter checkpoint", "nowhere"),
    unknown_parameter: ("unknown parameter 'max_runing'", "max_running"),
    truncated_weights: ("checkpoint", "model.safetensors", "truncated", "copy or download it again"),
    workers_without_cluster: (
        ("Ray cluster at 127.0.0.1:1 (parameter ray_address)", "cannot be used")
        if find_spec("ray")
        else ("parameter expert_pool", "install the extra workers")
    ),
    wrong_tokenizer: ("parameter checkpoint", "wrong tokenizer", "copy the tokenizer files"),
}


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess]:
    """Every start, two at a time, as each mostly waits for imports."""

    def start(prepare: Callable[[Path], dict]) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp(prepare.__name__)
        command = [sys.executable, "-m", "backend.serving.launch", "--log", str(folder / "server.log")]
        command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        how = prepare(folder)
        return subprocess.run(
            command + how.get("arguments", []),
            cwd=PRODUCT_ROOT,
            env=os.environ | how.get("env", {}),
            capture_output=True,
            text=True,
            timeout=120,
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((case.__name__ for case in CASES), pool.map(start, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bad_start_up_input_is_one_sentence(starts: dict[str, subprocess.CompletedProcess], case: Callable) -> None:
    done = starts[case.__name__]
    assert (done.returncode, done.stdout) == (1, "")
    (sentence,) = done.stderr.strip().splitlines()
    for part in CASES[case]:
        assert part in sentence
    assert "Traceback" not in sentence
