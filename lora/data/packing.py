"""Several examples in a row of fixed length, so that hardly any of it is filled up with nothing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the examples of each row, by best-fit decreasing: the longest first, each into the fullest row that
    still takes it (Johnson et al. 1974: at most 11/9 of the fewest rows possible, plus a constant).

    Each length must be at most `capacity`. The same lengths always give the same rows.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row) of each row that has any, sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert 0 < length <= capacity
        place = bisect_left(room, (length, -1))  # the fullest that takes it
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if left > length:
            insort(room, (left - length, row))
    return rows
