"""Dot products in bfloat16 with the processor's own instruction: two products and a float32 sum per lane at once.

Where it exists (AVX-512 BF16) arithmetic runs at twice the rate of float32, and weights need no widening. Both sides are
bfloat16 bits in uint16 arrays; a row's length must be a multiple of `LANES`.
"""

from __future__ import annotations

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

from backend.kernels.cpu.compiled import FAST_MATH, kernel, two_rows

#: Numbers that one instruction multiplies.
LANES = 32
#: Sums that it makes of them.
SUMS = 16
#: Weights are fetched so many numbers before their use: the processor alone fetches too late.
_AHEAD = 3072

FLOAT, BITS, WORD, INDEX = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
SUM_VECTOR, BITS_VECTOR = ir.VectorType(FLOAT, SUMS), ir.VectorType(BITS, LANES)
_EVEN, _ODD = list(range(0, 2 * SUMS, 2)), list(range(1, 2 * SUMS, 2))


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"


NUMBER_VECTOR = ir.VectorType(_BFloat16(), LANES)


def multiplies(weight: Tensor) -> bool:
    """Whether this processor multiplies bfloat16 and these weights [..., out, in] are made for it."""
    fits = weight.dtype == torch.bfloat16 and weight.shape[-1] % LANES == 0
    return fits and torch.cpu._is_avx512_bf16_supported()


def _rounded(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A float32 rounded to the nearest bfloat16 (ties to even): its bits are the upper half of an integer of 32 bits."""
    bits = builder.bitcast(value, WORD)
    odd = builder.and_(builder.lshr(bits, ir.Constant(WORD, 16)), ir.Constant(WORD, 1))
    return builder.add(bits, builder.add(odd, ir.Constant(WORD, 0x7FFF)))


@intrinsic
def narrow(_context, value):
    """A float32 rounded to the nearest bfloat16, as bits in uint16."""

    def generate(_target, builder, _signature, arguments):
        return builder.trunc(builder.lshr(_rounded(builder, arguments[0]), ir.Constant(WORD, 16)), BITS)

    return types.uint16(types.float32), generate


@intrinsic
def narrow_two(_context, low, high):
    """Two float32 as `narrow` rounds them, side by side in a uint32. Loops over it become vectors."""

    def generate(_target, builder, _signature, arguments):
        low, high = (_rounded(builder, value) for value in arguments)
        return builder.or_(builder.lshr(low, ir.Constant(WORD, 16)), builder.and_(high, ir.Constant(WORD, 0xFFFF0000)))

    return types.uint32(types.float32, types.float32), generate


def array_of(context, builder, kind, value):
    """The fields of an array of this numba type."""
    return cgutils.create_struct_proxy(kind)(context, builder, value=value)


def product_of(builder: ir.IRBuilder) -> ir.Function:
    """The instruction: sums [16] float32, two vectors of 32 numbers -> the sums plus the products, two to a sum."""
    kind = ir.FunctionType(SUM_VECTOR, [SUM_VECTOR, NUMBER_VECTOR, NUMBER_VECTOR])
    return cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")


def prefetch(builder: ir.IRBuilder, pointer: ir.Value) -> None:
    """Have the cache line at a pointer fetched into the second-level cache; the address need not exist."""
    byte_pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte_pointer, flag, flag, flag])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # For reading, into the second-level cache, data.
    builder.call(function, [builder.bitcast(pointer, byte_pointer), *(ir.Constant(flag, i) for i in (0, 2, 1))])


def _rows_against(count: int):
    """The kernel of two weight rows against `count` (1, 2, 4 or 8) rows of x."""

    @intrinsic
    def dot_2xn(_context, v, w, x, t, a, b, i):
        """a[i …] = v · x[t …] and b[i …] = w · x[t …] for `count` rows; v, w [M], x [T, M] contiguous, a, b float32."""

        def generate(context, builder, signature, arguments):
            arrays = [
                array_of(context, builder, kind, value)
                for kind, value in zip(signature.args, arguments, strict=True)
                if isinstance(kind, types.Array)
            ]
            v_array, w_array, x_array, a_array, b_array = arrays
            t_value, i_value = arguments[3], arguments[6]
            length = builder.extract_value(v_array.shape, 0)
            first = builder.mul(t_value, length)
            starts = [
                builder.gep(x_array.data, [builder.add(first, builder.mul(length, ir.Constant(INDEX, row)))])
                for row in range(count)
            ]
            sums = _loop(builder, v_array.data, w_array.data, starts, length)
            found = totals(builder, sums)
            for part, array in ((0, a_array), (1, b_array)):
                lanes = ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(part * count, (part + 1) * count)))
                chosen = builder.shuffle_vector(found, found, lanes)
                target = builder.gep(array.data, [i_value])
                builder.store(chosen, builder.bitcast(target, chosen.type.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(v, w, x, types.intp, a, b, types.intp), generate

    return dot_2xn


def _loop(builder: ir.IRBuilder, v, w, rows, length):
    """The partial sums of v with each row, then of w with each: the loop over the rows' length."""
    product = product_of(builder)

    def load(start, at):
        pointer = builder.bitcast(builder.gep(start, [at]), BITS_VECTOR.as_pointer())
        return builder.bitcast(builder.load(pointer, align=2), NUMBER_VECTOR)

    def fetch(start, at):
        prefetch(builder, builder.gep(start, [builder.add(at, ir.Constant(INDEX, _AHEAD))]))

    before = builder.block
    body, after = builder.append_basic_block("dots"), builder.append_basic_block("dots.end")
    zero = ir.Constant(SUM_VECTOR, [0.0] * SUMS)
    builder.branch(body)
    builder.position_at_end(body)
    at = builder.phi(INDEX)
    at.add_incoming(ir.Constant(INDEX, 0), before)
    sums = [builder.phi(SUM_VECTOR) for _ in range(2 * len(rows))]
    for value in sums:
        value.add_incoming(zero, before)
    fetch(v, at)
    fetch(w, at)
    v_part, w_part = load(v, at), load(w, at)
    parts = [load(row, at) for row in rows]
    new = [builder.call(product, [s, v_part, part]) for s, part in zip(sums, parts, strict=False)]
    new += [builder.call(product, [s, w_part, part]) for s, part in zip(sums[len(rows) :], parts, strict=True)]
    following = builder.add(at, ir.Constant(INDEX, LANES))
    at.add_incoming(following, body)
    for value, update in zip(sums, new, strict=True):
        value.add_incoming(update, body)
    builder.cbranch(builder.icmp_signed("<", following, length), body, after)
    builder.position_at_end(after)
    return new


def totals(builder: ir.IRBuilder, sums):
    """One vector with each partial sum's total, in order: neighbours are added in pairs until one lane is left of each."""
    mask_type = ir.VectorType(ir.IntType(32), SUMS)
    even, odd = ir.Constant(mask_type, _EVEN), ir.Constant(mask_type, _ODD)
    lanes = SUMS
    while lanes > 1:
        pairs = zip(sums[::2], sums[1::2], strict=True) if len(sums) > 1 else [(sums[0], sums[0])]
        sums = [builder.fadd(builder.shuffle_vector(p, q, even), builder.shuffle_vector(p, q, odd)) for p, q in pairs]
        lanes //= 2
    return sums[0]


dot_2x8, dot_2x4, dot_2x2, dot_2x1 = _rows_against(8), _rows_against(4), _rows_against(2), _rows_against(1)


@kernel
def two_bfloat16_rows(v, w, x, begin, end, a, b):
    """`compiled.two_rows` for bfloat16 on both sides: a[t - begin], b[t - begin] = v·x[t], w·x[t] for begin <= t < end."""
    t = begin
    while t + 8 <= end:
        dot_2x8(v, w, x, t, a, b, t - begin)
        t += 8
    if t + 4 <= end:
        dot_2x4(v, w, x, t, a, b, t - begin)
        t += 4
    if t + 2 <= end:
        dot_2x2(v, w, x, t, a, b, t - begin)
        t += 2
    if t < end:
        dot_2x1(v, w, x, t, a, b, t - begin)


def rows_times(v, w, x, begin, end, a, b):
    """In compiled code: `two_rows` or `two_bfloat16_rows`, whichever x's type asks for."""
    raise NotImplementedError("for compiled code only")


@overload(rows_times, jit_options={"fastmath": FAST_MATH})
def _rows_times(v, w, x, begin, end, a, b):
    chosen = two_bfloat16_rows if x.dtype == types.uint16 else two_rows

    def implementation(v, w, x, begin, end, a, b):
        chosen(v, w, x, begin, end, a, b)

    return implementation


def put(array, i, r, value):
    """In compiled code: array[i, r] = the float32 value, rounded where the array holds bfloat16."""
    raise NotImplementedError("for compiled code only")


@overload(put, jit_options={"fastmath": FAST_MATH}, inline="always")
def _put(array, i, r, value):
    if array.dtype == types.uint16:

        def implementation(array, i, r, value):
            array[i, r] = narrow(value)
    else:

        def implementation(array, i, r, value):
            array[i, r] = value

    return implementation
