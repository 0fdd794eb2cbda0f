"""What pools of experts count."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class FunctionTelemetry:
    """What expert functions do, counted alike by the simulator and by the pools of a running engine."""

    #: As of now: copies that serve, copies on their way, and experts of which there is neither.
    warm: int = 0
    loading: int = 0
    cold: int = 0
    #: Since the start: loads begun, and those of them that failed.
    loads: int = 0
    failures: int = 0
    #: Warm copies that gave way: to others, to a smaller share of memory, or with the worker that held them.
    evictions: int = 0
    #: Warm copies that were idle for the keep-alive time.
    expiries: int = 0
    #: Copies, or whole plans of a worker pool, for which there was no room.
    refusals: int = 0
    #: Bytes of memory for copies, loading included, times seconds; and what one warm copy of each expert would have taken.
    slot_byte_s: float = 0.0
    always_on_byte_s: float = 0.0


@dataclass
class ExpertTelemetry(FunctionTelemetry):
    """Totals since the start, over all layers. A resident pool pays for all slots in use; no pool lets idle copies expire."""

    #: Share of the experts that can serve now.
    resident_share: float = 1.0
    #: Assignments whose own expert was missing and which others served.
    misses: int = 0
    #: Layers of steps that waited for weights, and how long in all.
    stalls: int = 0
    stall_s: float = 0.0
    #: Experts fetched ahead; those of them that were then used before they had to go.
    prefetches: int = 0
    prefetch_hits: int = 0
    #: Bytes copied into slots since the model was loaded.
    bytes_moved: int = 0
    #: Assignments in all.
    assignments: int = 0
    #: Workers that take part now; workers that were lost or too slow and had others take their place.
    workers: int = 0
    workers_lost: int = 0
    workers_relieved: int = 0
    #: Layers of steps of which a part was done again, and changes of what the workers hold.
    redone: int = 0
    plan_changes: int = 0
    #: Bytes of tokens and results sent to workers and received.
    bytes_exchanged: int = 0
