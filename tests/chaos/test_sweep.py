"""The server dies at every single call by which it changes its disk: before it, in the middle of a write, and after it.

A dry run counts the calls of each kind. Then one run for each of them: the server is killed at that call, started
again, and the run goes on to its end; the harness judges each. Waiting is most of a run's time, so several go at once.
"""

import json
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from e2e.harness import Run
from e2e.lives import CALLS, Fault

from hetero_async.core.records import Delta

AT_ONCE = 4
# What a server does to its disk while it keeps its log; if it does not, it deletes segments as well.
CALLS_WITH_LOG = {"write", "fdatasync", "fsync", "fallocate", "truncate", "rename", "rmtree"}
# A death right after any other call is the death before the next one.
MAKES_DURABLE = {"fdatasync", "rename", "unlink", "rmtree"}
SHORT: dict[str, Any] = {"samples": 96, "seconds_per_round": 0.06, "steps_per_round": 4}
# Six batches of one worker in rounds of two steps, each of them a merge; with a checkpoint for each, the first one is
# dropped for the third (an rmtree).
THREE_MERGES: dict[str, Any] = {"workers": 1, "samples": 48, "merge": "all", "steps_per_round": 2}
# Small enough that a run of a hundred records fills several.
SMALL_SEGMENT_BYTES = 8 * 1024
STEP_SECONDS = 0.004


def short_run(directory: Path, keep_log: bool, training: dict[str, Any] = SHORT) -> Run:
    return Run(directory, **training, server={"checkpoint_every": 1, "keep_log": keep_log})


def calls_of_a_run(directory: Path, keep_log: bool) -> Counter[str]:
    with short_run(directory, keep_log, THREE_MERGES) as run:
        server = run.start_server(segment_bytes=SMALL_SEGMENT_BYTES, skips_no_checkpoint=True)
        run.start_together(step_seconds=STEP_SECONDS)
        run.finish()
        assert server.exit_code == 0
        return Counter(json.loads((run.config.directory / CALLS).read_text()))


def dies_and_goes_on(directory: Path, keep_log: bool, fault: Fault) -> bool:
    """Whether the fault struck; a run may be over before its last calls are reached."""
    with short_run(directory, keep_log, THREE_MERGES) as run:
        server = run.start_server(fault=fault, segment_bytes=SMALL_SEGMENT_BYTES, skips_no_checkpoint=True)
        workers = run.start_together(step_seconds=STEP_SECONDS)
        if (code := server.ending()) == 0:
            run.finish(workers)
            return False
        assert code == -signal.SIGKILL, run.story()
        run.finish(run.start_server(segment_bytes=SMALL_SEGMENT_BYTES), workers)
        return True


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "keep_log"), [("die", False), ("die after", True)])
def test_a_server_that_dies_at_any_disk_call_loses_nothing(tmp_path: Path, kind: str, keep_log: bool) -> None:
    calls = calls_of_a_run(tmp_path / "dry", keep_log)
    assert set(calls) == (CALLS_WITH_LOG if keep_log else CALLS_WITH_LOG | {"unlink"})

    def sweep(fault: Fault) -> bool:
        try:
            return dies_and_goes_on(tmp_path / f"{fault.only}-{fault.at}", keep_log, fault)
        except BaseException as error:
            error.add_note(f"with the server dying at {fault.only} number {fault.at} ({kind}, {keep_log=})")
            raise

    swept = [name for name in calls.elements() if kind == "die" or name in MAKES_DURABLE]
    faults = [Fault(kind=kind, only=name, at=swept[: place + 1].count(name)) for place, name in enumerate(swept)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        struck = {fault for fault, is_struck in zip(faults, pool.map(sweep, faults), strict=True) if is_struck}
    print(f"{calls.total()} calls in the dry run; the server died at {len(struck)} of {len(faults)}")
    assert {fault.only for fault in struck} == set(swept), "each kind of call at least once"
    assert len(struck) > 0.8 * len(faults)


@pytest.mark.parametrize("call", [8, 17, 40])
def test_a_full_disk_pauses_the_run_and_nothing_is_lost(tmp_path: Path, call: int) -> None:
    with short_run(tmp_path / "run", keep_log=True) as run:
        server = run.start_server(fault=Fault(kind="full", at=call), segment_bytes=SMALL_SEGMENT_BYTES)
        run.start_together(step_seconds=STEP_SECONDS)
        run.finish()
        assert "no space left to write" in server.said


def test_a_disk_that_is_full_from_the_start_is_waited_for(tmp_path: Path) -> None:
    with short_run(tmp_path / "run", keep_log=True) as run:
        server = run.start_server(fault=Fault(kind="full", at=1))
        run.start_together(step_seconds=STEP_SECONDS)
        run.finish()
        assert f"log paused reason=no space left to write {run.config.log}" in server.said
        assert server.said.count("log paused") == server.said.count("log resumed") == 1


def test_a_failing_fdatasync_ends_the_server_at_once_and_a_restart_is_fine(tmp_path: Path) -> None:
    with short_run(tmp_path / "run", keep_log=True) as run:
        server = run.start_server(fault=Fault(kind="fail", at=9, only="fdatasync"))
        workers = run.start_together(step_seconds=STEP_SECONDS)
        assert server.ending() == 74
        assert "the disk failed: " in server.said.splitlines()[-1]
        assert "stopping at once, restart when it is repaired" in server.said.splitlines()[-1]
        run.finish(run.start_server(), workers)


def test_a_checkpoint_that_the_disk_does_not_take_keeps_no_acknowledgement_waiting(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with short_run(tmp_path / "run", keep_log=True, training={"merge": "per-push", "steps_per_round": 2}) as run:
        hold.touch()
        server = run.start_server(hold_checkpoints=str(hold), exit_when_finished=False)
        for worker in run.start_workers(step_seconds=STEP_SECONDS):
            assert worker.ending() == 0, run.story()
        assert "checkpoint lsn=" not in server.said, "all is trained, and not one is written"
        taken_at = int(hold.with_suffix(".reached").read_text())
        later = [entry.record for entry in run.entries() if entry.lsn > taken_at and isinstance(entry.record, Delta)]
        assert len(later) > 10
        assert all(delta.seq in run.acknowledged(delta.worker) for delta in later)
        hold.unlink()
        run.wait(lambda: f"checkpoint lsn={taken_at}" in server.said, "the checkpoint is written")
        server.signal(signal.SIGTERM)
        run.finish()
