"""Sites cut off, one way or both, for long and for moments: whoever can go on does, and whoever was away comes back.

The judge at the end is the harness': no acknowledged delta is lost, the ledger is exact, `verify` finds all well.
"""

import time
from pathlib import Path

import pytest
from network.sites import Sites, why_not
from network.spread import SpreadRun

from hetero_async.core.records import Joined, Left

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)


def test_09_13_sites_cut_off_in_one_way_or_both_are_given_up_and_come_back(tmp_path: Path) -> None:
    with (
        Sites("home", "cut", "mute", "deaf") as sites,
        SpreadRun(sites, tmp_path / "run", workers={"home": 1, "cut": 1, "mute": 1, "deaf": 1}, samples=16_000) as run,
    ):
        away = ["cut-0", "mute-0", "deaf-0"]
        run.start_server()
        run.start_workers(step_seconds=0.02)
        run.wait(lambda: all(run.deltas(worker) for worker in run.names), "every worker has pushed")
        sites.cut("cut")
        sites.change("mute", "home", is_cut=True)
        sites.change("home", "deaf", is_cut=True)
        t0=time.time()
        run.wait(lambda: {left.worker for left in run.records(Left)} == set(away), "the three are given up, and no other")
        print("left", time.time()-t0)
        assert {left.reason for left in run.records(Left)} == {"not heard for 3 s"}
        before = len(run.deltas("home-0"))
        run.wait(lambda: len(run.deltas("home-0")) > before + 2, "the others go on")
        print("on", time.time()-t0)
        sites.cut("cut", False)
        sites.change("mute", "home", is_cut=False)
        sites.change("home", "deaf", is_cut=False)
        again = lambda: sorted(joined.worker for joined in run.records(Joined) if joined.incarnation == 2)
        run.wait(lambda: again() == sorted(away), "they are back")
        print("back", time.time()-t0)
        run.finish()
        print("end", time.time()-t0)
        print(run.story())


def test_19_a_link_that_comes_and_goes_every_second_lets_the_run_end(tmp_path: Path) -> None:
    with Sites("home", "far") as sites, SpreadRun(sites, tmp_path / "run", workers={"home": 1, "far": 1}) as run:
        run.start_server()
        run.start_workers(step_seconds=0.05)
        run.wait(lambda: run.deltas("far-0"), "the far worker has pushed")
