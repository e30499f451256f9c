"""Lightning: a module trained on leased samples, by a callback."""

from pathlib import Path

from e2e.harness import Run
from integrations import scripts

from hetero_async.core.records import Metric


def test_a_module_is_trained_to_the_end_of_the_run(tmp_path: Path) -> None:
    with Run(tmp_path / "run", workers=1, samples=1600) as run:
        run.start_server()
        run.start_workers(scripts.run, example="lightning_module")
        verdict = run.finish()
        result = run.results(run.names[0])
        assert verdict.samples == 1600 and verdict.samples_twice == 0
        assert verdict.state.members[run.names[0]].steps == result["steps"] == 1600 / 16
        assert result["learning_rate"] < 0.5e-2, "a cosine from 1e-2 to 0, which lags behind by what is on its way"
        assert result["scheduler"] == "ByProgress"
        assert {metric.name for metric in run.records(Metric)} == {"validation_loss"}
