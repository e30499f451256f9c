"""The picture of a run."""

import sys
from pathlib import Path

import pytest

from hetero_async.errors import UserError
from hetero_async.watch.report import draw_loss

POINTS = [(1.0, 5.4), (40.0, 2.2), (90.0, 1.75)]


def test_every_kill_and_the_last_loss_are_labelled(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").rcParams["svg.fonttype"] = "none"  # text stays text
    path = tmp_path / "loss.svg"
    draw_loss(POINTS, [(30.0, "worker office-0 killed"), (60.0, "server killed")], path, title="byte-gpt")
    picture = path.read_text()
    for text in ["worker office-0 killed", "server killed", "byte-gpt", "1.75", "nats per byte", "seconds since"]:
        assert text in picture


@pytest.mark.parametrize(("points", "kills"), [([], []), (POINTS, []), ([], [(3.0, "server killed")])])
def test_a_run_without_losses_or_kills_is_drawn_too(
    tmp_path: Path, points: list[tuple[float, float]], kills: list[tuple[float, str]]
) -> None:
    pytest.importorskip("matplotlib")
    draw_loss(points, kills, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install 'hetero-async\\[demo\\]'"):
        draw_loss(POINTS, [], tmp_path / "loss.png")
