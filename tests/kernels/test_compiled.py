"""How kernels are compiled: alike in every process, whatever imports numba first."""

import json
import os
import subprocess
import sys

import pytest

SHOW = """
import json, os, sys
for name in sys.argv[1:]:
    __import__(name)
from numba import config
print(json.dumps([config.CPU_NAME, config.CPU_FEATURES, config.THREADING_LAYER, *(k for k in os.environ if "NUMBA_" in k)]))
"""


def settings(*modules: str, **environment: str) -> list[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")} | environment
    done = subprocess.run([sys.executable, "-c", SHOW, *modules], env=kept, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("first", [[], ["numba"], ["backend.kernels.cpu.attention_decode"]], ids=str)
def test_wide_vectors_and_openmp_whatever_is_imported_first(first):
    """And nothing is left in the environment, where other processes would find it."""
    name, features, threading, *inherited = settings(*first, "backend.kernels.cpu")
    assert name and name != "generic"
    assert features.endswith(",-prefer-256-bit")
    assert (threading, inherited) == ("omp", [])


def test_what_the_user_sets_holds():
    chosen = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+sse2", "NUMBA_THREADING_LAYER": "workqueue"}
    assert settings("backend.kernels.cpu", **chosen)[:3] == list(chosen.values())
