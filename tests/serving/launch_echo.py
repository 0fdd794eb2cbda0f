"""A model repository for tests of the launcher: one trivial echo model that keeps the stub's part of the contract."""

from pathlib import Path

CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 0
input [ {{ name: "text" data_type: TYPE_STRING dims: [ -1 ] }} ]
output [ {{ name: "echo" data_type: TYPE_STRING dims: [ -1 ] }} ]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
"""

#: ECHO_FAIL makes it fail to load. ECHO_ENGINE starts an engine that is `polite` (on SIGTERM it takes 0.3 s to end)
#: or `stubborn` (it ignores SIGTERM); what ends is noted in the file that ECHO_EVENTS names, in order.
MODEL = '''
import json, os, subprocess, sys
from pathlib import Path

import triton_python_backend_utils as pb_utils

import backend.errors  # the product is importable from a model

ENGINE = """
import os, signal, sys, time
def on_sigterm(*_):
    if sys.argv[1] == "polite":
        time.sleep(0.3)
        open(os.environ["ECHO_EVENTS"], "a").write("engine ")
        sys.exit()
signal.signal(signal.SIGTERM, on_sigterm)
print("up", flush=True)
while True:
    time.sleep(0.05)
"""


class TritonPythonModel:
    def initialize(self, args):
        if "ECHO_FAIL" in os.environ:
            raise pb_utils.TritonModelException("echo: parameter checkpoint must name a\\nfolder, got 'x\\"y'.")
        runtime_dir = Path(os.environ["BROWNOUT_RUNTIME_DIR"])
        if kind := os.environ.get("ECHO_ENGINE"):
            engine = subprocess.Popen(["python3", "-c", ENGINE, kind], stdout=subprocess.PIPE, start_new_session=True)
            engine.stdout.readline()
            (runtime_dir / "engine-0.json").write_text(json.dumps({"state": "ready", "pid": engine.pid}))
        self._mark = runtime_dir / f"stub-{os.getpid()}.json"
        self._mark.write_text(json.dumps({"pid": os.getpid(), "model": args["model_name"]}))

    def execute(self, requests):
        tensors = [pb_utils.get_input_tensor_by_name(request, "text").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("echo", tensor)]) for tensor in tensors]

    def finalize(self):
        self._mark.unlink()
        if "ECHO_EVENTS" in os.environ:
            open(os.environ["ECHO_EVENTS"], "a").write("stub ")
'''


def make_repository(folder: Path, name: str = "echo") -> Path:
    """Write the model below `folder` and return it."""
    (folder / name / "1").mkdir(parents=True)
    (folder / name / "config.pbtxt").write_text(CONFIG.format(name=name))
    (folder / name / "1" / "model.py").write_text(MODEL)
    return folder
