"""Follows a run's log on this host, record by record, for what draws its curves; the server may be writing it."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from hetero_async.config import RunConfig
from hetero_async.core.records import Entry
from hetero_async.core.state import State
from hetero_async.errors import UserError
from hetero_async.remains import furthest_here, oldest_start
from hetero_async.replay import fold, start_of
from hetero_async.shell.segments import read_log, segment_paths
from hetero_async.watch.curves import Curves

FOLLOW_EVERY_SECONDS = 2.0


def write_curves(config: RunConfig, directory: Path, *, watch: bool, told: Callable[[int, int], None]) -> None:
    """Write all that the log holds as curves below `directory`; with `watch` go on until interrupted.

    `told` is given how many points there are, and up to which record, after each reading. Raises UserError, LogCorrupt.
    """
    curves = Curves(directory)

    def read(lsn: int) -> None:
        curves.flush()
        told(curves.points, lsn)

    with contextlib.closing(curves):
        log = furthest_here(config).log
        while watch and not segment_paths(log):
            time.sleep(FOLLOW_EVERY_SECONDS)
        follow(log, curves.see, read=read, watch=watch)


def follow(log: Path, seen: Callable[[Entry, State], None], *, read: Callable[[int], object], watch: bool) -> None:
    """`seen` gets each entry with the state it led to; `read` is called with the last record of each reading."""
    checkpoint, entries = oldest_start(log, with_arrays=False)
    state = start_of(checkpoint)
    while True:
        try:
            for entry in entries:
                fold(entry, state)
                seen(entry, state)
        except UserError:
            # The server drops a segment that it needs no more while we read it; what follows is in others.
            if not watch:
                raise
        read(state.lsn)
        if not watch:
            return
        time.sleep(FOLLOW_EVERY_SECONDS)
        entries = read_log(log, None, state.lsn)
