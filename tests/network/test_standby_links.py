"""The link between server and standby, long and lossy, or thin: acknowledgements are as slow, and the standby level."""

import signal
from pathlib import Path

import pytest
from network.scripts import train_wide
from network.sites import Sites, why_not
from network.spread import SpreadRun
from network.test_bad_links import ROUGH

from hetero_async.shell.segments import read_log

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)

REPLICATED = {"durability": "replicated"}
MISSED = "no standby is in reach"


def test_20_a_standby_behind_a_long_lossy_link_keeps_level(tmp_path: Path) -> None:
    with (
        Sites("a", "b") as sites,
        SpreadRun(sites, tmp_path / "run", workers={"a": 2}, standbys=["b"], samples=400, server=REPLICATED) as run,
    ):
        sites.between("a", "b", rough=ROUGH)
        run.start_server()
        standby = run.start_standby("b")
        run.start_workers(step_seconds=0.03)
        verdict = run.finish(*(life for life in run.lives if life is not standby))
        assert verdict.samples == 400
        run.wait(lambda: logged(run, "b") == logged(run, "server"), "the standby is level")
        standby.signal(signal.SIGTERM)
        assert standby.ending() == 0


def test_21_27_a_large_delta_on_its_way_to_the_standby_over_a_thin_link_makes_nobody_think_it_away(
    tmp_path: Path,
) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    with (
        Sites("a", "b") as sites,
        SpreadRun(
            sites, tmp_path / "run", workers={"a": 1}, standbys=["b"], samples=2, steps_per_round=2,
            codec_up="fp32", server=REPLICATED,
        ) as run,
    ):  # fmt: skip
        run.start_server()
        standby = run.start_standby("b")
        run.start_worker("a-0", train_wide, hold=str(hold))
        run.wait(lambda: Path(f"{hold}.reached-a-0").exists(), "it has parameters, and so has the standby")
        sites.change("a", "b", megabits_per_second=20)
        start, states = sites.bytes_carried("a", "b"), set[str]()
        hold.unlink()
        [delta] = run.wait(lambda: list(run.config.worker_directory("a-0").glob("*.delta")), "there is a delta")
        size = delta.stat().st_size
        assert size > 20e6
        run.wait(lambda: states.add(run.status()["state"]) or run.acknowledged("a-0"), "it is acknowledged")
        carried = sites.bytes_carried("a", "b") - start
        sites.change("a", "b", megabits_per_second=0)
        assert size < carried < 1.25 * size, "the standby had it before, and had it once"
        assert not [state for state in states if MISSED in state]
        run.finish(*(life for life in run.lives if life is not standby))
        run.wait(lambda: logged(run, "b") == logged(run, "server"), "the standby is level")
        standby.signal(signal.SIGTERM)
        assert standby.ending() == 0


def logged(run: SpreadRun, node: str) -> list[tuple[int, int, object]]:
    return [(entry.lsn, entry.term, entry.record) for entry in read_log(run.config.node(node).log, None)]
