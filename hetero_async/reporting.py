"""The report of a run: the dashboard's page with what its log, its history and its refusals say, in one HTML file.

Reads only; the run may have ended, be dead, or go on.
"""

import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hetero_async.config import Node, RunConfig
from hetero_async.core import ranges
from hetero_async.core.records import Delta, Entry, Left, Metric, Stepped
from hetero_async.core.state import State
from hetero_async.core.status import outline
from hetero_async.core.trend import Trend
from hetero_async.errors import UserError
from hetero_async.remains import furthest_here, oldest_start
from hetero_async.replay import fold, start_of
from hetero_async.shell import refusals
from hetero_async.shell.refusals import load_refusals
from hetero_async.watch import chronicle
from hetero_async.watch.chronicle import load_history
from hetero_async.watch.document import document
from hetero_async.watch.histories import as_one
from hetero_async.watch.history import COLUMNS_MAX, STALENESS_MAX, History, Point, Series
from hetero_async.watch.looks import BYE

# Looks come every second: after so many without one, whoever served does so no more.
SILENT_SECONDS = 10.0


@dataclass(slots=True)
class Account:
    """What a log says, from its beginning or from behind the checkpoint of record `from_lsn`."""

    state: State
    from_lsn: int = 0
    staleness: Counter[int] = field(default_factory=Counter)
    anchors: dict[int, int] = field(default_factory=dict)  # of deltas that are not merged yet, by their lsn
    lost: int = 0  # workers that were given up
    losses: dict[str, list[Point]] = field(default_factory=dict)  # without times


def write_report(place: Path, out: Path) -> str:
    """Write the report of the run that `place` names (run.toml, or a directory of a run or of one of its nodes) as
    `out`; one line about it. Raises ConfigError, UserError, LogCorrupt."""
    content = report(place)
    try:
        out.write_text(document(content), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    status = content["status"]
    return f"wrote {out}: {status['run']}, {status['state']}, version {status['version']}"


def report(place: Path) -> dict[str, Any]:
    """The page's content."""
    log, directories = places(place)
    account = _read(log)
    history = history_at(directories)
    refused = load_refusals(log.parent / refusals.NAME)
    kinds: Counter[str] = Counter()
    by_worker: Counter[str] = Counter()
    for notes in refused.values():
        for kind, noted in notes.kinds.items():
            kinds[kind] += noted.count
            by_worker[notes.worker] += noted.count
    told = history.shown() | {"refusals": dict(kinds) or history.refusals}
    if account.from_lsn == 0:
        told["staleness"] = sorted(account.staleness.items())
        told["counts"] |= {"lost": account.lost}
    told["counts"] |= {"takeover": len(account.state.promotions)}
    if not history.losses:
        told["losses"] = {
            name: [_dated(point, history.whole).model_dump() for point in points]
            for name, points in account.losses.items()
        }
    return {
        "is_live": False,
        "made_seconds": time.time(),
        "seconds": _ended(history.whole),
        "status": _status(account.state, history, by_worker),
        "whole": history.whole.shown(),
        "notes": _notes(log, account, history),
        **told,
    }


def places(place: Path) -> tuple[Path, list[Path]]:
    """The log that is furthest, and where histories of the run may lie. Raises UserError."""
    run_toml = place / "run.toml" if place.is_dir() else place
    if run_toml.exists():
        config = RunConfig.load(run_toml)
        node = furthest_here(config)
        return node.log, _directories(config, node)
    if (place / "log").is_dir():
        return place / "log", [place]
    raise UserError(f"{place}: is no run.toml, and no directory with a run.toml or a log in it")


def history_at(directories: list[Path]) -> History:
    """What those nodes noted, as one. Raises ConfigError."""
    kept = [load_history(directory / chronicle.NAME) for directory in directories]
    return as_one([history for history in kept if history is not None])


def _directories(config: RunConfig, first: Node) -> list[Path]:
    nodes = [first, *(node for node in config.nodes().values() if node.name != first.name)]
    return [node.directory for node in nodes]


def _read(log: Path) -> Account:
    checkpoint, entries = oldest_start(log)
    account = Account(start_of(checkpoint), from_lsn=checkpoint.lsn if checkpoint else 0)
    account.anchors = {lsn: pending.anchor_version for lsn, pending in account.state.pending.items()}
    for entry in entries:
        fold(entry, account.state)
        _note(entry, account)
    return account


def _note(entry: Entry, account: Account) -> None:
    match entry.record:
        case Left(reason=reason):
            account.lost += reason != BYE
        case Delta(anchor_version=anchor):
            account.anchors[entry.lsn] = anchor
        case Stepped(deltas=deltas, version=version):
            ages = (version - account.anchors.pop(lsn) - 1 for lsn in deltas)
            account.staleness.update(min(age, STALENESS_MAX) for age in ages)
        case Metric(name=name, value=value, version=version):
            trained = ranges.size(account.state.ledger.trained)
            points = account.losses.setdefault(name, [])
            points.append(Point(at=0.0, version=version, trained=trained, value=value))
            if len(points) > 2 * COLUMNS_MAX:
                del points[:-1:2]


def _dated(point: Point, whole: Series) -> Point:
    """When the run had come so far; at its end where nobody noted that."""
    trained = whole.figures["trained"]
    place = min(bisect_left(trained, point.trained), len(trained) - 1)
    return point.model_copy(update={"at": whole.slots[place] * whole.step_seconds if trained else 0.0})


def _ended(whole: Series) -> float:
    """When it was last looked at; seconds since 1970, 0 where nobody looked."""
    return float((whole.slots[-1] + 1) * whole.step_seconds) if whole.slots else 0.0


def _status(state: State, history: History, refused: Counter[str]) -> dict[str, Any]:
    """As `hetero-async status --json` has it, as far as the disk knows."""
    run = state.settings.run if state.settings else ""
    status = outline(run, state, Trend(), 0)
    is_going_on = time.time() - _ended(history.whole) < SILENT_SECONDS
    status["state"] = "finished" if state.is_finished else "training" if is_going_on else "stopped"
    status["deltas"]["refused"] = sum(refused.values())
    for worker in status["workers"]:
        worker["state"] = worker["state"] or ("in the run" if worker["alive"] else "away")
        worker["refused"] = refused[worker["worker"]]
        worker["bytes_up"], worker["bytes_down"] = history.traffic.get(worker["worker"], (0, 0))
    return status


def _notes(log: Path, account: Account, history: History) -> list[str]:
    start = f"behind the checkpoint of record {account.from_lsn}" if account.from_lsn else "from the first record"
    notes = [f"the log in {log}, {start} to record {account.state.lsn}"]
    if not history.whole.slots:
        notes.append(f"no {chronicle.NAME} beside it: nothing is known of times")
    return notes
