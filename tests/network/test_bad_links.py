"""Links that are thin, long, lossy, or lose only what is large: slower, and nothing else."""

from pathlib import Path

import pytest
from network.rough import Rough
from network.scripts import WIDE, WIDEST, train_wide
from network.sites import Sites, why_not
from network.spread import SpreadRun

from hetero_async.core.records import Joined, Left
from hetero_async.formats.chunks import CHUNK_BYTES, CREDITS

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)

# 200 ms there and back.
ROUGH = Rough(delay_ms=100, jitter_ms=5, loss=0.02, duplicate=0.02, reorder=0.02)
# A delta's width and least size; a fraction of the time for which it is under way, yet enough for a busy machine to
# hash and copy it; and what TCP and IP put before each packet, where that comes to more than is let pass anyway.
DELTAS = [(WIDE, 20e6, 3.0, 1.0), pytest.param(WIDEST, 100e6, 10.0, 1.05, marks=pytest.mark.soak)]


def test_20_a_long_lossy_link_that_doubles_and_reorders_packets_is_only_slower(tmp_path: Path) -> None:
    workers = {"home": 1, "far": 1}
    with Sites(*workers) as sites, SpreadRun(sites, tmp_path / "run", workers=workers, samples=800) as run:
        sites.between("home", "far", rough=ROUGH)
        run.start_server()
        run.start_workers(step_seconds=0.03)
        assert run.finish().samples == 800
        assert run.deltas("far-0"), "it had its part in the run"


@pytest.mark.parametrize(("width", "least_bytes", "lease_ttl_seconds", "with_headers"), DELTAS)
def test_21_23_a_large_delta_over_a_thin_link_keeps_its_site_alive_and_survives_a_reset(
    tmp_path: Path, width: int, least_bytes: float, lease_ttl_seconds: float, with_headers: float
) -> None:
    hold, workers = tmp_path / "hold", {"home": 1, "far": 1}
    hold.touch()
    with (
        Sites(*workers) as sites,
        SpreadRun(
            sites, tmp_path / "run", workers=workers, samples=4, steps_per_round=2, codec_up="fp32",
            lease_ttl_seconds=lease_ttl_seconds,
        ) as run,
    ):  # fmt: skip
        run.start_server()
        run.start_workers(train_wide, hold=str(hold), width=width)
        run.wait(lambda: all(Path(f"{hold}.reached-{worker}").exists() for worker in run.names), "both have parameters")
        sites.change("far", "home", megabits_per_second=20)
        hold.unlink()
        [delta] = run.wait(lambda: unanswered(run), "the far worker has a delta")
        size, start = delta.stat().st_size, sites.bytes_carried("far", "home")
        assert size > least_bytes
        run.wait(lambda: sites.bytes_carried("far", "home") - start > 0.75 * size, "three quarters have come over")
        sites.reset_connections("far")
        run.wait(lambda: run.deltas("far-0"), "the delta is in the log")
        carried = sites.bytes_carried("far", "home") - start
        sites.change("far", "home", megabits_per_second=0)
        run.finish()
        assert carried < with_headers * size + CREDITS // 2 * CHUNK_BYTES, (
            "it did not begin again, and little was sent twice"
        )
        assert given_up(run) == [], run.story()
        assert {joined.incarnation for joined in run.records(Joined)} == {1}


def test_22_a_link_that_loses_large_packets_is_told_of_with_its_address(tmp_path: Path) -> None:
    with (
        Sites("home", "far") as sites,
        SpreadRun(sites, tmp_path / "run", workers={"home": 1, "far": 1}, connection_seconds=2.0) as run,
    ):
        run.start_server()
        _, far = run.start_workers(step_seconds=0.02)
        run.wait(lambda: run.deltas("far-0"), "the far worker has pushed")
        sites.change("far", "home", packet_bytes_max=511)
        run.wait(lambda: f"address={run.config.node('server').bulk}" in far.said, "the far worker tells of it")
        sites.change("far", "home", packet_bytes_max=0)
        assert run.finish().samples == 1600


def unanswered(run: SpreadRun) -> list[Path]:
    return sorted(run.config.worker_directory("far-0").glob("*.delta"))


def given_up(run: SpreadRun) -> list[str]:
    return [left.worker for left in run.records(Left) if left.reason != "said bye"]
