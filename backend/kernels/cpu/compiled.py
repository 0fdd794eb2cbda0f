"""What the compiled CPU kernels share: how they are compiled, 16-bit weights as numbers, and the innermost loops.

Numba compiles them at first use and keeps the machine code, so no compiler is needed where the product runs.
"""

from __future__ import annotations

from functools import partial

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic
from torch import Tensor

# Whatever the user has set (NUMBA_…) holds. LLVM prefers 256-bit vectors on processors that have 512-bit ones; in these loops
# the wide ones are faster. And numba's own thread pool ends the process when two threads enter it at once; OpenMP's does not.
# Set here and not in the environment, which counts only until numba is first imported and is inherited by other processes.
config.CPU_NAME = config.CPU_NAME or llvm.get_host_cpu_name()
config.CPU_FEATURES = config.CPU_FEATURES or llvm.get_host_cpu_features().flatten() + ",-prefer-256-bit"
config.THREADING_LAYER = "omp" if config.THREADING_LAYER == "default" else config.THREADING_LAYER

#: Sums may be reordered; NaN and infinity keep their meaning.
FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}
# Division by zero gives infinity, as in numpy: a check for it would keep loops from becoming vectors.
kernel = partial(njit, fastmath=FAST_MATH, error_model="numpy", cache=True)
#: Sums in the order written and no fused multiply-add: the same bits as the reference.
exact_kernel = partial(njit, error_model="numpy", cache=True)
parallel_kernel = partial(njit, fastmath=FAST_MATH, error_model="numpy", cache=True, parallel=True, nogil=True)

ZERO, ONE = np.float32(0.0), np.float32(1.0)
#: Numbers up to which a pass over them is done by one thread: waking the others takes longer.
FEW_NUMBERS = 2**16


def as_array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array that kernels take: bfloat16 as uint16, float16 as int16, others as they are."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    if tensor.dtype == torch.float16:
        return tensor.view(torch.int16).numpy()
    return tensor.numpy()


def words(tensor: Tensor) -> np.ndarray:
    """A contiguous tensor's memory as uint32: 16-bit numbers in pairs."""
    return tensor.view(torch.int32).numpy().view(np.uint32)


@intrinsic
def widen(_context, value):
    """A stored number (see as_array) as float32."""
    if value not in (types.uint16, types.int16, types.float32):
        raise TypeError(f"numbers of type {value} are not supported")

    def generate(_target, builder, _signature, arguments):
        (bits,) = arguments
        if value == types.uint16:
            wide = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(wide, ir.FloatType())
        if value == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        return bits

    return types.float32(value), generate


@intrinsic
def _float_of_bits(_context, bits):
    """The float32 with these bits (int32)."""

    def generate(_target, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693145752), np.float32(1.42860677e-06)
#: exp(r) - 1 - r - r^2 / 2 for |r| <= ln(2) / 2, by r^3 …
_C3, _C4, _C5, _C6 = np.float32(0.166666657), np.float32(0.0416669), np.float32(0.00833256), np.float32(0.00138888)
_HALF, _SMALLEST, _LARGEST = np.float32(0.5), np.float32(-87.0), np.float32(88.0)


@kernel
def exp(x):
    """e to the float32 x to 3e-7; below -87 the result is that of -87, above 88 that of 88. Loops over it become vectors."""
    x = min(max(x, _SMALLEST), _LARGEST)
    n = np.floor(x * _LOG2_E + _HALF)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = ONE + r * (ONE + r * (_HALF + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))))
    return p * _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


# Two rows of weights against 8, 4 or 1 rows of x: enough sums at once to keep the multipliers busy, few enough for the
# registers. Written out, because LLVM keeps scalars in registers and small arrays in memory.


@kernel
def dot_2x8(v, w, x, t):
    """v, w [M] weights and rows t … t+7 of x [T, M] -> the 8 dot products with v, then those with w."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x[t], x[t + 1], x[t + 2], x[t + 3], x[t + 4], x[t + 5], x[t + 6], x[t + 7]
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = ZERO
    b0 = b1 = b2 = b3 = b4 = b5 = b6 = b7 = ZERO
    for m in range(v.shape[0]):
        p, q = widen(v[m]), widen(w[m])
        a0 += p * x0[m]
        a1 += p * x1[m]
        a2 += p * x2[m]
        a3 += p * x3[m]
        a4 += p * x4[m]
        a5 += p * x5[m]
        a6 += p * x6[m]
        a7 += p * x7[m]
        b0 += q * x0[m]
        b1 += q * x1[m]
        b2 += q * x2[m]
        b3 += q * x3[m]
        b4 += q * x4[m]
        b5 += q * x5[m]
        b6 += q * x6[m]
        b7 += q * x7[m]
    return a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7


@kernel
def dot_2x4(v, w, x, t):
    """As dot_2x8, for rows t … t+3 of x."""
    x0, x1, x2, x3 = x[t], x[t + 1], x[t + 2], x[t + 3]
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = ZERO
    for m in range(v.shape[0]):
        p, q = widen(v[m]), widen(w[m])
        a0 += p * x0[m]
        a1 += p * x1[m]
        a2 += p * x2[m]
        a3 += p * x3[m]
        b0 += q * x0[m]
        b1 += q * x1[m]
        b2 += q * x2[m]
        b3 += q * x3[m]
    return a0, a1, a2, a3, b0, b1, b2, b3


@kernel
def dot_2x1(v, w, x, t):
    """As dot_2x8, for row t of x."""
    x0 = x[t]
    a0 = b0 = ZERO
    for m in range(v.shape[0]):
        a0 += widen(v[m]) * x0[m]
        b0 += widen(w[m]) * x0[m]
    return a0, b0


@kernel
def two_rows(v, w, x, begin, end, a, b):
    """a[t - begin], b[t - begin] = v·x[t], w·x[t] for begin <= t < end; a and b are scratch of at least that length."""
    t = begin
    while t + 8 <= end:
        d = dot_2x8(v, w, x, t)
        i = t - begin
        a[i], a[i + 1], a[i + 2], a[i + 3] = d[0], d[1], d[2], d[3]
        a[i + 4], a[i + 5], a[i + 6], a[i + 7] = d[4], d[5], d[6], d[7]
        b[i], b[i + 1], b[i + 2], b[i + 3] = d[8], d[9], d[10], d[11]
        b[i + 4], b[i + 5], b[i + 6], b[i + 7] = d[12], d[13], d[14], d[15]
        t += 8
    while t + 4 <= end:
        e = dot_2x4(v, w, x, t)
        i = t - begin
        a[i], a[i + 1], a[i + 2], a[i + 3] = e[0], e[1], e[2], e[3]
        b[i], b[i + 1], b[i + 2], b[i + 3] = e[4], e[5], e[6], e[7]
        t += 4
    while t < end:
        a[t - begin], b[t - begin] = dot_2x1(v, w, x, t)
        t += 1
