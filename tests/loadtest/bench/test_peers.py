"""Peers in other environments: the protocol, what is said when one fails, and that it stands still between runs."""

import argparse
import sys
import textwrap

import psutil
import pytest

from backend.brownout.settings import Settings
from backend.config import EngineConfig
from loadtest.bench import engine, peer_process
from loadtest.bench.__main__ import main
from loadtest.bench.our_engine import OurEngine
from loadtest.bench.peer_process import DRIVERS, PeerError, PeerProcess, PeerSpec, peer_spec
from loadtest.bench.peers import TransformersPeer, tokens_equal
from loadtest.bench.workload import Workload
from tests.waiting import wait_until

PROMPTS = [[1, 2], [3, 4]]
VLLM = """
    import os
    class SamplingParams:
        def __init__(self, **options): self.options = options
    class LLM:
        def __init__(self, **options):
            assert options["enable_prefix_caching"] is False and options["skip_tokenizer_init"]
            assert options["dtype"] == "float32" and options["max_model_len"] == 8 and options["max_num_seqs"] == 2
            assert os.environ["VLLM_CPU_KVCACHE_SPACE"] and os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "auto"
            print("INFO engine is up", flush=True)  # on standard output, as vLLM does
        def generate(self, prompts, params, use_tqdm):
            assert params.options["temperature"] == 0.0 and params.options["ignore_eos"]
            made = [[prompt["prompt_token_ids"][0]] * params.options["max_tokens"] for prompt in prompts]
            output = lambda ids: type("Output", (), {"outputs": [type("One", (), {"token_ids": tuple(ids)})]})
            return [output(ids) for ids in made]
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a peer whose driver's `load` is given as source; it is ended with the test."""
    started = []

    def start(source: str) -> PeerProcess:
        driver = tmp_path / "driver.py"
        head = f"import sys\nsys.path.insert(0, {str(DRIVERS['vllm'].parent)!r})\nfrom peer_protocol import serve\n"
        driver.write_text(head + textwrap.dedent(source) + "\nserve(load)\n")
        monkeypatch.setitem(peer_process.DRIVERS, "fake", driver)
        spec = PeerSpec("fake", sys.executable)
        started.append(PeerProcess(spec, checkpoint="here", dtype="float32", device="cpu", max_model_len=8, requests=2))
        return started[-1]

    yield start
    for peer in started:
        peer.close()


def test_vllm_driver_speaks_the_protocol_and_the_offline_api(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(textwrap.dedent(VLLM))
    driver = tmp_path / "with_fake_vllm.py"
    driver.write_text(
        f"import runpy, sys\nsys.path[:0] = [{str(tmp_path)!r}, {str(DRIVERS['vllm'].parent)!r}]\n"
        f"runpy.run_path({str(DRIVERS['vllm'])!r}, run_name='__main__')\n"
    )
    monkeypatch.setitem(peer_process.DRIVERS, "vllm", driver)
    spec = PeerSpec("vllm", sys.executable)
    with PeerProcess(spec, checkpoint="x", dtype="float32", device="cpu", max_model_len=8, requests=2) as peer:
        run = peer.run(PROMPTS, 3)
    assert run.tokens == [[1, 1, 1], [3, 3, 3]] and run.seconds >= 0


def test_peer_stands_still_between_runs_and_takes_its_children_along(start):
    peer = start(
        """
        import subprocess
        def load(command):
            child = subprocess.Popen(["sleep", "60"])
            return lambda prompts, new_tokens: [[child.pid] * new_tokens for _ in prompts]
        """
    )
    child = psutil.Process(peer.run(PROMPTS, 1).tokens[0][0])
    wait_until(lambda: child.status() == psutil.STATUS_STOPPED, 10, "a child that stands still")
    peer.close()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_peer_that_fails_says_why_and_can_go_on(start):
    peer = start(
        """
        def load(command):
            def generate(prompts, new_tokens):
                if new_tokens == 1:
                    raise MemoryError("no room for keys")
                return [[7] * new_tokens for _ in prompts]
            return generate
        """
    )
    with pytest.raises(PeerError, match=r"fake failed at 'run': MemoryError: no room for keys(.|\n)*Traceback"):
        peer.run(PROMPTS, 1)
    assert peer.run(PROMPTS, 2).tokens == [[7, 7], [7, 7]]


def test_peer_that_dies_is_reported_with_its_last_lines(start):
    with pytest.raises(PeerError, match=r"ended with status 3 at 'load'(.|\n)*illegal instruction"):
        start(
            """
            import os
            def load(command):
                print("illegal instruction", file=sys.stderr, flush=True)
                os._exit(3)
            """
        )


def test_peer_with_too_few_tokens_is_refused(start):
    peer = start("load = lambda command: lambda prompts, new_tokens: [[5] for _ in prompts]")
    with pytest.raises(PeerError, match="instead of 2"):
        peer.run(PROMPTS, 2)


def test_peer_without_its_package_leaves_our_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "_export", lambda checkpoint, united, dtype, stack: (checkpoint, united))
    work = ["--requests", "2", "--prompt-tokens", "4", "--new-tokens", "3", "--runs", "1"]
    assert main(["engine", "--shape", "tiny", *work, "--peer", f"vllm={sys.executable}"]) == 1
    printed = capsys.readouterr().out
    assert "No module named 'vllm'" in printed and "ours" in printed


def test_peer_that_fails_half_way_is_dropped(start, monkeypatch):
    fake = start(
        """
        runs = []
        def load(command):
            def generate(prompts, new_tokens):
                runs.append(1)
                if len(runs) > 4:
                    raise RuntimeError("out of luck")
                return [[0] * new_tokens for _ in prompts]
            return generate
        """
    )
    monkeypatch.setattr(engine, "_export", lambda checkpoint, united, dtype, stack: (checkpoint, united))
    monkeypatch.setattr(engine, "PeerProcess", lambda *_, **__: fake)
    result = engine.run(
        checkpoint="dummy:tiny",
        work=Workload(requests=2, prompt_tokens=4, new_tokens=3),
        settings=Settings(),
        device="cpu",
        dtype="auto",
        runs=2,
        peers=[PeerSpec("fake", sys.executable)],
    )
    assert "out of luck" in result["peers"]["fake"]["error"] and len(result["runs"]) == 2


def test_transformers_makes_our_tokens_from_our_own_weights():
    engine_options = {"checkpoint": "dummy:tiny", "dtype": "float32", "device": "cpu", "max_model_len": 32}
    ours = OurEngine(EngineConfig(**engine_options))
    peer = TransformersPeer.of_model(ours.engine.runner.model, "dummy:tiny")
    prompts = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert peer.run(prompts, 6).tokens == ours.run(prompts, 6).tokens


def test_a_peer_may_be_measured_with_several_bindings():
    specs = [peer_spec(f"{name}={sys.executable}") for name in ("vllm", "vllm:0-1", "vllm:auto")]
    assert [(spec.name, spec.engine, spec.binding) for spec in specs] == [
        ("vllm", "vllm", ""),
        ("vllm:0-1", "vllm", "0-1"),
        ("vllm:auto", "vllm", "auto"),
    ]


@pytest.mark.parametrize("text", ["vllm", "other=/bin/sh", "vllm=", "vllm=/no/such/python", "vllm=/tmp"])
def test_unusable_peers_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        peer_spec(text)


def test_tokens_are_compared_sequence_by_sequence():
    assert tokens_equal([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.5
