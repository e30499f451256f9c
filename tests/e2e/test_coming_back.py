"""A worker that is started again goes on with what it knew."""

from pathlib import Path

from e2e import variants
from e2e.harness import Run

from hetero_async.core.records import Joined


def lives(run: Run, worker: str) -> list[Joined]:
    joined = [entry.record for entry in run.entries() if isinstance(entry.record, Joined)]
    return [record for record in joined if record.worker == worker]


def test_a_killed_worker_goes_on_with_its_optimizers_state_and_counts_in_full(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with Run(tmp_path / "run") as run:
        victim, other = run.names
        kept = run.config.worker_directory(victim) / "optimizer.kept"
        run.start_server()
        run.start_worker(other, awaited=run.names, step_seconds=0.005, hold=str(hold), hold_after=20)
        life = run.start_worker(victim, variants.train_keeping, awaited=run.names, step_seconds=0.005)
        run.wait(kept.exists, "the victim has kept its optimizer's state")
        hold.touch()
        life.kill()
        second = run.start_worker(victim, variants.train_keeping, step_seconds=0.005)
        run.wait(lambda: len(lives(run, victim)) == 2, "its second life has joined")
        hold.unlink()
        run.finish(run.lives[0], run.lives[1], second)
        assert [record.is_warm for record in lives(run, victim)] == [False, True]
        assert [record.is_warm for record in lives(run, other)] == [False]
        assert f"{victim}: the optimizer goes on with {kept}" in second.said
        assert run.results(victim)["first_count"] > 1, "Adam counts on"
