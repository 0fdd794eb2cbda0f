"""Products of weight rows with panels of sixteen tokens by the processor's matrix unit (AMX), where there is one.

It multiplies a tile of sixteen weight rows, 32 numbers of each, by a tile of sixteen tokens in one instruction. A weight tile is
read as the weights lie, and a tile of tokens is sixteen lines of a panel (see `panels`), so neither is packed anew.
"""

from __future__ import annotations

from functools import cache

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from backend.kernels.cpu.bfloat16 import INDEX, LANES, SUM_VECTOR, SUMS, array_of, prefetch
from backend.kernels.cpu.panels import TOKENS, by_token

#: Weight rows of a tile.
ROWS = 16
#: A line of a tile, and a whole one, in bytes.
_LINE, _TILE = 64, 64 * ROWS
_BYTE = ir.IntType(8)
_BYTE_POINTER = _BYTE.as_pointer()
#: The configuration: the only palette there is, and for each of eight tiles the bytes of a line and the number of lines.
_CONFIG = ir.ArrayType(_BYTE, 64)
_ALL_FULL = bytearray([1, *[0] * 15, *[_LINE, 0] * 8, *[0] * 16, *[ROWS] * 8, *[0] * 8])


@cache
def available() -> bool:
    """Whether this processor has the unit and the operating system lets this process use it; asks for leave if need be."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("amx-tile") and features.get("amx-bf16") and torch.cpu._init_amx())


def _call(builder: ir.IRBuilder, name: str, *arguments: ir.Value) -> None:
    """One of LLVM's functions for tiles; integers stand for tiles."""
    values = [ir.Constant(_BYTE, value) if isinstance(value, int) else value for value in arguments]
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), values)


def _bytes_from(builder: ir.IRBuilder, start: ir.Value, offset: ir.Value) -> ir.Value:
    return builder.gep(builder.bitcast(start, _BYTE_POINTER), [offset])


@intrinsic
def tiles_on(_context, before):
    """Take this thread's tiles; `before` [64] uint8 gets the configuration that was in force, oneDNN's say."""

    def generate(context, builder, signature, arguments):
        array = array_of(context, builder, signature.args[0], arguments[0])
        _call(builder, "sttilecfg", builder.bitcast(array.data, _BYTE_POINTER))
        config = cgutils.alloca_once(builder, _CONFIG)
        builder.store(ir.Constant(_CONFIG, _ALL_FULL), config)
        _call(builder, "ldtilecfg", builder.bitcast(config, _BYTE_POINTER))
        return context.get_dummy_value()

    return types.void(before), generate


@intrinsic
def tiles_off(_context, before):
    """Give this thread's tiles back, configured as they were."""

    def generate(context, builder, signature, arguments):
        array = array_of(context, builder, signature.args[0], arguments[0])
        _call(builder, "ldtilecfg", builder.bitcast(array.data, _BYTE_POINTER))
        return context.get_dummy_value()

    return types.void(before), generate


def _products(context, builder, kinds, arguments, count, following_rows):
    """Two tiles of rows times `count` panels: sums in tiles 0 …, by rows and then panels.

    Arguments: rows [N, K], the first row of either tile, panels [P, K / 2, 16] and the first panel.
    """
    rows, first, second, panels, n = arguments
    rows, panels = array_of(context, builder, kinds[0], rows), array_of(context, builder, kinds[3], panels)
    row_bytes, length = builder.extract_value(rows.strides, 0), builder.extract_value(rows.shape, 1)
    panel_bytes = builder.extract_value(panels.strides, 0)
    row_starts = [_bytes_from(builder, rows.data, builder.mul(row, row_bytes)) for row in (first, second)]
    numbers = [builder.add(n, ir.Constant(INDEX, i)) for i in range(count)]
    panel_starts = [_bytes_from(builder, panels.data, builder.mul(number, panel_bytes)) for number in numbers]
    ahead = builder.mul(row_bytes, ir.Constant(INDEX, following_rows))
    next_starts = [builder.gep(start, [ahead]) for start in row_starts]
    of_rows, of_panels = (4, 5), (6, 7)[:count]
    for tile in range(2 * count):
        _call(builder, "tilezero", tile)

    before = builder.block
    body, after = builder.append_basic_block("tiles"), builder.append_basic_block("tiles.end")
    builder.branch(body)
    builder.position_at_end(body)
    at = builder.phi(INDEX)  # in numbers
    at.add_incoming(ir.Constant(INDEX, 0), before)
    row_offset = builder.mul(at, ir.Constant(INDEX, 2))
    panel_offset = builder.mul(at, ir.Constant(INDEX, _TILE // LANES))
    for start in next_starts:
        for line in range(ROWS):
            offset = builder.add(panel_offset, ir.Constant(INDEX, line * _LINE))
            prefetch(builder, builder.gep(start, [offset]))
    for tile, start in zip(of_rows, row_starts, strict=True):
        _call(builder, "tileloadd64", tile, builder.gep(start, [row_offset]), row_bytes)
    for tile, start in zip(of_panels, panel_starts, strict=True):
        _call(builder, "tileloadd64", tile, builder.gep(start, [panel_offset]), ir.Constant(INDEX, _LINE))
    for i, row_tile in enumerate(of_rows):
        for j, panel_tile in enumerate(of_panels):
            _call(builder, "tdpbf16ps", i * count + j, row_tile, panel_tile)
    following = builder.add(at, ir.Constant(INDEX, LANES))
    at.add_incoming(following, body)
    builder.cbranch(builder.icmp_signed("<", following, length), body, after)
    builder.position_at_end(after)


def _to_lanes(count):
    @intrinsic
    def tiles_times_panels(_context, rows, first, second, panels, n, out):
        """out [2 * 16 * count * 16] float32 = rows first … and second … of rows [N, K] times panels n …, by row, panel and token.

        Between `tiles_on` and `tiles_off`.
        """

        def generate(context, builder, signature, arguments):
            _products(context, builder, signature.args, arguments[:5], count, ROWS)
            target = builder.bitcast(array_of(context, builder, signature.args[5], arguments[5]).data, _BYTE_POINTER)
            for i in range(2):
                for j in range(count):
                    place = builder.gep(target, [ir.Constant(INDEX, i * count * _TILE + j * _LINE)])
                    _call(builder, "tilestored64", i * count + j, place, ir.Constant(INDEX, count * _LINE))
            return context.get_dummy_value()

        index = types.intp
        return types.void(rows, index, index, panels, index, out), generate

    return tiles_times_panels


def _to_rows(count):
    @intrinsic
    def tiles_times_panels(_context, rows, first, panels, n, y):
        """y[16 n + token, first …] = 32 rows of rows [N, K] from `first` on, times panels n …; y [16 P, N] is float32.

        Between `tiles_on` and `tiles_off`.
        """

        def generate(context, builder, signature, arguments):
            rows, first, panels, n, y = arguments
            second = builder.add(first, ir.Constant(INDEX, ROWS))
            kinds = [signature.args[0], None, None, signature.args[2]]
            _products(context, builder, kinds, (rows, first, second, panels, n), count, 2 * ROWS)
            y = array_of(context, builder, signature.args[4], y)
            width = builder.extract_value(y.shape, 1)
            room = cgutils.alloca_once(builder, ir.ArrayType(SUM_VECTOR, ROWS))
            lines = builder.bitcast(room, SUM_VECTOR.as_pointer())
            for i, row in enumerate((first, second)):
                for j in range(count):
                    where = builder.bitcast(room, _BYTE_POINTER)
                    _call(builder, "tilestored64", i * count + j, where, ir.Constant(INDEX, _LINE))
                    sums = [
                        builder.load(builder.gep(lines, [ir.Constant(INDEX, line)]), align=4) for line in range(SUMS)
                    ]
                    token = builder.mul(builder.add(n, ir.Constant(INDEX, j)), ir.Constant(INDEX, TOKENS))
                    target = builder.gep(y.data, [builder.add(builder.mul(token, width), row)])
                    for values in by_token(builder, sums):
                        builder.store(values, builder.bitcast(target, values.type.as_pointer()), align=4)
                        target = builder.gep(target, [width])
            return context.get_dummy_value()

        return types.void(rows, types.intp, panels, types.intp, y), generate

    return tiles_times_panels


tiles_to_lanes, tiles_to_lanes_of_two = _to_lanes(1), _to_lanes(2)
tiles_to_rows, tiles_to_rows_of_two = _to_rows(1), _to_rows(2)
