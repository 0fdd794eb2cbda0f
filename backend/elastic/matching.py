"""The assignment problem for a handful of devices (Hungarian method with potentials, O(n^3))."""

from __future__ import annotations

from collections.abc import Sequence

_INFINITY = float("inf")


def cheapest_assignment(cost: Sequence[Sequence[float]]) -> list[int]:
    """Column of each row of a square matrix such that columns differ and the sum of `cost[row][column]` is least."""
    size = len(cost)
    row_potential, column_potential = [0.0] * (size + 1), [0.0] * (size + 1)
    row_of = [size] * (size + 1)  # of each column; `size` marks a free one, and the extra column starts each search
    for row in range(size):
        row_of[size] = row
        column = size
        shortest, came_from, done = [_INFINITY] * size, [size] * size, [False] * (size + 1)
        while row_of[column] != size:
            done[column] = True
            current, step, nearest = row_of[column], _INFINITY, size
            for other in range(size):
                if done[other]:
                    continue
                reduced = cost[current][other] - row_potential[current] - column_potential[other]
                if reduced < shortest[other]:
                    shortest[other], came_from[other] = reduced, column
                if shortest[other] < step:
                    step, nearest = shortest[other], other
            for other in range(size + 1):
                if done[other]:
                    row_potential[row_of[other]] += step
                    column_potential[other] -= step
                elif other < size:
                    shortest[other] -= step
            column = nearest
        while column != size:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
        row_of[size] = size
    chosen = [0] * size
    for column in range(size):
        chosen[row_of[column]] = column
    return chosen
