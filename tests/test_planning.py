"""What a person asks of `plan`, in a file or on the command line; mistakes are answered in one line."""

import math
from pathlib import Path

import pytest

from hetero_async.errors import UserError
from hetero_async.planning import question_of, rate, seconds, site_of
from hetero_async.tables import template
from hetero_async.watch.timing import Site

PLAN = """
[training]
steps_per_round = 200
codec_up = "int4"
[plan]
parameters = 7e9
down = "10Gbit"
[plan.sites.amsterdam]
workers = 8
step = 1.2
batch = 4
up = "100Mbit"
down = "1Gbit"
delay = "40ms"
[plan.sites.office]
workers = 1
step = "900ms"
"""


def test_a_file_with_nothing_but_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    question = question_of(path, 0.0, [], 0)
    assert question.parameters == 7e9
    assert (question.settings.steps_per_round, question.settings.codec_up) == (200, "int4")
    assert (question.up, question.down, question.samples) == (math.inf, 1.25e9, 0)
    assert question.sites == (
        Site(name="amsterdam", workers=8, step_seconds=1.2, batch=4, up=12.5e6, down=125e6, delay=0.04),
        Site(name="office", workers=1, step_seconds=0.9),
    )


def test_a_run_toml_gives_settings_and_goal_and_options_come_before_it(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    run = template(run={"name": "r", "samples": 5000}, sites={"here": 1}, training={"steps_per_round": 9})
    path.write_text(run + "[plan]\nparameters = 1e6\n[plan.sites.here]\nworkers = 1\nstep = 1\n")
    assert question_of(path, 0.0, [], 0).samples == 5000
    question = question_of(path, 2e6, ["there:workers=2,step=3,delay=80ms"], 7)
    assert (question.parameters, question.samples, question.settings.steps_per_round) == (2e6, 7, 9)
    assert question.sites == (Site(name="there", workers=2, step_seconds=3.0, delay=0.08),)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("100Mbit", 12.5e6),
        ("1Gbit/s", 125e6),
        ("12MB", 12e6),
        ("8kbit", 1e3),
        (5, 5.0),
        ("2.5e6", 2.5e6),
        ("", math.inf),
    ],
)
def test_rates(given: str | float, expected: float) -> None:
    assert rate("up", given) == expected


@pytest.mark.parametrize(("given", "expected"), [("800ms", 0.8), ("2 min", 120.0), (3, 3.0), ("0.5s", 0.5)])
def test_times(given: str | float, expected: float) -> None:
    assert seconds("step", given) == expected


@pytest.mark.parametrize(
    ("sites", "complaint"),
    [
        ([], "which sites? give tables such as [plan.sites.amsterdam], or --site NAME:workers"),
        (["a"], "--site a: must be like NAME:workers=8"),
        (["a:workers=1,step"], "must be like NAME:workers=8"),
        (["a:workers=0,step=1"], "plan.sites.a.workers = 0: must be a whole number greater than 0"),
        (["a:workers=1"], "plan.sites.a.step is missing"),
        (["a:workers=1,stp=1"], "plan.sites.a.stp = 1: unknown key (did you mean step?)"),
        (["a:workers=1,step=0"], "plan.sites.a.step = 0.0: must be greater than 0"),
        (["a:workers=1,step=1,up=5Mb"], 'plan.sites.a.up = "5Mb": must be bytes a second, or with a unit'),
        (["a:workers=1,step=1,delay=5m"], 'plan.sites.a.delay = "5m": must be seconds'),
        (["a:workers=1,step=1.2.3"], 'plan.sites.a.step = "1.2.3": must be seconds'),
    ],
)
def test_what_cannot_be_planned_is_told(sites: list[str], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        question_of(None, 1e6, sites, 0)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_size_is_asked_for() -> None:
    with pytest.raises(UserError, match="how large is the model"):
        question_of(None, 0.0, ["a:workers=1,step=1"], 0)


def test_a_site_on_the_command_line_is_a_table() -> None:
    assert site_of("a:workers=8, step=1.2,up=1Gbit") == ("a", {"workers": 8, "step": "1.2", "up": "1Gbit"})
