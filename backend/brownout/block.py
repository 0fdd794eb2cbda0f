"""The memory-mapped block that carries settings to the engines and telemetry back.

    header | settings (written by the control plane) | telemetry, then queue of engine 0, 1, … (each written by its engine)

Every section has one writer. It is guarded by a sequence number, odd while it is being written, and a CRC: a reader gets all
of it or a BlockError, never a mixture. Times are time.monotonic(), which all processes of a machine share.

The file is made by whichever side comes first, for one server process: one of an earlier server is replaced. A file that was
removed or replaced while it was mapped is noticed and opened (or made) again.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from backend.brownout.buckets import NUM_BUCKETS

BLOCK_ENV = "BROWNOUT_BLOCK"
BLOCK_NAME = "brownout.block"
MAX_ENGINES = 64
MAX_LAYERS = 256
#: Steps whose features are kept for fitting; a reader that comes less often misses some.
MAX_STEPS = 128

_MAGIC = b"BRWNOUT1"
_ATTEMPTS = 50
_RETRY_S = 20e-6

HEADER = np.dtype([("magic", "S8"), ("size", "<u8"), ("server_pid", "<u8"), ("server_start_ticks", "<u8")])

_VALUES = [
    ("threshold_prefill", "<f8"),
    ("threshold_decode", "<f8"),
    ("similarity_min", "<f8"),
    ("resident_share", "<f8"),
    ("way", "<i8"),
    ("mechanism", "S16"),
]

#: While the lease lives, `values` hold with `version`; from its end on `baseline` with `version + 1`.
SETTINGS = np.dtype(
    [
        ("version", "<i8"),
        ("values", _VALUES),
        ("baseline", _VALUES),
        ("owner", "S128"),
        ("lease_end_s", "<f8"),
        ("floor", "<f8"),
    ]
)

STEP = np.dtype(
    [
        ("seconds", "<f4"),
        ("prefill_tokens", "<i4"),
        ("decode_tokens", "<i4"),
        ("threshold_prefill", "<f4"),
        ("threshold_decode", "<f4"),
    ]
)

#: Counters count from the engine's start; bucket counts are those of `backend.brownout.buckets`.
TELEMETRY = np.dtype(
    [
        ("time_s", "<f8"),
        ("pid", "<i8"),
        ("generation", "<i8"),
        ("ways", "<u8"),  # bit w: united experts of way w are loaded; a way of 64 is bit 0
        ("similarity", "<i8"),
        ("missing_experts", "<i8"),
        ("resident", "<i8"),
        ("settings_version", "<i8"),
        ("threshold_prefill", "<f8"),
        ("threshold_decode", "<f8"),
        ("settings_error", "S256"),
        ("num_steps", "<i8"),
        ("prefill_tokens", "<i8"),
        ("decode_tokens", "<i8"),
        ("requests", "<i8"),
        ("prompt_tokens", "<i8"),
        ("sequences_finished", "<i8"),
        ("requests_shed", "<i8"),
        ("preemptions", "<i8"),
        ("mean_output_tokens", "<f8"),
        ("requests_running", "<i8"),
        ("requests_waiting", "<i8"),
        ("waiting_tokens", "<i8"),
        ("oldest_waiting_s", "<f8"),
        ("kv_usage_ratio", "<f8"),
        ("max_batch_tokens", "<i8"),
        ("max_running", "<i8"),
        ("assignments_per_token", "<f8"),
        ("united_share", "<f8"),
        ("max_gap_s", "<f8"),
        # Of a resident or worker pool; see backend.experts.telemetry.ExpertTelemetry.
        ("resident_share", "<f8"),
        ("expert_misses", "<i8"),
        ("expert_stalls", "<i8"),
        ("expert_stall_s", "<f8"),
        ("expert_prefetches", "<i8"),
        ("expert_prefetch_hits", "<i8"),
        ("expert_bytes_moved", "<i8"),
        ("expert_workers", "<i8"),
        ("expert_workers_lost", "<i8"),
        ("expert_workers_relieved", "<i8"),
        ("expert_layers_redone", "<i8"),
        ("expert_plan_changes", "<i8"),
        ("expert_bytes_exchanged", "<i8"),
        ("expert_warm", "<i8"),
        ("expert_loading", "<i8"),
        ("expert_cold", "<i8"),
        ("expert_loads", "<i8"),
        ("expert_failures", "<i8"),
        ("expert_evictions", "<i8"),
        ("expert_refusals", "<i8"),
        ("expert_slot_byte_s", "<f8"),
        ("expert_always_on_byte_s", "<f8"),
        ("num_layers", "<i8"),
        ("active_slots", "<f4", (MAX_LAYERS,)),
        ("prefill_step_counts", "<u8", (NUM_BUCKETS,)),
        ("decode_step_counts", "<u8", (NUM_BUCKETS,)),
        ("ttft_counts", "<u8", (NUM_BUCKETS,)),
        ("itl_counts", "<u8", (NUM_BUCKETS,)),
        ("steps", STEP, (MAX_STEPS,)),
    ]
)

#: Fields of `backend.engine.admission.QueueState`.
QUEUE = np.dtype(
    [
        ("generation", "<i8"),
        ("seen_s", "<f8"),
        ("ready_s", "<f8"),
        ("tokens", "<i8"),
        ("waiting", "<i8"),
        ("max_priority", "<i8"),
        ("any_auto", "?"),
        ("allowed_s", "<f8"),
        ("request_s", "<f8"),
        (
            "pace",
            [
                ("chunk", "<i8"),
                ("one_s", "<f8"),
                ("token_s", "<f8"),
                ("full_s", "<f8"),
                ("free", "<i8"),
                ("finish_s", "<f8"),
            ],
        ),
    ]
)

_GUARD = np.dtype([("sequence", "<u8"), ("checksum", "<u8")])


class BlockError(RuntimeError):
    """A section of the block cannot be read: never written, being written all the time, or damaged. Hold what is in force."""


class BlockEmpty(BlockError):
    """The section has not been written yet."""


def block_path(runtime_dir: Path) -> Path:
    """Where this server's block is: named by the environment, else in its runtime directory."""
    given = os.environ.get(BLOCK_ENV)
    return Path(given) if given else runtime_dir / BLOCK_NAME


class Block:
    """One process's mapping of the block. Not thread-safe; each section is to be written by one process."""

    def __init__(self, path: Path, server_pid: int) -> None:
        """Open the block of this server process, or make it."""
        self.path = path
        self._server_pid = server_pid
        self._map: mmap.mmap
        self._file: int
        self._openings = 0
        self._open()

    def close(self) -> None:
        self._map.close()
        os.close(self._file)

    # --- sections ------------------------------------------------------------------------------------------------

    def read_settings(self) -> np.void:
        """A copy of the settings section (SETTINGS). Raises BlockError."""
        return self._read("settings", _SETTINGS_AT, SETTINGS)

    def write_settings(self, record: np.ndarray) -> None:
        """`record`: shape [1] of SETTINGS."""
        self._write(_SETTINGS_AT, record)

    def read_telemetry(self, engine: int) -> np.void:
        """A copy of an engine's section (TELEMETRY). Raises BlockError."""
        return self._read(f"telemetry of engine {engine}", _telemetry_at(engine), TELEMETRY)

    def write_telemetry(self, engine: int, record: np.ndarray) -> None:
        """`record`: shape [1] of TELEMETRY."""
        self._write(_telemetry_at(engine), record)

    def read_queue(self, engine: int) -> np.void:
        """A copy of what an engine says of its queue (QUEUE). Raises BlockError."""
        return self._read(f"queue of engine {engine}", _queue_at(engine), QUEUE)

    def queue_sequence(self, engine: int) -> tuple[int, bytes]:
        """Changes whenever what an engine says of its queue does; cheap. (Openings of the file, number.)"""
        self._check()
        at = _queue_at(engine)
        return self._openings, self._map[at : at + 8]

    def write_queue(self, engine: int, record: np.ndarray) -> None:
        """`record`: shape [1] of QUEUE."""
        self._write(_queue_at(engine), record)

    def settings_sequence(self) -> tuple[int, int]:
        """Changes whenever the settings section does: the cheap question, once a step. (Openings of the file, number.)"""
        self._check()
        return self._openings, int.from_bytes(self._map[_SETTINGS_AT : _SETTINGS_AT + 8], "little")

    # --- the file ------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        lock_path = self.path.with_name(self.path.name + ".lock")
        with open(lock_path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            identity = _identity(self._server_pid)
            if not _is_block(self.path, identity):
                _make(self.path, identity)
            self._file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        self._map = mmap.mmap(self._file, _SIZE)
        self._openings += 1

    def _check(self) -> None:
        """Open anew if the file has gone. Also, touching a mapped page that the file no longer has would be fatal."""
        status = os.fstat(self._file)
        if status.st_nlink == 0 or status.st_size < _SIZE:
            self.close()
            self._open()

    def _read(self, name: str, at: int, dtype: np.dtype) -> np.void:
        self._check()
        end = at + _GUARD.itemsize + dtype.itemsize
        reason = "is being written all the time"
        for _ in range(_ATTEMPTS):
            data = self._map[at:end]
            sequence = int.from_bytes(data[:8], "little")
            if sequence == 0:
                raise BlockEmpty(f"the {name} has not been written yet ({self.path})")
            if sequence % 2 == 0 and data[:8] == self._map[at : at + 8]:
                payload = data[_GUARD.itemsize :]
                if zlib.crc32(payload) == int.from_bytes(data[8:16], "little"):
                    return np.frombuffer(payload, dtype)[0]
                reason = "is damaged (checksum)"
            time.sleep(_RETRY_S)
        raise BlockError(f"the {name} in {self.path} {reason}")

    def _write(self, at: int, record: np.ndarray) -> None:
        self._check()
        payload = record.tobytes()
        sequence = int.from_bytes(self._map[at : at + 8], "little") | 1  # odd already if a writer died half-way
        start = at + _GUARD.itemsize
        self._map[at : at + 8] = sequence.to_bytes(8, "little")
        self._map[start : start + len(payload)] = payload
        self._map[at + 8 : at + 16] = zlib.crc32(payload).to_bytes(8, "little")
        self._map[at : at + 8] = ((sequence + 1) % 2**64 or 2).to_bytes(8, "little")


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


_SETTINGS_AT = _aligned(HEADER.itemsize)
_TELEMETRY_AT = _SETTINGS_AT + _aligned(_GUARD.itemsize + SETTINGS.itemsize)
_TELEMETRY_SIZE = _aligned(_GUARD.itemsize + TELEMETRY.itemsize)
_QUEUE_SIZE = _aligned(_GUARD.itemsize + QUEUE.itemsize)
_QUEUE_AT = _TELEMETRY_AT + MAX_ENGINES * _TELEMETRY_SIZE
_SIZE = _QUEUE_AT + MAX_ENGINES * _QUEUE_SIZE


def _telemetry_at(engine: int) -> int:
    return _TELEMETRY_AT + _checked(engine) * _TELEMETRY_SIZE


def _queue_at(engine: int) -> int:
    return _QUEUE_AT + _checked(engine) * _QUEUE_SIZE


def _checked(engine: int) -> int:
    if not 0 <= engine < MAX_ENGINES:
        raise ValueError(f"the block has room for engines 0 to {MAX_ENGINES - 1}, not {engine}")
    return engine


def _identity(server_pid: int) -> bytes:
    """The header of this server's block: process numbers are used again, start times with them are not.

    The start time is the kernel's, in ticks since the machine started: one in time of day would be another one after the
    clock was set, and each process that opens the block would make it anew.
    """
    try:
        after_name = Path(f"/proc/{server_pid}/stat").read_text().rpartition(")")[2]
        start_ticks = int(after_name.split()[19])
    except (FileNotFoundError, ProcessLookupError):
        start_ticks = 0
    header = np.zeros(1, HEADER)
    header[0] = (_MAGIC, _SIZE, server_pid, start_ticks)
    return header.tobytes()


def _is_block(path: Path, identity: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size == _SIZE and file.read(len(identity)) == identity
    except FileNotFoundError:
        return False


def _make(path: Path, identity: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        file.write(identity)
        file.truncate(_SIZE)
    os.replace(temporary, path)
