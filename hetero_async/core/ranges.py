"""Sets of run positions as ascending, disjoint, never touching half-open ranges.

Every function takes and returns such tuples; `normal` makes one of anything. A run's pool stays a handful of
ranges however large it is, because leases are contiguous and what comes back melts into its neighbours.
"""

from collections.abc import Iterable

from hetero_async.core.records import Range

Ranges = tuple[Range, ...]


def normal(ranges: Iterable[Range]) -> Ranges:
    """Sort and melt; overlaps become one."""
    melted: list[Range] = []
    for start, stop in sorted(ranges):
        assert start <= stop, f"range {start}..{stop} runs backwards"
        if start == stop:
            continue
        if melted and start <= melted[-1][1]:
            melted[-1] = (melted[-1][0], max(stop, melted[-1][1]))
        else:
            melted.append((start, stop))
    return tuple(melted)


def size(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def union(left: Ranges, right: Ranges) -> Ranges:
    return normal(left + right)


def intersection(left: Ranges, right: Ranges) -> Ranges:
    common: list[Range] = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, stop = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < stop:
            common.append((start, stop))
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    return tuple(common)


def difference(left: Ranges, right: Ranges) -> Ranges:
    """What is in `left` and not in `right`."""
    kept: list[Range] = []
    j = 0
    for start, stop in left:
        while j < len(right) and right[j][1] <= start:
            j += 1
        at, k = start, j
        while k < len(right) and right[k][0] < stop:
            if at < right[k][0]:
                kept.append((at, right[k][0]))
            at = max(at, right[k][1])
            k += 1
        if at < stop:
            kept.append((at, stop))
    return tuple(kept)


def contains(outer: Ranges, inner: Ranges) -> bool:
    return intersection(outer, inner) == inner


def take(ranges: Ranges, count: int) -> tuple[Ranges, Ranges]:
    """The first `count` positions, and the rest."""
    taken: list[Range] = []
    for index, (start, stop) in enumerate(ranges):
        if count <= 0:
            return tuple(taken), ranges[index:]
        cut = min(stop, start + count)
        taken.append((start, cut))
        count -= cut - start
        if cut < stop:
            return tuple(taken), ((cut, stop), *ranges[index + 1 :])
    return tuple(taken), ()
