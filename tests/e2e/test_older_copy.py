"""A server whose log is an older copy, with real processes: it halts, and goes on when the operator says so."""

import shutil
from pathlib import Path

import trio
from e2e.harness import Run

from hetero_async import asking, looking
from hetero_async.core.records import Promoted

EXIT_DAMAGED = 65
STEP_SECONDS = 0.005


def test_a_server_on_an_older_copy_of_its_log_halts_until_the_operator_lets_it_go_on(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    with Run(tmp_path / "run", server={"checkpoint_every": 1000}) as run:
        server = run.start_server(die_after_delta=4)
        workers = run.start_workers(step_seconds=STEP_SECONDS)
        server.ending()
        shutil.copytree(run.config.log, copy)
        kept = {worker: len(run.deltas(worker)) for worker in run.names}
        server = run.start_server()
        run.wait(lambda: any(max(run.acknowledged(name), default=0) > kept[name] for name in run.names), "more came")
        server.kill()
        shutil.rmtree(run.config.log)
        shutil.copytree(copy, run.config.log)

        halted = run.start_server()
        assert halted.ending() == EXIT_DAMAGED, run.story()
        assert "has our word that its delta" in halted.said
        assert "hetero-async promote --name server" in halted.said

        standby = run.start_standby("server")
        run.wait(lambda: "standing by" in standby.said, "it takes the operator's word")
        assert trio.run(asking.promote, run.config, "server", True) == []
        for life in workers:
            assert life.ending() == 0, run.story()
        verdict = looking.verify_directory(run.config.log, lambda _: None)
        assert verdict.state.is_finished
        assert verdict.lost, "verify names what was acknowledged and is gone"
        assert [promoted.term for promoted in run.records(Promoted)] == [2]
