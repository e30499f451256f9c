"""Recomputes a run from its log and says what was checked: the proof behind every promise about the log.

Reads only; the server may be running. Called by `hetero-async verify`.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from hetero_async.core import ranges
from hetero_async.core.ranges import Ranges
from hetero_async.core.records import Beacon, Delta, Entry, Stepped
from hetero_async.core.state import State
from hetero_async.errors import LogCorrupt
from hetero_async.ports import Checkpoint, Model
from hetero_async.replay import replay


@dataclass(slots=True)
class Verdict:
    """What the log holds. `lost` and `twice` are empty in a log that keeps its promises."""

    from_lsn: int = 0
    records: int = 0
    beacons: int = 0
    steps: int = 0
    samples: int = 0
    samples_twice: int = 0
    staleness_max: int = 0
    deltas: dict[tuple[str, int], str] = field(default_factory=dict)  # worker, seq → payload hash
    deltas_twice: list[tuple[str, int]] = field(default_factory=list)
    acknowledged: int = 0
    lost: list[tuple[str, int]] = field(default_factory=list)
    state: State = field(default_factory=State)
    model_hash: bytes = b""

    @property
    def is_ok(self) -> bool:
        return not (self.lost or self.deltas_twice or self.samples_twice) and self.state.ledger.is_exact()

    def lines(self) -> list[str]:
        """What was checked and what came of it, for people."""
        start = f"the checkpoint at record {self.from_lsn}" if self.from_lsn else "genesis"
        return [
            f"records     {self.records} applied from {start} to record {self.state.lsn}, chain and checksums good",
            f"deltas      {len(self.deltas)} admitted, {len(self.deltas_twice)} of them twice, "
            f"stalest {self.staleness_max} versions",
            f"outboxes    {self.acknowledged} acknowledgements noted by workers, {len(self.lost)} of them lost",
            f"samples     {self.samples} trained, {self.samples_twice} counted twice; leased + free + trained = all",
            f"hashes      {self.beacons} of state and parameters recomputed, all equal",
            f"version     {self.state.version} after {self.steps} outer steps",
            f"state hash  {self.state.digest().hex()}",
            f"model hash  {self.model_hash.hex()}",
            f"verify      {'ok' if self.is_ok else 'FAILED'}",
        ]


def verify(
    checkpoint: Checkpoint | None,
    entries: Iterable[Entry],
    model: Model,
    outboxes: Iterable[Path],
    progress: Callable[[int], None],
) -> Verdict:
    """Fold and apply the whole log, hold every Beacon and every worker's note of an acknowledgement against it.

    Raises LogCorrupt where the log contradicts itself: a wrong state hash, a position trained without a lease, a
    delta staler than the bound.
    """
    verdict = Verdict(from_lsn=checkpoint.lsn if checkpoint else 0)
    trained: Ranges = ()

    def seen(entry: Entry, state: State) -> None:
        nonlocal trained
        verdict.records += 1
        progress(entry.lsn)
        match entry.record:
            case Delta() as delta:
                key = (delta.worker, delta.seq)
                if key in verdict.deltas:
                    verdict.deltas_twice.append(key)
                verdict.deltas[key] = delta.payload_hash.hex()
                consumed = ranges.normal(delta.ranges)
                verdict.samples += ranges.size(consumed)
                verdict.samples_twice += ranges.size(ranges.intersection(trained, consumed))
                trained = ranges.union(trained, consumed)
                verdict.staleness_max = max(verdict.staleness_max, state.staleness(delta.anchor_version))
            case Stepped():
                verdict.steps += 1
            case Beacon():
                verdict.beacons += 1
        if not state.ledger.is_exact():
            raise LogCorrupt(f"record {entry.lsn}: leased, free and trained positions do not add up")

    verdict.state = replay(checkpoint, entries, model, seen)
    verdict.model_hash = model.model_hash()
    for outbox in outboxes:
        _hold_against(verdict, outbox, checkpoint)
    return verdict


def _hold_against(verdict: Verdict, outbox: Path, checkpoint: Checkpoint | None) -> None:
    """Every delta that a worker noted as acknowledged must be in the log with the same bytes.

    What the oldest checkpoint covers is judged by its dedupe table: those records may be gone from the log.
    """
    worker = outbox.parent.name
    covered = State.load(checkpoint.state).members.get(worker) if checkpoint else None
    whole = outbox.read_bytes().rpartition(b"\n")[0]  # a line without an end is being written, or was when power went
    for line in whole.splitlines():
        note = json.loads(line)
        verdict.acknowledged += 1
        is_covered = covered is not None and note["seq"] <= covered.last_seq
        if not is_covered and verdict.deltas.get((worker, note["seq"])) != note["payload_hash"]:
            verdict.lost.append((worker, note["seq"]))
