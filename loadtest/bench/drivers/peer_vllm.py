"""vLLM as a peer, through its offline API; run by the benchmark with the interpreter of an environment that has vLLM."""

from __future__ import annotations

import os

from peer_protocol import Generate, serve

_GPU_SHARE = 0.45


def load(command: dict) -> Generate:
    """Load the checkpoint; what is set in the environment already wins over what is chosen here."""
    # GiB of keys and values: what ours has at most by default.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # Its own choice unless told. Without binding its decoding is a quarter slower and its runs differ by a factor of two.
    if command["binding"]:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = command["binding"]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "auto")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams

    # On a GPU ours has its share of the memory, too.
    share = {"gpu_memory_utilization": _GPU_SHARE} if command["device"] == "cuda" else {}
    llm = LLM(
        model=command["checkpoint"],
        dtype=command["dtype"],
        max_model_len=command["max_model_len"],
        max_num_seqs=command["requests"],
        enable_prefix_caching=False,
        # Prompts are token ids and no text is wanted, so the checkpoint needs no tokenizer.
        skip_tokenizer_init=True,
        seed=0,
        **share,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


if __name__ == "__main__":
    serve(load)
