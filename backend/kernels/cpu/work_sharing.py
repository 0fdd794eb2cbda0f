"""How the threads of a kernel share its work: each does its own part, then helps with what is left of the others'.

Its own part is the same in every call and a long stretch of memory. The help matters when something else takes a core for a
moment (the server, its stubs): the thread on it then holds up one job instead of half of the kernel.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from backend.kernels.cpu.compiled import kernel

#: Numbers in a cache line: each part's counter has one of its own.
_LINE = 8
#: Jobs that a part has at least, if its matrices are large enough.
_JOBS = 8


@intrinsic
def _claim(_context, counters, index):
    """counters[index] (int64) before it is raised by one, atomically."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = cgutils.gep_inbounds(builder, array.data, arguments[1])
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counters, types.int64), generate


@kernel
def new_shares(parts):
    """Counters of the jobs taken from each part; new ones for each loop over jobs."""
    return np.zeros(parts * _LINE, np.int64)


@kernel
def next_job(shares, thread, jobs):
    """A job that nobody has taken: `part * jobs + its number in the part`, or -1 when all are; each part has `jobs` of them."""
    parts = shares.shape[0] // _LINE
    for turn in range(parts):
        part = (thread + turn) % parts
        job = _claim(shares, part * _LINE)
        if job < jobs:
            return part * jobs + job
    return np.int64(-1)


@kernel
def pieces_of(matrices):
    """Into how many jobs a part's rows of each of so many matrices are cut."""
    return max(1, _JOBS // max(1, matrices))


@kernel
def job_of(job, matrices, pieces):
    """The matrix of a job among `matrices * pieces` in each part, and its place among all parts' pieces of that matrix."""
    part, number = job // (matrices * pieces), job % (matrices * pieces)
    return number // pieces, part * pieces + number % pieces


@kernel
def rows_of(piece, pieces, rows, multiple):
    """First and last + 1 of `rows` that are in one of so many pieces of about equal size, cut at multiples of `multiple`."""
    groups = (rows + multiple - 1) // multiple
    span = (groups + pieces - 1) // pieces * multiple
    return min(rows, piece * span), min(rows, (piece + 1) * span)
