"""Messages between the stubs and an engine process, and the files by which they find each other.

Stubs push to the engine's socket, the engine pushes to one socket per stub; messages are msgpack (msgspec). The files lie
in the runtime directory (BROWNOUT_RUNTIME_DIR, made by the launcher):

    engine-<i>.json   EngineRecord: what engine i is doing; replaced atomically by whoever changes it
    engine-<i>.lock   held by the stub that starts and watches engine i
    stub-<pid>.json   written by a stub while its model is loaded; one left by a dead process means a crashed stub
    given-up-<pid>    written by a stub whose engine has failed for good: why; the launcher then ends the server
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from backend.engine.request import RequestEnded, TokenOutput
from backend.engine.sampling_params import SamplingParams

RUNTIME_DIR_ENV = "BROWNOUT_RUNTIME_DIR"
#: Exit status of an engine process whose configuration is unusable: starting it again would not help.
EXIT_CONFIG = 2


class Hello(msgspec.Struct, tag=True):
    """A stub introduces itself: the engine answers with EngineInfo at `address`."""

    client: str
    address: str
    pid: int


class Bye(msgspec.Struct, tag=True):
    """A stub leaves; its requests are aborted."""

    client: str


class Submit(msgspec.Struct, tag=True):
    """A new request. `arrival` is time.monotonic(), which all processes of a machine share.

    `judged`: the stub has found that its first token can come in time (`backend.engine.admission`).
    """

    client: str
    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    arrival: float
    judged: bool = False


class Abort(msgspec.Struct, tag=True):
    """End a request, or one of its sequences; nothing is answered."""

    client: str
    request_id: int
    index: int | None = None


class Served(msgspec.Struct, tag=True):
    """Latencies of responses that a stub has handed to Triton since its last such message, and what it has refused.

    `gaps` are (seconds since the response before, tokens that came with it): so many inter-token latencies of the quotient.
    `refused` are the prompt tokens of each request that the stub refused early, which the engine never sees.
    """

    ttft_s: list[float]
    gaps: list[tuple[float, int]]
    refused: list[int] = []


class EngineInfo(msgspec.Struct, tag=True):
    """What a stub must know to check and tokenise requests."""

    generation: int
    vocab_size: int
    max_model_len: int


class Outputs(msgspec.Struct, tag=True):
    """What a step (or a refusal) means for one stub's requests."""

    tokens: list[TokenOutput]
    ended: list[RequestEnded]
    settings_version: int


class Stats(msgspec.Struct, tag=True):
    """Sent to every stub twice a second. Counters count from the engine's start; `client_*` are this stub's requests."""

    num_preemptions: int
    prefix_hit_tokens: int
    kv_usage_ratio: float
    client_running: int
    client_waiting: int
    load: int
    threshold_prefill: float
    threshold_decode: float
    active_slots: float
    united_share: float
    #: ExpertTelemetry by field.
    experts: dict[str, float]


ToEngine = Hello | Bye | Submit | Abort | Served
ToStub = EngineInfo | Outputs | Stats

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_stub = msgspec.msgpack.Decoder(ToStub).decode


class EngineRecord(msgspec.Struct):
    """State of an engine, as its file says."""

    state: Literal["starting", "ready", "stopped", "restarting", "failed"]
    generation: int = 0
    pid: int = 0
    address: str = ""
    #: The configuration it was started with: a stub with another one refuses to use it.
    config: dict = {}
    error: str = ""

    @staticmethod
    def path(runtime_dir: Path, index: int) -> Path:
        return runtime_dir / f"engine-{index}.json"

    def write(self, runtime_dir: Path, index: int) -> None:
        replace_file(self.path(runtime_dir, index), msgspec.json.encode(self))

    @classmethod
    def read(cls, runtime_dir: Path, index: int) -> EngineRecord | None:
        try:
            return msgspec.json.decode(cls.path(runtime_dir, index).read_bytes(), type=cls)
        except FileNotFoundError:
            return None


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old or the new contents, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def give_up(runtime_dir: Path, reason: str) -> None:
    """Tell the launcher that this stub's engine has failed for good."""
    replace_file(runtime_dir / f"given-up-{os.getpid()}", reason.encode())


def given_up(runtime_dir: Path) -> str | None:
    """Why a stub has given its engine up, if one has."""
    return next((path.read_text() for path in runtime_dir.glob("given-up-*")), None)


class ProcessWatch:
    """Tells whether a process still lives; a zombie does not, nor does a later process with the same number."""

    def __init__(self, pid: int) -> None:
        try:
            self._process: psutil.Process | None = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._process = None

    def alive(self) -> bool:
        try:
            return (
                self._process is not None
                and self._process.is_running()
                and self._process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return False


def runtime_dir() -> Path:
    """The directory shared by this server's processes: the launcher's, else one per server process."""
    given = os.environ.get(RUNTIME_DIR_ENV)
    path = Path(given) if given else Path(tempfile.gettempdir()) / f"brownoutserve-{os.getuid()}-{os.getppid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
