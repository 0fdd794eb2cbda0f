"""Where the Triton server is and the environment it needs: the container's own, else the nvidia-pytriton wheel's.

Only the standard library is imported here: `make setup` asks whether an interpreter fits before anything is installed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from backend.errors import ConfigError

#: Where NVIDIA's containers keep the server.
CONTAINER_ROOT = Path("/opt/tritonserver")
#: The folder that holds `backend` and `model_repository`.
PRODUCT_ROOT = Path(__file__).resolve().parents[2]
#: First and last version, as in pyproject.toml.
SUPPORTED_PYTHON = ((3, 11), (3, 12))

_STUB = "triton_python_backend_stub"
_BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")


@dataclass(frozen=True)
class TritonServer:
    """A Triton server that can be started: its binary, its backends and the environment to start it in."""

    binary: Path
    backend_dir: Path
    env: dict[str, str]


def locate_server(
    work_dir: Path,
    environ: Mapping[str, str] | None = None,
    container_root: Path = CONTAINER_ROOT,
    package: str = "pytriton",
) -> TritonServer:
    """Find the server for this interpreter; ConfigError says which piece is missing and what to do.

    The wheel keeps its Python backend and the stubs of each Python version apart. Triton wants them in one directory:
    it is made of links in `work_dir`, the caller's own, so that starts share nothing and the wheel may be read-only.
    """
    environ = os.environ if environ is None else environ
    libraries = [find_libpython()]
    if (container_root / "bin" / "tritonserver").exists():
        binary, backend_dir = container_root / "bin" / "tritonserver", container_root / "backends"
        _check_container_stub(backend_dir / "python" / _STUB)
    else:
        site, root = _wheel(package)
        binary, backend_dir = root / "bin" / "tritonserver", work_dir / "backends"
        libraries.append(site / "nvidia_pytriton.libs")
        _link_backend(root, backend_dir / "python")
    if not os.access(binary, os.X_OK):
        raise ConfigError(f"the Triton server {binary} is missing or not executable: run `make setup` again")
    return TritonServer(binary, backend_dir, _server_env(environ, libraries))


def find_libpython(directories: Iterable[Path] | None = None) -> Path:
    """The directory with this interpreter's shared libpython, which Triton's Python stub is linked to."""
    name = f"libpython{_version()}.so.1.0"
    if directories is None:
        libdir = Path(sysconfig.get_config_var("LIBDIR") or sys.base_prefix)
        multiarch = sysconfig.get_config_var("MULTIARCH") or ""
        directories = (libdir, libdir / multiarch, Path(sys.base_prefix) / "lib")
    searched = list(dict.fromkeys(directories))
    for directory in searched:
        if (directory / name).exists():
            return directory
    raise ConfigError(
        f"Python {_version()} ({sys.executable}) has no shared library {name} in {' or '.join(map(str, searched))}, "
        f"and Triton's Python stub needs it: install it (on Debian and Ubuntu the package libpython{_version()}) or "
        "set up with a Python built with --enable-shared"
    )


def _version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _wheel(package: str) -> tuple[Path, Path]:
    """site-packages and the server's directory of the nvidia-pytriton wheel, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"no Triton server found: {CONTAINER_ROOT} does not exist and the package nvidia-pytriton is not installed "
            f"for {sys.executable}; run `make setup`, or start inside NVIDIA's Triton container"
        )
    folder = Path(spec.submodule_search_locations[0])
    return folder.parent, folder / "tritonserver"


def _link_backend(root: Path, target: Path) -> None:
    stub = root / "python_backend_stubs" / _version() / _STUB
    if not stub.exists():
        known = sorted((path.parent.name for path in stub.parents[1].glob(f"*/{_STUB}")), key=lambda v: (len(v), v))
        raise ConfigError(
            f"nvidia-pytriton has no Python stub for Python {_version()} (it has {', '.join(known) or 'none'}): "
            "set up with one of those that this project supports"
        )
    if not os.access(stub, os.X_OK):
        raise ConfigError(f"Triton's Python stub {stub} is not executable: install nvidia-pytriton again")
    target.mkdir(parents=True, exist_ok=True)
    for source in (stub, *(root / "backends" / "python" / name for name in _BACKEND_FILES)):
        if not source.exists():
            raise ConfigError(f"nvidia-pytriton lacks {source}: install it again")
        link = target / source.name
        link.unlink(missing_ok=True)
        link.symlink_to(source)


def _check_container_stub(stub: Path) -> None:
    if not stub.exists():
        raise ConfigError(f"the Triton server has no Python backend ({stub} is missing): use an image that has it")
    if f"libpython{_version()}.so".encode() not in stub.read_bytes():
        raise ConfigError(
            f"Triton's Python stub {stub} is not made for Python {_version()}: use the Python of the Triton image"
        )


def _server_env(environ: Mapping[str, str], libraries: Iterable[Path]) -> dict[str, str]:
    """The stub embeds Python and takes the packages of the first `python3` on PATH: this interpreter's directory."""
    bin_dir = Path(sys.executable).parent
    if not (bin_dir / "python3").exists():
        raise ConfigError(f"there is no python3 in {bin_dir}, by which Triton's Python stub finds its packages")
    return {
        **environ,
        "PATH": _joined(bin_dir, environ.get("PATH")),
        "LD_LIBRARY_PATH": _joined(*libraries, environ.get("LD_LIBRARY_PATH")),
        "PYTHONPATH": _joined(PRODUCT_ROOT, environ.get("PYTHONPATH")),
    }


def _joined(*parts: Path | str | None) -> str:
    return os.pathsep.join(str(part) for part in parts if part)


def main() -> int:
    """`python -m backend.serving.triton_server`: status 0 if the project can run on this Python, else 1 and why."""
    try:
        if not SUPPORTED_PYTHON[0] <= sys.version_info[:2] <= SUPPORTED_PYTHON[1]:
            raise ConfigError(f"{sys.executable} is Python {_version()}; the project needs Python 3.11 or 3.12")
        if importlib.util.find_spec("ensurepip") is None:
            raise ConfigError(
                f"{sys.executable} cannot make virtual environments: install ensurepip (on Debian and Ubuntu the "
                f"package python{_version()}-venv)"
            )
        find_libpython()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
