"""Triton entry point of the control plane; everything is in backend.serving.control_adapter."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import triton_python_backend_utils as pb_utils

from backend.serving.control_adapter import BrownoutModel
from backend.serving.server_watch import end_with_server


class TritonPythonModel:
    def initialize(self, args):
        end_with_server()
        self._model = BrownoutModel(pb_utils, args)

    def execute(self, requests):
        return self._model.execute(requests)

    def finalize(self):
        self._model.finalize()
