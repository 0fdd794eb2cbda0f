"""Finding a Triton server, and the sentence for each piece that can be missing."""

import sys
from pathlib import Path

import pytest

from backend.errors import ConfigError
from backend.serving.triton_server import PRODUCT_ROOT, find_libpython, locate_server

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def write(path: Path, text: str = "", mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def container(tmp_path) -> Path:
    root = tmp_path / "container"
    write(root / "bin" / "tritonserver")
    write(root / "backends" / "python" / "triton_python_backend_stub", f"ELF libpython{VERSION}.so.1.0")
    return root


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel in the manner of nvidia-pytriton, as the package `fake_pytriton`; its server's directory."""
    site = tmp_path / "site-packages"
    write(site / "fake_pytriton" / "__init__.py", "raise AssertionError('it must not be imported')")
    root = site / "fake_pytriton" / "tritonserver"
    write(root / "bin" / "tritonserver")
    for version in ("3.8", VERSION):
        write(root / "python_backend_stubs" / version / "triton_python_backend_stub")
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        write(root / "backends" / "python" / name, mode=0o644)
    monkeypatch.syspath_prepend(site)
    return root


def locate(tmp_path: Path, container: Path | None = None, environ: dict[str, str] | None = None):
    return locate_server(tmp_path / "work", environ or {}, container or tmp_path / "absent", "fake_pytriton")


def test_the_containers_server_is_preferred(tmp_path, container, wheel):
    server = locate(tmp_path, container)
    assert server.binary == container / "bin" / "tritonserver"
    assert server.backend_dir == container / "backends"
    assert not (tmp_path / "work").exists()


def test_the_wheels_backend_is_put_together_without_writing_into_it(tmp_path, wheel):
    before = sorted(wheel.rglob("*"))
    for _ in range(2):  # a restart finds the links of the first start
        server = locate(tmp_path)
    assert server.binary == wheel / "bin" / "tritonserver"
    links = {path.name: path.resolve() for path in (server.backend_dir / "python").iterdir()}
    assert links == {
        "libtriton_python.so": wheel / "backends" / "python" / "libtriton_python.so",
        "triton_python_backend_utils.py": wheel / "backends" / "python" / "triton_python_backend_utils.py",
        "triton_python_backend_stub": wheel / "python_backend_stubs" / VERSION / "triton_python_backend_stub",
    }
    assert sorted(wheel.rglob("*")) == before


def test_the_environment_leads_stubs_to_this_interpreter_and_this_product(tmp_path, wheel):
    environ = {"PATH": "/a", "PYTHONPATH": "/b", "LD_LIBRARY_PATH": "/c", "OTHER": "kept"}
    env = locate(tmp_path, environ=environ).env
    assert env["PATH"] == f"{Path(sys.executable).parent}:/a"
    assert env["PYTHONPATH"] == f"{PRODUCT_ROOT}:/b"
    assert env["LD_LIBRARY_PATH"] == f"{find_libpython()}:{wheel.parents[1] / 'nvidia_pytriton.libs'}:/c"
    assert env["OTHER"] == "kept"
    assert locate(tmp_path).env["PYTHONPATH"] == str(PRODUCT_ROOT)


def test_no_server_at_all(tmp_path):
    with pytest.raises(ConfigError, match=r"no Triton server found: .*nvidia-pytriton is not installed.*make setup"):
        locate(tmp_path)


def test_no_stub_for_this_python(tmp_path, wheel):
    (wheel / "python_backend_stubs" / VERSION / "triton_python_backend_stub").unlink()
    with pytest.raises(ConfigError, match=rf"no Python stub for Python {VERSION} \(it has 3\.8\)"):
        locate(tmp_path)


@pytest.mark.parametrize(
    ("piece", "sentence"),
    [
        ("bin/tritonserver", "the Triton server .* is missing or not executable"),
        ("backends/python/libtriton_python.so", "nvidia-pytriton lacks .*libtriton_python.so"),
    ],
)
def test_a_piece_of_the_wheel_is_missing(tmp_path, wheel, piece, sentence):
    (wheel / piece).unlink()
    with pytest.raises(ConfigError, match=sentence):
        locate(tmp_path)


def test_the_containers_stub_is_for_another_python(tmp_path, container):
    write(container / "backends" / "python" / "triton_python_backend_stub", "ELF libpython3.9.so.1.0")
    with pytest.raises(ConfigError, match=f"is not made for Python {VERSION}"):
        locate(tmp_path, container)


def test_the_container_has_no_python_backend(tmp_path, container):
    (container / "backends" / "python" / "triton_python_backend_stub").unlink()
    with pytest.raises(ConfigError, match="has no Python backend"):
        locate(tmp_path, container)


def test_no_shared_libpython(tmp_path):
    expected = rf"no shared library libpython{VERSION}\.so\.1\.0 in {tmp_path}, and Triton's Python stub needs it"
    with pytest.raises(ConfigError, match=expected):
        find_libpython([tmp_path])
