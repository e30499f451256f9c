"""Three lines in a user's loop: what they take, what they count, and what comes out in the end."""

import json
from pathlib import Path

from e2e import tiny
from e2e.harness import Run


def test_two_workers_train_one_model_to_the_end(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        run.start_server()
        run.start_workers()
        verdict = run.finish()
        assert verdict.samples == 1600
        assert len(verdict.deltas) > 2
        for worker in run.names:
            losses = run.results(worker)["losses"]
            assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
        print(run.story())
        print(json.dumps(run.results("here-0"))[:300])
        assert 0
