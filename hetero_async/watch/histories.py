"""The histories that several nodes of one run have kept, as one: each stretch as the node that served saw it."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import TypeVar

from hetero_async.watch.history import (
    ABSENT,
    COUNTED_BY_A_LIFE,
    FIGURES,
    NOTHING,
    STATES,
    History,
    Mark,
    Point,
    Series,
)

K = TypeVar("K")


def as_one(histories: Sequence[History]) -> History:
    """They are not changed."""
    own = [history.model_copy(deep=True) for history in histories if history.whole.slots]
    if len(own) < 2:
        return own[0] if own else History()
    joined = History(whole=_columns([history.whole for history in own]))
    for name in dict.fromkeys(name for history in own for name in history.losses):
        joined.losses[name] = _points([history.losses.get(name, []) for history in own])
    joined.marks = _marks(own)
    for history in own:
        _raise_to(joined.counts, history.counts)
        _raise_to(joined.staleness, history.staleness)
        for cause, count in history.refusals.items():
            joined.refusals[cause] = joined.refusals.get(cause, 0) + count
        for worker, (sent, received) in history.traffic.items():
            before = joined.traffic.get(worker, (0, 0))
            joined.traffic[worker] = (max(before[0], sent), max(before[1], received))
    return joined


def _raise_to(most: dict[K, int], counted: dict[K, int]) -> None:
    """What all nodes count the same, each as far as it was there."""
    for key, count in counted.items():
        most[key] = max(most.get(key, 0), count)


def _columns(several: Sequence[Series]) -> Series:
    step = max(series.step_seconds for series in several)
    for series in several:
        while series.step_seconds < step:
            series.thin()
    joined = Series(step_seconds=step)
    totals = dict.fromkeys(COUNTED_BY_A_LIFE, 0.0)
    for slot in sorted({slot for series in several for slot in series.slots}):
        held = [(series, series.slots.index(slot)) for series in several if slot in series.slots]
        series, place = max(held, key=lambda one: one[0].figures["is_serving"][one[1]])
        joined.slots.append(slot)
        for name in FIGURES:
            value = series.figures[name][place]
            if name in totals:
                before = series.figures[name][place - 1] if place else 0.0
                value = totals[name] = totals[name] + max(0.0, value - before)
            joined.figures[name].append(value)
        _copy(series, place, joined)
    return joined


def _copy(series: Series, place: int, joined: Series) -> None:
    """What one column says of sites and workers, to the end of `joined`."""
    before = len(joined.slots) - 1
    for site in dict.fromkeys([*joined.sites, *series.sites]):
        shares = series.sites[site][place] if site in series.sites else [0] * len(STATES)
        joined.sites.setdefault(site, [[0] * len(STATES) for _ in range(before)]).append(shares)
    for site in dict.fromkeys([*joined.carried, *series.carried]):
        totals = joined.carried.setdefault(site, [[*NOTHING] for _ in range(before)])
        # A server that takes over hears only what each worker's present life has sent.
        known = totals[-1] if totals else NOTHING
        heard = series.carried[site][place] if site in series.carried else NOTHING
        totals.append([max(one) for one in zip(known, heard, strict=True)])
    for worker in dict.fromkeys([*joined.lanes, *series.lanes]):
        letter = series.lanes[worker][place] if worker in series.lanes else ABSENT
        joined.lanes.setdefault(worker, [ABSENT] * before).append(letter)


def _points(several: Sequence[Sequence[Point]]) -> list[Point]:
    """A measurement is known by its version; who heard of it first knows best when it was."""
    first: dict[int, Point] = {}
    for point in sorted((point for points in several for point in points), key=lambda point: point.at):
        first.setdefault(point.version, point)
    return list(first.values())


def _marks(several: Sequence[History]) -> list[Mark]:
    """A takeover is told once; of workers tells whoever served, and not who heard of it late."""
    told: list[Mark] = []
    marks = [(mark, history) for history in several for mark in history.marks]
    for mark, history in sorted(marks, key=lambda one: one[0].at):
        if mark.kind == "takeover":
            is_told = any((old.kind, old.who, old.text) == (mark.kind, mark.who, mark.text) for old in told)
        else:
            others = [other.whole for other in several if other is not history]
            is_told = not _served(history.whole, mark.at) and any(_served(other, mark.at) for other in others)
        if not is_told or mark.kind == "started":
            told.append(mark)
    return told


def _served(series: Series, seconds: float) -> bool:
    """Whether its node did at that time."""
    place = bisect_left(series.slots, int(seconds // series.step_seconds))
    return place < len(series.slots) and bool(series.figures["is_serving"][place])
