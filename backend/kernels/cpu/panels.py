"""Products of weight rows with panels of sixteen tokens, for many tokens, with the processor's bfloat16 instruction.

A panel is a [K / 2, 16] array of uint32: of sixteen tokens the numbers 2k and 2k + 1, side by side. A weight row is read as it
lies, two numbers at a time, and multiplies all sixteen tokens at once, so sums end in lanes of tokens and need not be added up
across lanes, as in `bfloat16`. Lengths K must be multiples of `LANES` and rows are taken `ROWS` at a time.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from backend.kernels.cpu.bfloat16 import INDEX, LANES, NUMBER_VECTOR, SUM_VECTOR, SUMS, array_of, prefetch, product_of

#: Tokens of a panel, and weight rows that are taken together.
TOKENS, ROWS = SUMS, 8
_WORD = ir.IntType(32)
_WORD_VECTOR = ir.VectorType(_WORD, TOKENS)


def _nth(builder, start, stride, number):
    """Pointer to words `number` strides (bytes) after a pointer."""
    place = builder.gep(builder.bitcast(start, ir.IntType(8).as_pointer()), [builder.mul(number, stride)])
    return builder.bitcast(place, _WORD.as_pointer())


def _product_sums(builder, start, row_bytes, length, panels, n, count):
    """Sums [ROWS][count] of rows of `length` numbers, from a pointer on, with `count` panels n … of a [P, K / 2, 16] array."""
    panel_bytes = builder.extract_value(panels.strides, 0)
    starts = [_nth(builder, start, row_bytes, ir.Constant(INDEX, i)) for i in range(ROWS)]
    numbers = [builder.add(n, ir.Constant(INDEX, i)) for i in range(count)]
    tokens = [_nth(builder, panels.data, panel_bytes, number) for number in numbers]
    product, zeros = product_of(builder), ir.Constant(_WORD_VECTOR, [0] * TOKENS)

    before = builder.block
    body, after = builder.append_basic_block("pairs"), builder.append_basic_block("pairs.end")
    builder.branch(body)
    builder.position_at_end(body)
    at = builder.phi(INDEX)  # in words
    at.add_incoming(ir.Constant(INDEX, 0), before)
    sums = [builder.phi(SUM_VECTOR) for _ in range(ROWS * count)]
    for value in sums:
        value.add_incoming(ir.Constant(SUM_VECTOR, [0.0] * SUMS), before)
    new = list(sums)
    # The rows that are likely to come next: the processor does not follow so many streams by itself.
    following = [_nth(builder, start, row_bytes, ir.Constant(INDEX, ROWS)) for start in starts]
    for start in following:
        prefetch(builder, builder.gep(start, [at]))
    for step in range(LANES // 2):
        word = builder.add(at, ir.Constant(INDEX, step))
        parts = []
        for start in tokens:
            pointer = builder.gep(start, [builder.mul(word, ir.Constant(INDEX, TOKENS))])
            loaded = builder.load(builder.bitcast(pointer, _WORD_VECTOR.as_pointer()), align=4)
            parts.append(builder.bitcast(loaded, NUMBER_VECTOR))
        for i, start in enumerate(starts):
            pair = builder.load(builder.gep(start, [word]), align=2)
            one = builder.insert_element(zeros, pair, ir.Constant(_WORD, 0))
            both = builder.bitcast(builder.shuffle_vector(one, one, zeros), NUMBER_VECTOR)
            for j, part in enumerate(parts):
                new[i * count + j] = builder.call(product, [new[i * count + j], part, both])
    next_at = builder.add(at, ir.Constant(INDEX, LANES // 2))
    at.add_incoming(next_at, body)
    for value, update in zip(sums, new, strict=True):
        value.add_incoming(update, body)
    end = builder.lshr(length, ir.Constant(INDEX, 1))
    builder.cbranch(builder.icmp_signed("<", next_at, end), body, after)
    builder.position_at_end(after)
    return new


def _sums_of_rows(builder, rows, first, panels, n, count):
    """_product_sums for rows first … of a [N, K] array."""
    row_bytes, length = builder.extract_value(rows.strides, 0), builder.extract_value(rows.shape, 1)
    start = _nth(builder, rows.data, row_bytes, first)
    return _product_sums(builder, start, row_bytes, length, panels, n, count)


def by_token(builder, sums):
    """Vectors of sixteen tokens, one for each row -> sixteen vectors of one number of each row."""
    groups, run = [[vector] for vector in sums], 1
    while len(groups) > 1:  # neighbours are interleaved in runs of ever more rows
        halves = []
        for half in (0, 1):
            starts = range(half * SUMS // 2, (half + 1) * SUMS // 2, run)
            lanes = [other + start + k for start in starts for other in (0, SUMS) for k in range(run)]
            halves.append(ir.Constant(ir.VectorType(_WORD, SUMS), lanes))
        groups = [
            [builder.shuffle_vector(a, b, half) for a, b in zip(first, second, strict=True) for half in halves]
            for first, second in zip(groups[::2], groups[1::2], strict=True)
        ]
        run *= 2
    (vectors,) = groups
    rows = len(sums)
    parts = [ir.Constant(ir.VectorType(_WORD, rows), list(range(k, k + rows))) for k in range(0, SUMS, rows)]
    return [builder.shuffle_vector(vector, vector, part) for vector in vectors for part in parts]


def _to_lanes(count):
    @intrinsic
    def rows_times_panels(_context, rows, first, panels, n, out):
        """out [ROWS * count * 16] float32 = rows first … of rows [N, K] times `count` panels, by row, panel and token."""

        def generate(context, builder, signature, arguments):
            rows, first, panels, n, out = arguments
            rows, panels, out = (
                array_of(context, builder, signature.args[i], value) for i, value in ((0, rows), (2, panels), (4, out))
            )
            sums = _sums_of_rows(builder, rows, first, panels, n, count)
            target = builder.bitcast(out.data, SUM_VECTOR.as_pointer())
            for i, value in enumerate(sums):
                builder.store(value, builder.gep(target, [ir.Constant(INDEX, i)]), align=4)
            return context.get_dummy_value()

        return types.void(rows, types.intp, panels, types.intp, out), generate

    return rows_times_panels


def _to_rows(count):
    @intrinsic
    def rows_times_panels(_context, rows, first, panels, n, y):
        """y[16 n + token, first …] = rows first … of rows [N, K] times `count` panels; y [16 P, N] is float32."""

        def generate(context, builder, signature, arguments):
            rows, first, panels, n, y = arguments
            rows, panels, y = (
                array_of(context, builder, signature.args[i], value) for i, value in ((0, rows), (2, panels), (4, y))
            )
            sums = _sums_of_rows(builder, rows, first, panels, n, count)
            width = builder.extract_value(y.shape, 1)
            for panel in range(count):
                token = builder.mul(builder.add(n, ir.Constant(INDEX, panel)), ir.Constant(INDEX, TOKENS))
                target = builder.gep(y.data, [builder.add(builder.mul(token, width), first)])
                for values in by_token(builder, sums[panel::count]):
                    builder.store(values, builder.bitcast(target, values.type.as_pointer()), align=4)
                    target = builder.gep(target, [width])
            return context.get_dummy_value()

        return types.void(rows, types.intp, panels, types.intp, y), generate

    return rows_times_panels


panel_to_lanes, two_panels_to_lanes = _to_lanes(1), _to_lanes(2)
panel_to_rows, two_panels_to_rows = _to_rows(1), _to_rows(2)


@intrinsic
def cached_rows_times_panel(_context, cache, block, first, g, panels, scores, key):
    """scores[key …] [ROWS, 16] float32 = head g of tokens first … of a block of cache [N, C, G, D] times panels[0]."""

    def generate(context, builder, signature, arguments):
        cache, block, first, g, panels, scores, key = arguments
        cache, panels, scores = (
            array_of(context, builder, signature.args[i], value) for i, value in ((0, cache), (4, panels), (5, scores))
        )
        block_bytes, token_bytes, head_bytes = (builder.extract_value(cache.strides, axis) for axis in range(3))
        start = _nth(builder, cache.data, block_bytes, block)
        start = _nth(builder, start, token_bytes, first)
        start = _nth(builder, start, head_bytes, g)
        length = builder.extract_value(cache.shape, 3)
        sums = _product_sums(builder, start, token_bytes, length, panels, ir.Constant(INDEX, 0), 1)
        target = _nth(builder, scores.data, builder.extract_value(scores.strides, 0), key)
        target = builder.bitcast(target, SUM_VECTOR.as_pointer())
        for i, value in enumerate(sums):
            builder.store(value, builder.gep(target, [ir.Constant(INDEX, i)]), align=4)
        return context.get_dummy_value()

    index = types.intp
    return types.void(cache, index, index, index, panels, scores, index), generate
