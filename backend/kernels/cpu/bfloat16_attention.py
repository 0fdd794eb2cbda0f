"""Attention over a paged cache in bfloat16 with the processor's own instruction, sixteen tokens of one head at a time.

Keys and values are read as they lie: rows of a head, a fixed stride apart. As in `bfloat16`, numbers are bits in uint16 arrays
and a head's length must be a multiple of `LANES`.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from backend.kernels.cpu.bfloat16 import (
    BITS,
    BITS_VECTOR,
    FLOAT,
    INDEX,
    LANES,
    NUMBER_VECTOR,
    SUM_VECTOR,
    SUMS,
    array_of,
    prefetch,
    product_of,
    totals,
)

#: Tokens that are taken together.
TOKENS = 16

_MASK = ir.VectorType(ir.IntType(32), SUMS)
_PAIRS_MASK = ir.VectorType(ir.IntType(32), LANES)
# Two tokens' values are interleaved within each 128 bits, which is one cheap instruction for the lower halves and one for the
# upper ones. So sums of 32 dimensions are kept as those of the lower and those of the upper halves.
_LOWER = [lane for first in range(0, LANES, 8) for lane in range(first, first + 4)]
_UPPER = [lane + 4 for lane in _LOWER]
_BACK = sorted(range(LANES), key=lambda at: (_LOWER + _UPPER)[at])


def _constant(lanes):
    return ir.Constant(_MASK, lanes)


def _at(builder, array, *indices):
    """Pointer to the array's element (or row) at the indices, of which None counts as 0.

    By arithmetic and not by slices: those count references, in memory that all threads would write to.
    """
    place = builder.bitcast(array.data, ir.IntType(8).as_pointer())
    for axis, index in enumerate(indices):
        if index is not None:
            place = builder.gep(place, [builder.mul(index, builder.extract_value(array.strides, axis))])
    return place


def _rows(builder, array, block, following, first, last, g):
    """Pointers to head g of tokens first … first + 15 of a block of [N, C, G, D]; those from `last` on are its last token's.

    And the distance from them to the same tokens of the `following` block.
    """
    base = _at(builder, array, block, None, g)
    distance = builder.mul(builder.sub(following, block), builder.extract_value(array.strides, 0))
    token_bytes = builder.extract_value(array.strides, 1)
    end = builder.sub(last, ir.Constant(INDEX, 1))
    rows = []
    for i in range(TOKENS):
        token = builder.add(first, ir.Constant(INDEX, i))
        token = builder.select(builder.icmp_signed("<", token, end), token, end)
        row = builder.gep(base, [builder.mul(token, token_bytes)])
        rows.append(builder.bitcast(row, BITS.as_pointer()))
    return rows, builder.ashr(distance, ir.Constant(INDEX, 1))


def _fetch(builder, rows, at, ahead):
    """A block's memory begins anywhere, so the processor does not fetch it by itself."""
    place = builder.add(at, ahead)
    for row in rows:
        prefetch(builder, builder.gep(row, [place]))


def _load(builder, start, at, kind):
    return builder.load(builder.bitcast(builder.gep(start, [at]), kind.as_pointer()), align=2)


def _loop_over_lanes(builder, length, initial, body):
    """Call body(at, values) for at = 0, LANES, … below `length`; it returns the next values. Returns the last ones."""
    before = builder.block
    block, after = builder.append_basic_block("dimensions"), builder.append_basic_block("dimensions.end")
    builder.branch(block)
    builder.position_at_end(block)
    at = builder.phi(INDEX)
    at.add_incoming(ir.Constant(INDEX, 0), before)
    values = [builder.phi(value.type) for value in initial]
    for phi, value in zip(values, initial, strict=True):
        phi.add_incoming(value, before)
    new = body(at, values)
    following = builder.add(at, ir.Constant(INDEX, LANES))
    at.add_incoming(following, block)
    for phi, value in zip(values, new, strict=True):
        phi.add_incoming(value, block)
    builder.cbranch(builder.icmp_signed("<", following, length), block, after)
    builder.position_at_end(after)
    return new


@intrinsic
def scores_of_tokens(_context, q, s, h, k_cache, block, following, first, last, g, scores, row, at, tops):
    """scores[row, at + i] = q[s, h] · keys of head g at token first + i for i < 16, and tops[row] = the larger ones.

    q is [S, H, D], k_cache [N, C, G, D], tops [rows, 16]; `following` is the block that is read next. From token `last` on the score is that of the one before it.
    """

    def generate(context, builder, signature, arguments):
        q, s, h, k_cache, block, following, first, last, g, scores, row, at, tops = arguments
        q = array_of(context, builder, signature.args[0], q)
        k_cache = array_of(context, builder, signature.args[3], k_cache)
        scores = array_of(context, builder, signature.args[9], scores)
        tops = array_of(context, builder, signature.args[12], tops)
        query = builder.bitcast(_at(builder, q, s, h), BITS.as_pointer())
        rows, ahead = _rows(builder, k_cache, block, following, first, last, g)
        product = product_of(builder)

        def body(d, sums):
            _fetch(builder, rows, d, ahead)
            part = builder.bitcast(_load(builder, query, d, BITS_VECTOR), NUMBER_VECTOR)
            loaded = (builder.bitcast(_load(builder, row, d, BITS_VECTOR), NUMBER_VECTOR) for row in rows)
            return [builder.call(product, [total, part, key]) for total, key in zip(sums, loaded, strict=True)]

        zero = ir.Constant(SUM_VECTOR, [0.0] * SUMS)
        sums = _loop_over_lanes(builder, builder.extract_value(q.shape, 2), [zero] * TOKENS, body)
        found = totals(builder, sums)
        builder.store(found, builder.bitcast(_at(builder, scores, row, at), SUM_VECTOR.as_pointer()), align=4)
        target = builder.bitcast(_at(builder, tops, row), SUM_VECTOR.as_pointer())
        top = builder.load(target, align=4)
        builder.store(builder.select(builder.fcmp_ordered(">", found, top), found, top), target, align=4)
        return context.get_dummy_value()

    index = types.intp
    kinds = (q, index, index, k_cache, index, index, index, index, index, scores, index, index, tops)
    return types.void(*kinds), generate


@intrinsic
def add_values_of_tokens(_context, out, s, h, v_cache, block, following, first, last, g, shares, row, at):
    """out[s, h] += sum over i < 16 of shares[row, at + i] * values of head g at token first + i.

    out [S, H, D] is float32, shares and v_cache [N, C, G, D] are bfloat16; shares of tokens from `last` on must be zero.
    """

    def generate(context, builder, signature, arguments):
        out, s, h, v_cache, block, following, first, last, g, shares, row, at = arguments
        out = array_of(context, builder, signature.args[0], out)
        v_cache = array_of(context, builder, signature.args[3], v_cache)
        shares = array_of(context, builder, signature.args[9], shares)
        attended = builder.bitcast(_at(builder, out, s, h), FLOAT.as_pointer())
        rows, ahead = _rows(builder, v_cache, block, following, first, last, g)
        shares = builder.bitcast(_at(builder, shares, row, at), BITS.as_pointer())
        product = product_of(builder)
        pairs = []
        for i in range(0, TOKENS, 2):
            pair = _load(builder, shares, ir.Constant(INDEX, i), ir.IntType(32))
            one = builder.insert_element(ir.Constant(_MASK, ir.Undefined), pair, ir.Constant(ir.IntType(32), 0))
            pairs.append(builder.bitcast(builder.shuffle_vector(one, one, _constant([0] * SUMS)), NUMBER_VECTOR))
        lower = ir.Constant(_PAIRS_MASK, [part for lane in _LOWER for part in (lane, lane + LANES)])
        upper = ir.Constant(_PAIRS_MASK, [part for lane in _UPPER for part in (lane, lane + LANES)])

        def body(d, _):
            _fetch(builder, rows, d, ahead)
            target = builder.bitcast(builder.gep(attended, [d]), SUM_VECTOR.as_pointer())
            second = builder.gep(target, [ir.Constant(INDEX, 1)])
            sums = builder.load(target, align=4), builder.load(second, align=4)
            low, high = (builder.shuffle_vector(*sums, _constant(lanes)) for lanes in (_LOWER, _UPPER))
            for i, pair in enumerate(pairs):
                two = [_load(builder, row, d, BITS_VECTOR) for row in rows[2 * i : 2 * i + 2]]
                low_pair, high_pair = (
                    builder.bitcast(builder.shuffle_vector(*two, mask), NUMBER_VECTOR) for mask in (lower, upper)
                )
                low = builder.call(product, [low, low_pair, pair])
                high = builder.call(product, [high, high_pair, pair])
            builder.store(builder.shuffle_vector(low, high, _constant(_BACK[:SUMS])), target, align=4)
            builder.store(builder.shuffle_vector(low, high, _constant(_BACK[SUMS:])), second, align=4)
            return []

        _loop_over_lanes(builder, builder.extract_value(out.shape, 2), [], body)
        return context.get_dummy_value()

    index = types.intp
    kinds = (out, index, index, v_cache, index, index, index, index, index, shares, index, index)
    return types.void(*kinds), generate
