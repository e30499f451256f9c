"""What a run has left on disk, read without its tensors: where its log begins, and how it stood when nothing runs.

looking.py is for what needs the tensors as well, and torch with them. Changes nothing; a server may be running.
"""

import itertools
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from hetero_async.complaints import SERVER
from hetero_async.config import Node, RunConfig
from hetero_async.core.records import Entry
from hetero_async.core.status import outline
from hetero_async.core.trend import Trend
from hetero_async.errors import ConfigError, LogCorrupt, UserError
from hetero_async.ports import Checkpoint
from hetero_async.replay import fold, start_of
from hetero_async.shell import refusals
from hetero_async.shell.refusals import load_refusals
from hetero_async.shell.segments import end_of, read_log, run_of, segment_paths
from hetero_async.shell.store import CheckpointStore
from hetero_async.shell.threads import in_thread


def furthest_here(config: RunConfig) -> Node:
    """Where several nodes have logs on this host: what a deposed one has in a lower term is not the run's."""
    held = [node for node in config.nodes().values() if segment_paths(node.log)]
    return max(held, key=lambda node: end_of(node.log), default=config.node(SERVER))


def oldest_start(log: Path, *, with_arrays: bool = True) -> tuple[Checkpoint | None, Iterator[Entry]]:
    """Genesis where the log still has it, else the oldest checkpoint, and the entries from there on."""
    entries = read_log(log, None)
    first = next(entries, None)
    if first is not None and first.lsn == 1:
        return None, itertools.chain([first], entries)
    store = CheckpointStore(log.parent / "checkpoints", run_of(log), in_thread)
    if first is None:
        checkpoint = store.load_newest(with_arrays=with_arrays)
        if checkpoint is None:
            raise UserError(f"{log}: holds no record yet")
        return checkpoint, read_log(log, None, checkpoint.lsn)
    # A power cut may have brought back one that was dropped; the log does not reach back to it any more.
    reached = [lsn for lsn in store.lsns() if lsn + 1 >= first.lsn]
    if not reached:
        raise LogCorrupt(f"{log}: begins at record {first.lsn}, and no checkpoint reaches so far")
    checkpoint = store.load(reached[0], with_arrays=with_arrays)
    return checkpoint, read_log(log, None, checkpoint.lsn)


def status_on_disk(config: RunConfig) -> dict[str, Any] | None:
    """The status that a run had when it ended, as far as this host's log goes; None: there is nothing of it here.

    `remains` says what it was read from, `refusal_notes` what was refused, the most frequent kind first.
    """
    node = furthest_here(config)
    store = CheckpointStore(node.checkpoints, config.run.name, in_thread)
    paths = segment_paths(node.log)
    if not paths and not store.lsns():
        return None
    checkpoint = store.load_newest(with_arrays=False)
    state, trend, damage = start_of(checkpoint), Trend(), ""
    try:
        for entry in read_log(node.log, config.run.name, state.lsn):
            fold(entry, state)
            trend.see(entry)
    except LogCorrupt as error:
        damage = str(error)
    status = outline(config.run.name, state, trend, 0)
    status["state"] = "finished" if state.is_finished else "not running"
    for worker in status["workers"]:
        worker |= {"state": "was here" if worker["alive"] else "had left", "alive": False}
    status["refusal_notes"] = notes = _refusal_notes(node)
    status["deltas"]["refused"] = sum(note["count"] for note in notes)
    status["remains"] = {
        "directory": str(node.directory),
        "lsn": state.lsn,
        "checkpoint": checkpoint.lsn if checkpoint else 0,
        "written": _written(paths),
        "damage": damage,
    }
    return status


def _refusal_notes(node: Node) -> list[dict[str, Any]]:
    try:
        refused = load_refusals(node.log.parent / refusals.NAME)
    except ConfigError:
        return []  # they are notes on the side
    notes = [
        {"worker": noted.worker, "kind": kind, "count": told.count, "last": told.last}
        for noted in refused.values()
        for kind, told in noted.kinds.items()
    ]
    return sorted(notes, key=lambda note: (-note["count"], note["worker"], note["kind"]))


def _written(paths: list[Path]) -> str:
    newest = max((path.stat().st_mtime for path in paths), default=None)
    return "never" if newest is None else datetime.fromtimestamp(newest).astimezone().isoformat(" ", "seconds")
