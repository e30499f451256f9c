"""verify finds what is wrong with a log, and says nothing against a good one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import SmallRun

from hetero_async.core.records import Beacon, Delta, Entry, Stepped
from hetero_async.core.state import State
from hetero_async.errors import LogCorrupt
from hetero_async.ports import Checkpoint
from hetero_async.tensors.model import ServerModel
from hetero_async.watch.verify import Verdict, verify


@pytest.fixture
def run() -> SmallRun:
    run = SmallRun()
    run.join("a-0")
    run.join("b-0")
    for codec in ("fp32", "bf16", "int8", "int4"):
        run.push("a-0", codec)
        run.push("b-0", codec)
    return run


def noted(directory: Path, run: SmallRun) -> list[Path]:
    """The workers' own notes, as their outboxes keep them."""
    for worker, seq, payload_hash in run.acks:
        path = directory / worker / "acknowledged.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as notes:
            notes.write(json.dumps({"seq": seq, "payload_hash": payload_hash}) + "\n")
    return sorted(directory.glob("*/acknowledged.jsonl"))


def verified(entries: list[Entry], outboxes: list[Path] | None = None, start: Checkpoint | None = None) -> Verdict:
    return verify(start, entries, ServerModel(), outboxes or [], lambda _: None)


def test_a_note_that_was_cut_in_two_says_nothing(run: SmallRun, tmp_path: Path) -> None:
    notes = noted(tmp_path, run)
    notes[0].write_bytes(notes[0].read_bytes()[:-5])
    verdict = verified(run.entries, notes)
    assert (verdict.is_ok, verdict.acknowledged) == (True, 7)


def test_a_good_log_is_found_good_and_comes_out_as_the_server_was(run: SmallRun, tmp_path: Path) -> None:
    verdict = verified(run.entries, noted(tmp_path, run))
    assert verdict.is_ok
    assert (len(verdict.deltas), verdict.acknowledged, verdict.samples, verdict.samples_twice) == (8, 8, 64, 0)
    assert verdict.state.digest() == run.server.state.digest()
    assert verdict.model_hash == run.model.model_hash()
    assert verdict.beacons == sum(isinstance(entry.record, Beacon) for entry in run.entries) > 0


def test_an_acknowledged_delta_that_the_log_has_not_is_lost(run: SmallRun, tmp_path: Path) -> None:
    first = next(i for i, entry in enumerate(run.entries) if entry.lsn > 10 and isinstance(entry.record, Delta))
    verdict = verified(run.entries[:first], noted(tmp_path, run))
    assert not verdict.is_ok
    assert len(verdict.lost) == len(run.acks) - len(verdict.deltas) > 0


def test_other_bytes_under_an_acknowledged_number_are_a_loss(run: SmallRun, tmp_path: Path) -> None:
    worker, seq, _ = run.acks[0]
    run.acks[0] = (worker, seq, "00" * 16)
    assert verified(run.entries, noted(tmp_path, run)).lost == [(worker, seq)]


@pytest.mark.parametrize(
    ("kind", "change", "complaint"),
    [
        (Delta, {"ranges": ((0, 1), (1000, 1001))}, "cannot be: only leased positions are trained"),
        (Delta, {"seq": 0}, "cannot be: a worker's deltas are admitted once"),
        (Delta, {"anchor_version": 99}, "cannot be: no delta is staler than the bound"),
        (Stepped, {"gain": 0.5}, "the parameters differ from those that were logged"),
        (Beacon, {"state_hash": b"0" * 16}, "cannot be: the state before record"),
        (Beacon, {"model_hash": b"0" * 16}, "the parameters differ from those that were logged"),
    ],
)
def test_a_record_that_cannot_be_halts_verification(
    run: SmallRun, kind: type, change: dict[str, object], complaint: str
) -> None:
    index = next(i for i, entry in enumerate(run.entries) if isinstance(entry.record, kind))
    entry = run.entries[index]
    run.entries[index] = replace(entry, record=replace(entry.record, **change))  # type: ignore[type-var]
    with pytest.raises(LogCorrupt, match=complaint):
        verified(run.entries)


def test_a_payload_that_was_exchanged_shows_in_the_next_hash(run: SmallRun) -> None:
    deltas = [i for i, entry in enumerate(run.entries) if isinstance(entry.record, Delta)]
    entry = run.entries[deltas[4]]
    run.entries[deltas[4]] = replace(entry, payload=run.entries[deltas[5]].payload)
    with pytest.raises(LogCorrupt, match="the parameters differ"):
        verified(run.entries)


def test_what_a_checkpoint_covers_is_judged_by_its_dedupe_table(run: SmallRun, tmp_path: Path) -> None:
    cut = len(run.entries) // 2
    model, state = ServerModel(), State()
    for entry in run.entries[:cut]:
        state.fold(entry)
        model.apply(entry)
    checkpoint = Checkpoint(
        run="small",
        lsn=state.lsn,
        term=1,
        chain=bytes(16),
        state=json.loads(json.dumps(state.dump())),
        state_hash=state.digest(),
        model=model.snapshot(),
    )
    verdict = verified(run.entries[cut:], noted(tmp_path, run), checkpoint)
    assert verdict.is_ok
    assert verdict.model_hash == run.model.model_hash()


def test_a_damaged_checkpoint_is_not_believed(run: SmallRun) -> None:
    checkpoint = Checkpoint(
        run="small",
        lsn=1,
        term=1,
        chain=bytes(16),
        state=State().dump(),
        state_hash=b"0" * 16,
        model=run.model.snapshot(),
    )
    with pytest.raises(LogCorrupt, match="does not hash to what its manifest says"):
        verified([], start=checkpoint)
