"""The demos count over kills, kill a site at one stroke, and end badly when their report shows a broken promise."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import run_failover
import run_local
import trio
from conductor import Promise, broken, end, errors_in_one_line
from etcd_local import LocalCluster

from hetero_async.complaints import SERVER
from hetero_async.errors import LogCorrupt

LOCAL = {
    "deltas_lost": 0,
    "samples_counted_twice": 0,
    "verify": "ok",
    "loss_end": 2.2,
    "samples_trained": run_local.SAMPLES,
}
FAILOVER = {
    "acknowledged_lost": 0,
    "samples_counted_twice": 0,
    "verify": "ok",
    "takeover_seconds": 5.0,
    "old_server_level": True,
}


@pytest.mark.parametrize(("report", "promises"), [(LOCAL, run_local.PROMISES), (FAILOVER, run_failover.PROMISES)])
def test_a_demo_whose_promises_are_kept_ends_well(report: dict[str, Any], promises: tuple[Promise, ...]) -> None:
    end(report, promises)


@pytest.mark.parametrize(
    ("promises", "report", "told"),
    [
        (run_local.PROMISES, LOCAL | {"deltas_lost": 3}, "3 acknowledged deltas were lost"),
        (run_local.PROMISES, LOCAL | {"samples_counted_twice": 8}, "8 samples counted twice"),
        (run_local.PROMISES, LOCAL | {"verify": "failed"}, "verify failed"),
        (run_local.PROMISES, LOCAL | {"loss_end": 2.2001}, "the validation loss is 2.2001 at the end, above 2.2"),
        (run_local.PROMISES, LOCAL | {"loss_end": float("nan")}, "the validation loss is nan at the end, above 2.2"),
        (run_failover.PROMISES, FAILOVER | {"acknowledged_lost": 1}, "1 acknowledged deltas were lost"),
        (run_failover.PROMISES, FAILOVER | {"samples_counted_twice": 8}, "8 samples counted twice"),
        (run_failover.PROMISES, FAILOVER | {"verify": "failed"}, "verify failed"),
        (run_failover.PROMISES, FAILOVER | {"takeover_seconds": 5.01}, "the takeover lasted 5.01 s, above 5"),
        (run_failover.PROMISES, FAILOVER | {"old_server_level": False}, "the old server is not level with the new one"),
    ],
)
def test_a_demo_that_broke_a_promise_names_it_and_ends_badly(
    promises: tuple[Promise, ...], report: dict[str, Any], told: str
) -> None:
    assert broken(report, promises) == [told]
    with pytest.raises(SystemExit) as ending:
        end(report, promises)
    assert ending.value.code == f"error: a promise was broken: {told}"


def test_several_broken_promises_are_one_line_and_a_short_demo_promises_no_loss() -> None:
    worst = LOCAL | {"deltas_lost": 2, "verify": "failed", "loss_end": 5.5}
    with pytest.raises(SystemExit, match=r"2 acknowledged deltas were lost; verify failed; .* above 2\.2$"):
        end(worst, run_local.PROMISES)
    assert broken(LOCAL | {"loss_end": 5.5, "samples_trained": 9000}, run_local.PROMISES) == []


def test_what_a_demo_dies_of_is_one_line_however_deep_it_happened() -> None:
    deep = ExceptionGroup("of a nursery", [ExceptionGroup("of another", [LogCorrupt("record 7 is damaged")])])
    for error in (deep, LogCorrupt("record 7 is damaged")):
        with pytest.raises(SystemExit) as ending, errors_in_one_line():
            raise error
        assert ending.value.code == "error: record 7 is damaged"


@pytest.fixture
def sleepers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whatever a demo starts, a member of etcd as well, sleeps until it is killed."""
    program = tmp_path / "bin" / "etcd"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec sleep 300\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return program


def status(refused: int, bytes_up: int) -> dict[str, Any]:
    return {
        "metrics": {}, "trained": 7, "positions": 10,
        "deltas": {"refused": refused}, "bytes": {"up": bytes_up, "down": 1000},
    }  # fmt: skip


@pytest.mark.usefixtures("sleepers")
def test_what_a_server_had_counted_before_it_was_killed_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_local, "SERVER_AWAY_SECONDS", 0.0)
    conductor = run_local.TwoKills(run_local.prepare(tmp_path / "run", 1000))
    story = conductor.story
    story.killed("worker")
    conductor.start_server()
    first = conductor.processes["server"]
    for seen in (status(2, 10), status(3, 20)):
        story.see(seen)
    try:
        assert not trio.run(conductor.act)
        assert first.returncode == -signal.SIGKILL and conductor.processes["server"].poll() is None
        assert story.counted == {"deltas_refused": 3, "bytes_wire": 1020}, "not heard of the new one yet"
        story.see(status(1, 5))
        assert story.counted == {"deltas_refused": 4, "bytes_wire": 2025}
    finally:
        conductor.kill("server")


@pytest.mark.usefixtures("sleepers")
def test_a_site_is_struck_whole_before_anybody_of_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalClusterOfSleepers(tmp_path / "etcd") as cluster:
        conductor = run_failover.SiteLoss(run_failover.prepare(tmp_path / "run", 1000, cluster.urls), cluster)
        conductor.start(SERVER)
        conductor.start(run_failover.LOST_SITE, group=conductor.processes[SERVER].pid)
        killed = [*conductor.processes.values(), cluster._processes[run_failover.LOST_MEMBER]]
        order: list[str] = []
        note(order, monkeypatch, os, "killpg")
        note(order, monkeypatch, subprocess.Popen, "kill")
        note(order, monkeypatch, subprocess.Popen, "wait")
        conductor._lose_site()
        assert order == ["killpg", "kill", "wait", "wait", "wait"]
        assert [process.returncode for process in killed] == [-signal.SIGKILL] * 3
        assert len(conductor.processes) == 0 and len(cluster._processes) == 2


class LocalClusterOfSleepers(LocalCluster):
    def await_ready(self) -> None:
        """They never answer."""


def note(order: list[str], monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    """Have each call of it noted, and made."""
    call = getattr(owner, name)

    def noted(*arguments: Any, **options: Any) -> Any:
        order.append(name)
        return call(*arguments, **options)

    monkeypatch.setattr(owner, name, noted)
