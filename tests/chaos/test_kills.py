"""Processes killed, stopped and doubled at the worst of moments: nothing acknowledged is lost or counted twice.

Whether it was so is judged by the harness at the end of each run: the log against what workers noted, what servers
promised, and what every life of the server had come to.
"""

import shutil
import signal
from pathlib import Path

import pytest
from e2e import tiny
from e2e.harness import Life, Run
from e2e.lives import WITHHOLD, worker_life

from hetero_async.core import ranges
from hetero_async.core.records import Joined, Leased, Left
from hetero_async.core.server import STRETCH

STEPS_PER_ROUND = 8


def test_a_worker_killed_in_the_middle_of_a_step_comes_back(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with Run(tmp_path / "run") as run:
        victim, other = run.names
        run.start_server()
        run.start_worker(other, awaited=run.names, step_seconds=0.005)
        life = run.start_worker(victim, awaited=run.names, step_seconds=0.005, hold=str(hold))
        run.wait(lambda: run.deltas(victim), "the victim has pushed")
        hold.touch()
        run.wait(Path(f"{hold}.reached-{victim}").exists, "the victim stands between backward and step")
        life.kill()
        hold.unlink()
        run.start_worker(victim)
        verdict = run.finish(*run.lives[:2], run.lives[-1])
        assert verdict.state.members[victim].incarnation == 2
        assert verdict.samples == 1600


def test_a_delta_that_was_admitted_but_not_acknowledged_is_sent_again_and_counted_once(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with Run(tmp_path / "run", codec_up="2bit", codec_down="e3m0") as run:
        victim, other = run.names
        withhold = run.config.directory / WITHHOLD
        run.start_server()
        run.start_worker(other, step_seconds=0.005, hold=str(hold))
        run.wait(lambda: run.deltas(other), "the run has begun")
        hold.touch()
        withhold.touch()
        life = run.start_worker(victim, step_seconds=0.01)
        [first, *_] = run.wait(lambda: run.deltas(victim), "the victim's delta is in the log")
        life.kill()
        assert first.seq in [int(name.split(".")[0]) for name in run.unanswered(victim)]
        assert first.seq not in run.acknowledged(victim)
        assert (run.config.worker_directory(victim) / "residual.kept").exists()
        withhold.unlink()
        hold.unlink()
        run.start_worker(victim)
        run.finish(run.lives[0], run.lives[1], run.lives[-1])
        assert first.seq in run.acknowledged(victim), "the second life was told that it is in"
        assert [delta.seq for delta in run.deltas(victim)].count(first.seq) == 1
        assert not run.unanswered(victim)


@pytest.mark.parametrize("number", [1, 2, 5, 8])
def test_a_server_killed_between_fsync_and_acknowledgement_admits_the_delta_once(tmp_path: Path, number: int) -> None:
    with Run(tmp_path / "run", server={"checkpoint_every": 1}) as run:
        server = run.start_server(die_after_delta=number)
        run.start_workers(step_seconds=0.002)
        assert server.ending() == -signal.SIGKILL
        admitted = [(delta.worker, delta.seq) for delta in run.deltas()]
        assert len(admitted) >= number
        unanswered = [(worker, int(name.split(".")[0])) for worker in run.names for name in run.unanswered(worker)]
        assert admitted[number - 1] in unanswered, "it is durable, and nobody knows yet"
        run.start_server()
        verdict = run.finish(*run.lives[1:])
        assert set(admitted) <= verdict.deltas.keys()


def test_server_and_worker_killed_together_after_fsync_find_each_other_again(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        victim, other = run.names
        server = run.start_server(die_after_delta=4, take_along=victim)
        life = run.start_worker(victim, awaited=run.names, step_seconds=0.002)
        run.start_worker(other, awaited=run.names, step_seconds=0.002)
        assert (server.ending(), life.ending()) == (-signal.SIGKILL, -signal.SIGKILL)
        admitted = {(delta.worker, delta.seq) for delta in run.deltas()}
        run.start_worker(victim)  # before there is a server to come back to
        run.start_server()
        verdict = run.finish(*run.lives[2:])
        assert admitted <= verdict.deltas.keys()
        assert verdict.state.members[victim].incarnation >= 2


def test_all_processes_killed_at_once_again_and_again(tmp_path: Path) -> None:
    with Run(tmp_path / "run", samples=2400) as run:
        for reign in range(3):
            admitted = len(run.deltas())
            lives = [run.start_server(), *run.start_workers(step_seconds=0.005)]
            run.wait(lambda: len(run.deltas()) >= admitted + 3, f"reign {reign} admits deltas")  # noqa: B023
            for life in lives:
                life.signal(signal.SIGKILL)
            for life in lives:
                life.kill()
        lives = [run.start_server(), *run.start_workers()]
        assert run.finish(*lives).samples == 2400


def test_a_worker_stopped_beyond_its_lease_rejoins_and_its_late_delta_counts_at_most_once(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with Run(tmp_path / "run", samples=2400) as run:
        sleeper, other = run.names
        run.start_server()
        asleep = run.start_worker(sleeper, awaited=run.names, step_seconds=0.005)
        run.start_worker(other, awaited=run.names, step_seconds=0.005, hold=str(hold))
        run.wait(lambda: run.deltas(sleeper), "the sleeper has pushed")
        hold.touch()  # so that the run does not end without the sleeper
        asleep.signal(signal.SIGSTOP)
        silent = Left(worker=sleeper, reason="not heard for 3 s")
        run.wait(lambda: silent in run.records(Left), "the server gives the sleeper up")
        before = len(run.deltas(other))
        hold.unlink()
        run.wait(lambda: len(run.deltas(other)) >= before + 2, "the other goes on, with the sleeper's samples too")
        hold.touch()
        asleep.signal(signal.SIGCONT)
        back = [2]
        run.wait(
            lambda: back == [joined.incarnation for joined in run.records(Joined) if joined.worker == sleeper][1:],
            "the sleeper is back",
        )
        hold.unlink()
        verdict = run.finish()
        assert verdict.samples == 2400
        assert not run.unanswered(sleeper)


def test_a_server_stopped_for_longer_than_a_lease_loses_nobody_for_good(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        server = run.start_server()
        run.start_workers(step_seconds=0.005)
        run.wait(lambda: all(run.deltas(worker) for worker in run.names), "both are at work")
        server.signal(signal.SIGSTOP)
        run.wait(lambda: all(run.unanswered(worker) for worker in run.names), "both have a delta to deliver")
        server.signal(signal.SIGCONT)
        assert run.finish().samples == 1600


def test_a_worker_trains_on_while_the_server_is_frozen_until_its_round_is_four_times_as_long(tmp_path: Path) -> None:
    rounds = {"merge": "per-push", "steps_per_round": STEPS_PER_ROUND}
    with Run(tmp_path / "run", workers=1, **rounds) as run:
        [worker] = run.names
        server = run.start_server()
        run.start_worker(worker, step_seconds=0.02)

        def samples_left() -> int:
            leased = sum(ranges.size(lease.ranges) for lease in run.records(Leased))
            return leased - sum(ranges.size(delta.ranges) for delta in run.deltas())

        most = (STRETCH + 2) * STEPS_PER_ROUND * tiny.BATCH
        run.wait(lambda: samples_left() >= most, "its speed is known, and its samples follow it")
        pushed = len(run.deltas())
        run.wait(lambda: len(run.deltas()) > pushed, "they have come to it")
        server.signal(signal.SIGSTOP)
        before = len(run.heartbeats(worker))

        def stays_at() -> int:
            last, *others = reversed(run.heartbeats(worker)[before:] or [(0, "")])
            return last[0] if last[1] == "waiting for the server" and last in others else 0

        steps = run.wait(stays_at, "it has done all that it may, and says what it waits for")
        [unanswered] = run.unanswered(worker)
        server.signal(signal.SIGCONT)
        assert run.finish().samples == 1600
        seq = int(unanswered.split(".")[0])
        steps_of = {delta.seq: delta.steps for delta in run.deltas()}
        assert steps == sum(steps_of[number] for number in range(1, seq + 1)) + STRETCH * STEPS_PER_ROUND
        assert steps_of[seq + 1] > STRETCH * STEPS_PER_ROUND, "one round, though four times as long"


def test_of_two_processes_with_one_key_the_older_stops_and_says_why(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with Run(tmp_path / "run", samples=2400) as run:
        name = run.names[0]
        run.start_server()
        older, _ = run.start_workers(step_seconds=0.005, hold=str(hold))
        run.wait(lambda: run.deltas(name), "the older has pushed")
        hold.touch()
        clone = clone_of(run, tmp_path / "clone")
        run.lives.append(clone)
        run.wait(lambda: any(joined.incarnation == 2 for joined in run.records(Joined)), "the clone joins")
        hold.unlink()
        assert older.ending() == 1
        reason = f"another process with the key of {name} has joined since; this one must stop"
        assert older.said.splitlines()[-1].endswith(f"RefusedError: {reason}")
        run.finish()
        admitted = {(delta.seq, delta.incarnation) for delta in run.deltas(name)}
        assert len(admitted) == len(run.deltas(name))
        assert {incarnation for _, incarnation in admitted} == {1, 2}


def clone_of(run: Run, directory: Path) -> Life:
    """The first worker on another machine: its key was copied, its outbox was not."""
    shutil.copytree(run.config.keys, directory / "keys")
    shutil.copy(run.config.path, directory)
    output = directory / "clone.output"
    toml = str(directory / "run.toml")
    return Life("clone", output, worker_life, toml, run.names[0], str(output), tiny.train, (), {"step_seconds": 0.005})
