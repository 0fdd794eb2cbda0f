"""A stub outlives its server by a moment only."""

import subprocess
import sys

import psutil

SERVER = """
import subprocess, sys
stub = subprocess.Popen([sys.executable, "-c", "from backend.serving.server_watch import end_with_server as end; import time; "
                         "end(); print('watching', flush=True); time.sleep(60)"], stdout=sys.stdout)
print(stub.pid, flush=True)
stub.wait()
"""


def test_a_stub_ends_when_its_server_is_killed():
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    stub = psutil.Process(int(server.stdout.readline()))
    assert server.stdout.readline() == "watching\n"
    server.kill()
    server.wait()
    assert psutil.wait_procs([stub], timeout=5)[1] == []
