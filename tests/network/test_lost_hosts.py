"""A host that is gone without a word: no FIN, no RST, and the other side still believes in the connection."""

from pathlib import Path

import pytest
from network.sites import Sites, why_not
from network.spread import SpreadRun

from hetero_async.core.records import Joined, Left

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)


def test_24_a_host_that_is_gone_is_forgotten_and_its_worker_lives_on_at_another_site(tmp_path: Path) -> None:
    with (
        Sites("home", "lost", "spare") as sites,
        SpreadRun(sites, tmp_path / "run", workers={"home": 1, "lost": 1}, connection_seconds=4.0) as run,
    ):
        server = run.start_server()
        hold = tmp_path / "hold"
        home, host = run.start_workers(step_seconds=0.05, hold=str(hold))
        run.wait(lambda: run.deltas("lost-0"), "the worker has pushed")
        hold.touch()  # until the connections are given up there is training left
        sites.cut("lost")
        host.kill()
        assert len(sites.connections("home", "lost")) == 2, "the server's host still believes in both lanes"
        run.wait(lambda: run.records(Left), "it is given up")
        run.homes["lost-0"] = "spare"
        again = run.start_worker("lost-0", hold=str(hold))
        run.wait(lambda: [joined for joined in run.records(Joined) if joined.incarnation == 2], "it is replaced")
        run.wait(lambda: not sites.connections("home", "lost"), "the server's host has given the connections up")
        assert server.exit_code is None, "and not because the server has ended"
        hold.unlink()
        verdict = run.finish(server, home, again)
        assert verdict.samples == 1600
        assert run.records(Left)[0] == Left(worker="lost-0", reason="not heard for 3 s")
