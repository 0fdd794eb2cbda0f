"""NVIDIA's perf_analyzer, fetched on first use: `python -m loadtest.perf_analyzer [perf_analyzer's own arguments]`.

The PyPI package named perf-analyzer is an empty placeholder. The last binary that runs on common distributions is inside
the wheel of tritonclient 2.49.0 (2.52 and later need glibc 2.38); it is unpacked beside this environment and the two
libraries it lacks are taken from the nvidia-pytriton wheel. A perf_analyzer on PATH is preferred.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "tritonclient==2.49.0"
_MEMBER = "tritonclient-2.49.0.data/data/bin/perf_analyzer"
_LIBRARIES = {"libb64.so.0d": "libb64-", "libcudart.so.12": "libcudart-"}


class PerfAnalyzerUnavailable(RuntimeError):
    """The binary cannot be had here; the message says why."""


def find_or_fetch() -> tuple[str, dict[str, str]]:
    """The binary and the environment it needs. Raises PerfAnalyzerUnavailable."""
    installed = shutil.which("perf_analyzer")
    if installed:
        return installed, dict(os.environ)
    home = Path(sys.prefix) / "share" / "perf_analyzer"
    binary = home / "perf_analyzer"
    if not binary.exists():
        home.mkdir(parents=True, exist_ok=True)
        _fetch(home)
        _link_libraries(home)
    library_path = os.pathsep.join(filter(None, (str(home), os.environ.get("LD_LIBRARY_PATH"))))
    env = {**os.environ, "LD_LIBRARY_PATH": library_path}
    probe = subprocess.run([binary, "--version"], env=env, capture_output=True, text=True)
    if "error while loading" in probe.stderr or "not found" in probe.stderr:
        raise PerfAnalyzerUnavailable(f"perf_analyzer does not run here: {probe.stderr.strip()}")
    return str(binary), env


def _fetch(home: Path) -> None:
    """Download the wheel and unpack the one file that is wanted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise PerfAnalyzerUnavailable(f"{WHEEL} could not be downloaded: {done.stderr.strip()[-300:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            partial = home / "perf_analyzer.partial"
            partial.write_bytes(wheel.read(_MEMBER))
    partial.chmod(0o755)
    partial.rename(home / "perf_analyzer")


def _link_libraries(home: Path) -> None:
    try:
        files = importlib.metadata.files("nvidia-pytriton") or []
    except importlib.metadata.PackageNotFoundError:
        return  # the system may have the libraries itself
    for name, start in _LIBRARIES.items():
        for file in files:
            if file.name.startswith(start):
                link = home / name
                link.unlink(missing_ok=True)
                link.symlink_to(Path(str(file.locate())).resolve())


def main() -> int:
    try:
        binary, env = find_or_fetch()
    except PerfAnalyzerUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    return subprocess.run([binary, *sys.argv[1:]], env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
