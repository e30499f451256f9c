"""The server dies at every single call by which it changes its disk: before it, in the middle of a write, and after it.

A dry run counts the calls. Then one run for each of them: the server is killed at that call, started again, and the run
goes on to its end; the harness judges each. Waiting is most of a run's time, so several go on at once.
"""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from e2e.harness import Run
from e2e.lives import CALLS, Fault

AT_ONCE = 4
# A death right after any other call is the death before the next one.
MAKES_DURABLE = {"fdatasync", "rename", "unlink", "rmtree"}
SHORT: dict[str, Any] = {"samples": 96, "seconds_per_round": 0.06, "steps_per_round": 4}
# Small enough that a run of a hundred records fills several.
SMALL_SEGMENT_BYTES = 8 * 1024
STEP_SECONDS = 0.004


def short_run(directory: Path, keep_log: bool) -> Run:
    return Run(directory, **SHORT, server={"checkpoint_every": 1, "keep_log": keep_log})


def calls_of_a_run(directory: Path, keep_log: bool) -> list[str]:
    with short_run(directory, keep_log) as run:
        server = run.start_server(segment_bytes=SMALL_SEGMENT_BYTES)
        run.start_together(step_seconds=STEP_SECONDS)
        run.finish()
        assert server.exit_code == 0
        calls: list[str] = json.loads((run.config.directory / CALLS).read_text())
        return calls


def dies_and_goes_on(directory: Path, keep_log: bool, fault: Fault) -> bool:
    """Whether the fault struck; a run may be over before its last calls are reached."""
    with short_run(directory, keep_log) as run:
        server = run.start_server(fault=fault, segment_bytes=SMALL_SEGMENT_BYTES)
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
    assert {"write", "fdatasync", "fsync", "fallocate", "truncate", "rename", "rmtree"} <= set(calls), set(calls)
    assert ("unlink" in calls) is not keep_log

    def sweep(call: int) -> bool:
        try:
            return dies_and_goes_on(tmp_path / f"call-{call}", keep_log, Fault(kind=kind, at=call))
        except BaseException as error:
            error.add_note(f"with the server dying at disk call {call} ({kind}, {keep_log=})")
            raise

    with ThreadPoolExecutor(AT_ONCE) as pool:
        chosen = [number for number, name in enumerate(calls, 1) if kind == "die" or name in MAKES_DURABLE]
        struck = list(pool.map(sweep, chosen))
    print(f"{len(calls)} calls in the dry run; the server died at {sum(struck)} of {len(struck)}")
    assert sum(struck) > 0.8 * len(struck)


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
