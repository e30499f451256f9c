"""The demos count over kills, and kill a site at one stroke."""

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
from etcd_local import LocalCluster

from hetero_async.complaints import SERVER


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
