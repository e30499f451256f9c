"""The link between server and standby, long and lossy, or thin: acknowledgements are as slow, and the standby level."""

import signal
from pathlib import Path

import pytest
from e2e.harness import Life
from network.scripts import train_wide
from network.sites import Sites, why_not
from network.spread import SpreadRun
from network.test_bad_links import ROUGH

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)

REPLICATED = {"durability": "replicated"}
MISSED = "no standby is in reach"
# The product's own; half as long as the large delta is under way.
LEASE_SECONDS = 5.0


def test_20_a_standby_behind_a_long_lossy_link_keeps_level(tmp_path: Path) -> None:
    with (
        Sites("a", "b") as sites,
        SpreadRun(sites, tmp_path / "run", workers={"a": 2}, standbys=["b"], samples=400, server=REPLICATED) as run,
    ):
        sites.between("a", "b", rough=ROUGH)
        servers = [run.start_server(exit_when_finished=False), run.start_standby("b")]
        run.start_workers(step_seconds=0.03)
        end_level(run, servers, samples=400)


def test_21_27_a_large_delta_on_its_way_to_the_standby_over_a_thin_link_makes_nobody_think_it_away(
    tmp_path: Path,
) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    with (
        Sites("a", "b") as sites,
        SpreadRun(
            sites, tmp_path / "run", workers={"a": 1}, standbys=["b"], samples=2, steps_per_round=2,
            codec_up="fp32", server=REPLICATED, lease_seconds=LEASE_SECONDS,
        ) as run,
    ):  # fmt: skip
        servers = [run.start_server(exit_when_finished=False), run.start_standby("b")]
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
        assert size < carried < 2 * size, "the standby had it before, and nothing began again"
        assert not [state for state in states if MISSED in state]
        end_level(run, servers, samples=2)


def end_level(run: SpreadRun, servers: list[Life], samples: int) -> None:
    """The run ends, both have the same records to the last one, and both logs stand up to all that was promised."""
    run.finish(*(life for life in run.lives if life not in servers))
    run.wait(lambda: list(run.entries("b")) == list(run.entries()), "the standby is level")
    for server in servers:
        server.signal(signal.SIGTERM)
        assert server.ending() == 0
    assert [run.check(node).samples for node in ("server", "b")] == [samples, samples]
