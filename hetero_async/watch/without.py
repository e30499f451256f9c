"""Rebuilds a run's parameters without what some members contributed: the same records, their deltas left out.

`hetero-async replay` shows it. What the others sent stays what it was: they trained from parameters that the ones left
out had moved, and were refused or admitted beside them. So this takes out what was added, not what was learned of it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy

from hetero_async.core import merging, ranges
from hetero_async.core.records import Delta, Entry, Genesis, Settings, Stepped
from hetero_async.core.state import PendingDelta, State
from hetero_async.errors import UserError
from hetero_async.ports import Checkpoint
from hetero_async.replay import replay, start_of
from hetero_async.tensors.model import ServerModel
from hetero_async.tensors.replica import hash_of
from hetero_async.watch.audit import SHORT, short
from hetero_async.watch.words import plain

# Elements compared at once, in fp64.
BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class LeftOut:
    keys: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()

    def has(self, state: State, worker: str) -> bool:
        """Whether the worker's present life is left out."""
        return worker in self.workers or state.members[worker].key in self.keys


def left_out(names: Sequence[str], state: State) -> LeftOut:
    """Those named: by a worker's name, a key, or a key's first characters as `audit` shows them. Raises UserError."""
    keys: list[str] = []
    workers: list[str] = []
    for name in names:
        first = name.removesuffix("…")
        alike = [key for key in state.contributions if key.startswith(first) and len(first) >= SHORT]
        if name in state.contributions:
            keys.append(name)
        elif name in state.members:
            workers.append(name)
        elif len(alike) == 1:
            keys += alike
        else:
            known = ", ".join(f"{given.worker} ({short(key)})" for key, given in state.contributions.items())
            what = "more than one key in this log begins so" if alike else "no such worker or key in this log"
            raise UserError(plain(f"--without {name}: {what}; it has: {known or 'none'}"))
    return LeftOut(tuple(keys), tuple(workers))


@dataclass(slots=True)
class Rebuilt:
    """The run's end, its parameters as they were and as they are without those left out."""

    state: State
    original: ServerModel = field(default_factory=ServerModel)
    model: ServerModel = field(default_factory=ServerModel)
    deltas: int = 0
    samples: int = 0
    steps: int = 0
    steps_changed: int = 0
    steps_skipped: int = 0
    is_initial: bool = False  # the parameters that the run began with came from one left out, and are still in

    def distance(self) -> tuple[float, float]:
        """L2 of the difference, and as a share of the original parameters' norm (0 where that is 0)."""
        original, rebuilt = self.original.theta.numpy(), self.model.theta.numpy()
        difference = norm = 0.0
        for start in range(0, original.size, BLOCK):
            was = original[start : start + BLOCK].astype(numpy.float64)
            moved = was - rebuilt[start : start + BLOCK]
            difference += float(moved @ moved)
            norm += float(was @ was)
        return difference**0.5, (difference / norm) ** 0.5 if norm else 0.0

    def lines(self) -> list[str]:
        """What was left out and how far that leads, for people."""
        distance, share = self.distance()
        told = [
            f"left out         {self.deltas} deltas, {self.samples} samples",
            f"outer steps      {self.steps} in the log, {self.steps_changed} made of fewer deltas, "
            f"{self.steps_skipped} skipped because nothing else was in them",
            f"distance         L2 {distance:.6g} from the run's own parameters, {share:.4%} of their norm",
            f"parameters hash  {hash_of(self.model.theta).hex()} (the run's own: {hash_of(self.original.theta).hex()})",
        ]
        if self.is_initial:
            told.append("note             the run's initial parameters came from one left out; they are still in it")
        return told


def rebuild(
    checkpoint: Checkpoint | None,
    entries: Iterable[Entry],
    out: LeftOut,
    progress: Callable[[int], None],
) -> Rebuilt:
    """Apply the log twice, as it is and without some members' deltas. The same log gives the same bits every time.

    Raises UserError when the checkpoint holds contributions of those left out, LogCorrupt as `replay` does.
    """
    start = start_of(checkpoint)
    _check_start(start, out)
    rebuilt = Rebuilt(start)
    kept = dict(start.pending)
    if checkpoint is not None:
        rebuilt.model.load(checkpoint.model)

    initial = ""

    def seen(entry: Entry, state: State) -> None:
        nonlocal initial
        progress(entry.lsn)
        match entry.record:
            case Genesis() as genesis:
                initial = genesis.key
                rebuilt.model.apply(entry)
            case Settings():
                rebuilt.model.apply(entry)
            case Delta() as delta if out.has(state, delta.worker):
                rebuilt.deltas += 1
                rebuilt.samples += ranges.size(delta.ranges)
            case Delta():
                kept[entry.lsn] = state.pending[entry.lsn]
                rebuilt.model.apply(entry)
            case Stepped() as stepped:
                _step(rebuilt, entry, stepped, kept, state, out)

    rebuilt.state = replay(checkpoint, entries, rebuilt.original, seen)
    if rebuilt.state.settings is None:
        raise UserError("the log holds no parameters yet: no worker has joined the run")
    given = rebuilt.state.contributions.get(initial)
    rebuilt.is_initial = initial in out.keys or (given is not None and given.worker in out.workers)
    return rebuilt


def _check_start(start: State, out: LeftOut) -> None:
    """A checkpoint's parameters are a sum that nobody can take apart."""
    held = {short(key): start.contributions[key].deltas for key in out.keys if key in start.contributions}
    held |= {worker: start.members[worker].deltas for worker in out.workers if worker in start.members}
    for name, deltas in held.items():
        if deltas:
            raise UserError(
                f"the log begins behind the checkpoint at record {start.lsn}, and {deltas} deltas of {plain(name)} are "
                "in that for good: use a copy of the run's directory from before they came; a log that is kept whole "
                "(keep_log = true under [server] in run.toml) can always do it"
            )


def _step(
    rebuilt: Rebuilt, entry: Entry, stepped: Stepped, kept: dict[int, PendingDelta], state: State, out: LeftOut
) -> None:
    """The outer step as the server would have made it of what is left."""
    assert state.settings is not None
    merged = {lsn: kept.pop(lsn) for lsn in stepped.deltas if lsn in kept}
    active = [worker for worker in state.active if not out.has(state, worker)]
    rebuilt.steps += 1
    if not merged:
        rebuilt.steps_skipped += 1
        return
    if len(merged) < len(stepped.deltas) or len(active) < len(state.active):
        weights = merging.weights_of(merged.values(), active, stepped.version - 1, state.settings)
        rebuilt.steps_changed += len(merged) < len(stepped.deltas)
        stepped = replace(stepped, deltas=tuple(merged), weights=weights)
    rebuilt.model.apply(replace(entry, record=stepped))
