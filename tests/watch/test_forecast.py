"""What plans say of worlds too large to be simulated: orders of magnitude, what does not fit, and what would."""

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from hetero_async.core.records import RunSettings
from hetero_async.tensors import model
from hetero_async.watch import plan, timing
from hetero_async.watch.forecast import render_forecast
from hetero_async.watch.plan import forecast
from hetero_async.watch.timing import Question, Site

GIGABIT = 125e6
HIDDEN = 0.03  # merges: a step that takes longer may make one delta late


def question(parameters: float, sites: int, steps: int, **site: float) -> Question:
    settings = RunSettings(run="r", steps_per_round=steps)
    table = {"workers": 2, "step_seconds": 5.0, "up": GIGABIT, "down": GIGABIT, "delay": 0.04, **site}
    return Question(
        parameters=parameters,
        settings=settings,
        samples=10**6,
        sites=tuple(Site(name=f"s{number}", **table) for number in range(sites)),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("parameters", "sites"), [(1e9, 2), (7e9, 16), (100e9, 64)])
def test_the_least_h_that_is_named_is_enough_and_two_thirds_of_it_are_not(parameters: float, sites: int) -> None:
    asked = question(parameters, sites, 32)
    steps = forecast(asked).steps_that_hide_links
    assert steps > 0
    for number, is_hidden in ((steps, True), (2 * steps // 3, False)):
        # Of so many steps, and no longer however late the links make it.
        settings = replace(asked.settings, seconds_per_round=number * asked.sites[0].step_seconds)
        expected = forecast(replace(asked, settings=settings))
        assert (max(site.staleness for site in expected.sites) < HIDDEN) == is_hidden


def test_with_long_rounds_all_sites_train_all_the_time() -> None:
    expected = forecast(question(1e9, 2, 200))
    assert expected.warnings == ()
    assert expected.share_of_all == pytest.approx(1.0)
    assert expected.times_best_site == pytest.approx(2.0)
    assert expected.samples_per_second == pytest.approx(4 / 5)
    assert expected.days == pytest.approx(10**6 / (4 / 5) / 86_400, rel=0.01)
    # Each of four workers sends and fetches 8.5 bits a parameter every 1000 s.
    assert expected.bytes_per_day == pytest.approx(4 * 2 * 1e9 * 8.5 / 8 * 86.4, rel=0.01)
    assert expected.log_bytes_per_day == pytest.approx(4 * 1e9 * 8.5 / 8 * 86.4, rel=0.01)


def test_a_link_that_publishes_overload_counts_as_nothing_and_says_what_would_do() -> None:
    expected = forecast(question(7e9, 2, 2))
    assert expected.share_of_all == 0
    assert "come to be refused (max_staleness = 4)" in expected.warnings[0]
    assert f"from steps_per_round = {expected.steps_that_fit} on" in expected.warnings[0]


def test_a_server_of_a_hundred_billion_parameters_is_told_to_be_too_large() -> None:
    expected = forecast(question(100e9, 8, 10_000))
    assert expected.server_memory_bytes > 1e12
    assert any("few machines have so much memory" in warning for warning in expected.warnings)


def test_rounds_that_links_make_longer_are_told() -> None:
    thin, wide = (forecast(question(1e9, 2, 50, up=rate, down=rate)) for rate in (1e7, 5e8))
    assert thin.window_seconds > 1.5 * wide.window_seconds
    assert any("times as long as steps_per_round has them" in warning for warning in thin.warnings)
    assert not any("times as long" in warning for warning in wide.warnings)


def test_all_of_it_is_drawn() -> None:
    asked = question(7e9, 2, 2)
    console = Console(width=140, record=True, file=None, quiet=False)
    with console.capture() as drawn:
        console.print(render_forecast(asked, forecast(asked)))
    for words in ("s1", "7.4 GB", "warning: s0:", "links carry it all from", "of all sites' sum"):
        assert words in drawn.get()


def test_no_limit_is_no_busy_link() -> None:
    expected = forecast(question(1e6, 1, 10, up=math.inf, down=math.inf))
    assert (expected.sites[0].up_busy, expected.sites[0].down_busy) == (0, 0)


def test_a_plan_knows_what_a_servers_model_holds() -> None:
    """The numbers stand twice, for a plan does without torch."""
    planned = plan.MERGED_AT_ONCE, plan.SNAPSHOTS, timing.PUBLISHES_HELD_MIN
    assert planned == (model.MERGED_AT_ONCE, model.SNAPSHOTS_HELD, model.PUBLISHES_HELD_MIN)


@pytest.mark.parametrize("rate", [1e3, 1e5])
def test_a_link_that_brings_nothing_in_for_thousands_of_windows_has_a_plan_too(rate: float) -> None:
    asked = question(1e9, 2, 1, step_seconds=0.2, up=rate, down=rate)
    expected = forecast(asked)
    assert all(site.answer_seconds > 1e9 / rate for site in expected.sites)
    assert all(site.training_share < 0.01 for site in expected.sites)
    assert expected.merges_per_second > 0
    Console(file=io.StringIO()).print(render_forecast(asked, expected))


def test_a_site_whose_deltas_never_get_through_is_counted_as_nothing() -> None:
    thin = Site(name="thin", workers=1, step_seconds=0.7, up=1.0, down=1e9, delay=0.05)
    wide = Site(name="wide", workers=1, step_seconds=1.0, up=1e7, down=1e9)
    asked = replace(question(1e9, 1, 8), sites=(wide, thin))
    expected = forecast(asked)
    assert any("thin: none of its deltas would get through" in warning for warning in expected.warnings)
    assert [site.samples_per_second > 0 for site in expected.sites] == [True, False]
    console = Console(file=io.StringIO(), width=140)
    console.print(render_forecast(asked, expected))
    assert isinstance(console.file, io.StringIO)
    assert "–" in console.file.getvalue()


def test_a_site_that_publishes_do_not_reach_in_time_is_counted_as_nothing() -> None:
    thin = Site(name="thin", workers=1, step_seconds=0.7, up=1e9, down=1e5, delay=0.05)
    wide = Site(name="wide", workers=1, step_seconds=1.0, up=1e7, down=1e9)
    settings = RunSettings(run="r", steps_per_round=8, max_staleness=100, codec_down="int4")
    expected = forecast(replace(question(1e9, 1, 8), settings=settings, sites=(wide, thin)))
    assert any("thin: its deltas would be" in warning for warning in expected.warnings)
    assert [site.samples_per_second > 0 for site in expected.sites] == [True, False]
