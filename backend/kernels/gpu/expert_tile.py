"""Parts of the grouped expert kernels: one tile of rows times one tile of columns."""

from __future__ import annotations

import triton
import triton.language as tl

from backend.kernels.gpu.common import dot


@triton.jit
def product(
    x_ptr,  # [*, DEPTH_SIZE]
    w_ptr,  # [*, DEPTH_SIZE] row 0 is that of column 0
    rows,  # [ROWS] int64, rows of x
    row_mask,  # [ROWS]
    columns,  # [COLUMNS] int64, rows of w
    column_mask,  # [COLUMNS]
    depth_size,
    SWAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """x[rows] @ w[columns]^T as [ROWS, COLUMNS], or with SWAP as [COLUMNS, ROWS], in float32."""
    k = tl.arange(0, DEPTH)
    if SWAP:
        acc = tl.zeros([COLUMNS, ROWS], tl.float32)
        x_ptrs = x_ptr + rows[None, :] * depth_size + k[:, None]
        w_ptrs = w_ptr + columns[:, None] * depth_size + k[None, :]
    else:
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        x_ptrs = x_ptr + rows[:, None] * depth_size + k[None, :]
        w_ptrs = w_ptr + columns[None, :] * depth_size + k[:, None]
    for start in range(0, depth_size, DEPTH):
        inside = start + k < depth_size
        if SWAP:
            if EVEN:
                x = tl.load(x_ptrs + start, mask=row_mask[None, :], other=0.0)
                w = tl.load(w_ptrs + start)
            else:
                x = tl.load(x_ptrs + start, mask=row_mask[None, :] & inside[:, None], other=0.0)
                w = tl.load(w_ptrs + start, mask=column_mask[:, None] & inside[None, :], other=0.0)
            acc = dot(w.to(x.dtype), x, acc)
        else:
            if EVEN:
                x = tl.load(x_ptrs + start, mask=row_mask[:, None], other=0.0)
                w = tl.load(w_ptrs + start)
            else:
                x = tl.load(x_ptrs + start, mask=row_mask[:, None] & inside[None, :], other=0.0)
                w = tl.load(w_ptrs + start, mask=column_mask[None, :] & inside[:, None], other=0.0)
            acc = dot(x, w.to(x.dtype), acc)
    return acc


@triton.jit
def two_products(
    x_ptr,
    w_ptr,
    rows,
    row_mask,
    columns,
    column_mask,
    offset,  # int64, rows of w between the first and the second matrix
    depth_size,
    SWAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`product` with two matrices of the same shape in one pass over x."""
    k = tl.arange(0, DEPTH)
    if SWAP:
        first = tl.zeros([COLUMNS, ROWS], tl.float32)
        x_ptrs = x_ptr + rows[None, :] * depth_size + k[:, None]
        w_ptrs = w_ptr + columns[:, None] * depth_size + k[None, :]
    else:
        first = tl.zeros([ROWS, COLUMNS], tl.float32)
        x_ptrs = x_ptr + rows[:, None] * depth_size + k[None, :]
        w_ptrs = w_ptr + columns[None, :] * depth_size + k[:, None]
    second = first
    v_ptrs = w_ptrs + offset * depth_size
    for start in range(0, depth_size, DEPTH):
        inside = start + k < depth_size
        if SWAP:
            if EVEN:
                x = tl.load(x_ptrs + start, mask=row_mask[None, :], other=0.0)
                w = tl.load(w_ptrs + start)
                v = tl.load(v_ptrs + start)
            else:
                w_mask = column_mask[:, None] & inside[None, :]
                x = tl.load(x_ptrs + start, mask=row_mask[None, :] & inside[:, None], other=0.0)
                w = tl.load(w_ptrs + start, mask=w_mask, other=0.0)
                v = tl.load(v_ptrs + start, mask=w_mask, other=0.0)
            first = dot(w.to(x.dtype), x, first)
            second = dot(v.to(x.dtype), x, second)
        else:
            if EVEN:
                x = tl.load(x_ptrs + start, mask=row_mask[:, None], other=0.0)
                w = tl.load(w_ptrs + start)
                v = tl.load(v_ptrs + start)
            else:
                w_mask = column_mask[None, :] & inside[:, None]
                x = tl.load(x_ptrs + start, mask=row_mask[:, None] & inside[None, :], other=0.0)
                w = tl.load(w_ptrs + start, mask=w_mask, other=0.0)
                v = tl.load(v_ptrs + start, mask=w_mask, other=0.0)
            first = dot(x, w.to(x.dtype), first)
            second = dot(x, v.to(x.dtype), second)
    return first, second


@triton.jit
def scale_columns(value, scales_ptr, columns, column_mask, SWAP: tl.constexpr):
    """value [ROWS, COLUMNS], with SWAP [COLUMNS, ROWS], times the factor of each column."""
    scale = tl.load(scales_ptr + columns, mask=column_mask, other=0.0)
    if SWAP:
        value *= scale[:, None]
    else:
        value *= scale[None, :]
    return value


@triton.jit
def store_tile(out_ptr, value, rows, row_mask, columns, column_mask, num_columns, SWAP: tl.constexpr):
    """Put value [ROWS, COLUMNS], with SWAP [COLUMNS, ROWS], at rows and columns of out [*, num_columns]."""
    if SWAP:
        place = rows[None, :] * num_columns + columns[:, None]
        mask = row_mask[None, :] & column_mask[:, None]
    else:
        place = rows[:, None] * num_columns + columns[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def assignments_at(order_ptr, first, end, ROWS: tl.constexpr):
    """The assignments [ROWS] int64 at places `first`… of the sorted list, and which of them lie before `end`."""
    place = first + tl.arange(0, ROWS)
    mask = place < end
    return tl.load(order_ptr + place, mask=mask, other=0).to(tl.int64), mask


@triton.jit
def tile_of(program, num_tiles, blocks, GROUP: tl.constexpr):
    """Row tile and column block of a program: groups of GROUP row tiles go through the columns together."""
    group = program // (GROUP * blocks)
    members = tl.minimum(num_tiles - group * GROUP, GROUP)
    inside = program % (GROUP * blocks)
    return group * GROUP + inside % members, inside // members
