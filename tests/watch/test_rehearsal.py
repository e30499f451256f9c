"""What a rehearsal of windows comes to where it can be said without one."""

from dataclasses import replace

import pytest

from hetero_async.watch.rehearsal import Scene, Stage, played

SCENE = Scene(
    window=4.0, grace=1.0, publish_every=1, stretch=4, slots=3, up=0.0, down=0.0, inspect=0.0, held=3, snapshot=3.1
)
STAGE = Stage(workers=2, step=0.5, steps=8, delay=0.0, up=0.0, down=0.0, push=0.0, receive=0.0)


def test_over_links_that_take_no_time_each_window_has_one_fresh_delta_of_each_worker() -> None:
    found = played([STAGE, replace(STAGE, workers=1, step=0.7)], SCENE)
    assert found.merges == pytest.approx(1 / 4, rel=0.02)
    assert found.deltas == (pytest.approx(2 / 4, rel=0.02), pytest.approx(1 / 4, rel=0.02))
    assert (found.staleness, found.training) == ((0.0, 0.0), (1.0, 1.0))
    assert played([STAGE], SCENE) == played([STAGE], SCENE), "a plan is the same each time"


def test_an_answer_that_takes_windows_makes_deltas_a_merge_old_and_then_workers_wait() -> None:
    """A single worker's own last delta is merged when its answer comes, and published when the next one is cut."""
    alone = replace(STAGE, workers=1, push=10.0)
    found = played([replace(alone, receive=3.9)], SCENE)
    assert found.answer[0] == pytest.approx(10.0)
    assert found.staleness[0] == pytest.approx(1.0)
    assert found.training == (1.0,)
    assert played([alone], SCENE).staleness[0] == pytest.approx(0.0)
    found = played([replace(STAGE, push=20.0)], SCENE)
    assert found.training[0] == pytest.approx(16.5 / 20.5, abs=0.02), "four rounds of steps, and one step more"


def test_a_link_that_can_carry_half_of_it_carries_half_of_it() -> None:
    found = played([replace(STAGE, workers=4, up=2.0)], SCENE)
    assert found.deltas[0] == pytest.approx(1 / 2, rel=0.02)


def test_a_server_takes_so_many_uploads_at_once() -> None:
    stages = [replace(STAGE, workers=1, up=3.0)] * 6
    for slots, rate in ((6, 6 / 4), (3, 3 / 3), (1, 1 / 3)):
        assert sum(played(stages, replace(SCENE, slots=slots)).deltas) == pytest.approx(rate, rel=0.02)
    assert sum(played(stages, replace(SCENE, slots=6, down=1.0)).deltas) == pytest.approx(1.0, rel=0.02), "its own link"


def test_who_is_far_behind_takes_a_snapshot() -> None:
    found = played([replace(STAGE, workers=1, down=30.0)], SCENE)
    assert found.receive[0] >= 30.0
    assert found.staleness[0] < 200 / 4, "publish by publish it would fall behind for ever"
