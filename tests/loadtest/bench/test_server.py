"""The server benchmark says which process used the processors."""

import subprocess
import sys

from loadtest.bench.server import ProcessorTimes


def test_processor_time_is_booked_by_what_the_command_line_names():
    code = "sum(range(10**7)); print('done', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "triton_python_backend_stub"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as stub:
        times = ProcessorTimes()
        assert stub.stdout is not None and stub.stdin is not None
        assert stub.stdout.readline() == "done\n"
        sum(range(10**6))
        shares = times.shares()
        stub.communicate("\n")
    assert shares["stubs"] > 0 and shares["client"] > 0
    assert shares["engine"] == shares["Triton server"] == 0
