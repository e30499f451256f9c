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

FLAPS = 3


def test_09_13_sites_cut_off_in_one_way_or_both_are_given_up_and_come_back(tmp_path: Path) -> None:
    workers = {"home": 1, "cut": 1, "mute": 1, "deaf": 1}
    with Sites(*workers) as sites, SpreadRun(sites, tmp_path / "run", workers=workers, samples=8000) as run:
        away = ["cut-0", "deaf-0", "mute-0"]
        run.start_server()
        run.start_workers(step_seconds=0.02)
        run.wait(lambda: all(run.deltas(worker) for worker in run.names), "every worker has pushed")
        sites.cut("cut")
        sites.change("mute", "home", is_cut=True)
        sites.change("home", "deaf", is_cut=True)
        run.wait(lambda: len(run.records(Left)) >= 3, "three are given up")
        assert sorted((left.worker, left.reason) for left in run.records(Left)) == [
            (worker, "not heard for 3 s") for worker in away
        ]
        before = len(run.deltas("home-0"))
        run.wait(lambda: len(run.deltas("home-0")) > before + 2, "the other one goes on")
        assert {joined.incarnation for joined in run.records(Joined)} == {1}
        sites.cut("cut", False)
        sites.change("mute", "home", is_cut=False)
        sites.change("home", "deaf", is_cut=False)
        run.wait(lambda: returned(run) == away, "the three are back")
        verdict = run.finish()
        assert verdict.samples == 8000
        assert {left.reason for left in run.records(Left) if left.worker == "home-0"} == {"said bye"}
        # Each had its unfinished round with it, and learned what had become of it.
        assert all("delta refused" in life.said or run.deltas(life.name)[-1].incarnation == 2 for life in run.lives[2:])


def returned(run: SpreadRun) -> list[str]:
    return sorted(joined.worker for joined in run.records(Joined) if joined.incarnation == 2)


def test_19_a_link_that_comes_and_goes_every_second_lets_the_run_end(tmp_path: Path) -> None:
    workers = {"home": 1, "far": 1}
    with Sites(*workers) as sites, SpreadRun(sites, tmp_path / "run", workers=workers, samples=2400) as run:
        run.start_server()
        run.start_workers(step_seconds=0.05)
        run.wait(lambda: run.deltas("far-0"), "the far worker has pushed")
        before, unanswered = len(run.deltas("far-0")), [0]
        for _ in range(FLAPS):
            for is_cut in (True, False):
                sites.cut("far", is_cut)
                unanswered += watched_for_a_second(run, "far-0")
        assert max(unanswered) <= 2, "a worker without an answer makes no more deltas"
        assert run.finish().samples == 2400
        assert len(run.deltas("far-0")) > before


def watched_for_a_second(run: SpreadRun, worker: str) -> list[int]:
    """How many unanswered deltas it had at each look: the second is the fault itself, not a wait."""
    counts, end = [], time.monotonic() + 1.0
    while time.monotonic() < end:
        counts.append(len(run.unanswered(worker)))
        time.sleep(0.05)
    return counts
