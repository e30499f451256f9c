"""Studies: what is run, what is kept, and what the comparison comes to."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hetero_async.errors import ConfigError, UserError
from hetero_async.sim.learning import Run
from hetero_async.sim.studying import Study, find, run_all
from hetero_async.sim.worldfile import Variant

WORLD = """
name = "tiny"
steps = 12
seeds = [3, 4]

[model]
layers = 1
width = 16
heads = 2
context = 16
batch = 4

[sites.a]
workers = 2
step_seconds = 0.1

[evaluation]
points = 2
windows = 8
"""
CELL = """
[cell]
title = "two workers"
choose = ["low", "high"]
reach = { ours = 0.02 }
faster_than = "slow"
time_share = 0.5
idle_share = 0.1
once = ["slow"]

[variants.low.run]
outer_learning_rate = 0.1

[variants.high.run]
outer_learning_rate = 1.0

[variants.slow.run]
dylu = false

[variants.ours.run]
momentum = 0.5
"""


def studied(directory: Path, world: str) -> Study:
    (directory / "tiny.toml").write_text(world)
    return Study.open(directory / "tiny.toml", None)


def made_up(variant: Variant, seed: int, loss: float | None = 2.0, **others: Any) -> Run:
    done = Run(
        variant=variant.name, case=variant.case, seed=seed, settings=variant.settings(), parameters=100,
        text=variant.corpus().fingerprint,
        final_loss=loss, choosing_loss=loss, virtual_seconds=10.0, versions=3, bytes_up=8000, bytes_down=4000,
        acknowledged=4, refused=0, idle_share=0.0, problem="", curve=((0.0, 0, 0, 0, 5.5), (10.0, 768, 12, 3, loss)),
    )  # fmt: skip
    return replace(done, **others)


def fill(study: Study, losses: dict[str, float | None], **others: Any) -> list[str]:
    """Run what is lacking, with these losses; what that was, in its order."""
    done = []
    while lacking := study.lacking():
        for variant, seed in lacking:
            study.book.add(made_up(variant, seed, losses[variant.name], **others))
            done.append(f"{variant.title} {seed}")
    return done


def test_a_study_is_run_kept_and_shown_by_one_command(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    file, outcomes, picture = tmp_path / "tiny.toml", tmp_path / "results/tiny.jsonl", tmp_path / "results/tiny.png"
    file.write_text(WORLD.replace("[3, 4]", "[3]") + CELL)

    def study(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hetero_async", "study", str(file), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    first = study("--processes", "1")
    assert first.returncode == 0, first.stderr
    assert "[0 left] tiny: " in first.stderr
    lines = [json.loads(line) for line in outcomes.read_text().splitlines()]
    assert sorted(line["variant"] for line in lines) == ["high", "low", "ours", "slow"]
    assert "two workers" in first.stdout
    assert f"outcomes and pictures: {outcomes.parent}" in first.stdout.splitlines()
    for drawn in (picture, picture.with_name("cells.png")):
        assert pyplot.imread(drawn).std() > 0, "something is drawn"

    again = study()
    assert (again.stdout, again.stderr) == (first.stdout, ""), "nothing is run twice"
    report = json.loads(study("--report", "--json").stdout)
    (cell,) = report[0]["cells"]
    (ours,) = (line for line in lines if line["variant"] == "ours")
    assert cell["reached"]["loss"] == pytest.approx(ours["final_loss"], abs=1e-4)
    assert cell["met"] in (True, False)


def test_without_a_cell_every_variant_is_run_with_every_seed(tmp_path: Path) -> None:
    study = studied(tmp_path, WORLD + "[variants.a]\n[variants.b.run]\nmomentum = 0.5\n")
    assert fill(study, {"a": 2.0, "b": 1.9}) == ["a 3", "a 4", "b 3", "b 4"]
    assert not list(study.verdicts())
    assert [figure.variant for figure in study.figures("")] == ["a", "b"]


def test_the_best_choice_by_other_text_is_the_yardstick_and_goes_on_with_all_seeds(tmp_path: Path) -> None:
    study = studied(tmp_path, WORLD + CELL)
    losses = {"low": 2.5, "high": 2.0, "slow": 2.2, "ours": 2.01}
    assert fill(study, losses) == ["low 3", "high 3", "slow 3", "ours 3", "ours 4", "high 4"]
    (verdict,) = study.verdicts()
    assert (verdict.yardstick.variant, len(verdict.yardstick.runs)) == ("high", 2)
    assert verdict.excess == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("ours", "others", "is_met"),
    [
        (2.019, {"virtual_seconds": 4.0}, True),
        (2.021, {"virtual_seconds": 4.0}, False),
        (1.9, {"virtual_seconds": 4.0}, True),
        (2.0, {"virtual_seconds": 5.1}, False),
        (2.0, {"virtual_seconds": 4.0, "idle_share": 0.11}, False),
        (None, {"virtual_seconds": 4.0}, False),
    ],
)
def test_a_cell_is_met_by_loss_time_and_idle_time(
    tmp_path: Path, ours: float | None, others: dict[str, Any], is_met: bool
) -> None:
    study = studied(tmp_path, WORLD + CELL)
    for variant in study.file.variants:
        for seed in variant.world.seeds:
            done = made_up(variant, seed, ours, **others) if variant.name == "ours" else made_up(variant, seed)
            study.book.add(done)
    (verdict,) = study.verdicts()
    assert verdict.is_met == is_met
    assert verdict.summary()["met"] == is_met


def test_each_case_has_its_own_yardstick(tmp_path: Path) -> None:
    study = studied(
        tmp_path, WORLD + CELL + "[axes.H.4.run]\nsteps_per_round = 4\n[axes.H.8.run]\nsteps_per_round = 8\n"
    )
    for variant in study.file.variants:
        better = {"H 4": "low", "H 8": "high"}[variant.case]
        for seed in variant.world.seeds:
            study.book.add(made_up(variant, seed, 1.0 if variant.name == better else 2.0))
    assert [(verdict.title, verdict.yardstick.variant) for verdict in study.verdicts()] == [
        ("two workers, H 4", "low"),
        ("two workers, H 8", "high"),
    ]


def test_a_choice_that_diverged_is_not_chosen(tmp_path: Path) -> None:
    study = studied(tmp_path, WORLD + CELL)
    fill(study, {"low": None, "high": 3.0, "slow": 2.2, "ours": 2.01})
    (verdict,) = study.verdicts()
    assert verdict.yardstick.variant == "high"


def test_a_study_goes_on_where_it_was_cut_short_and_a_changed_setting_is_run_again(tmp_path: Path) -> None:
    study = studied(tmp_path, WORLD + CELL)
    fill(study, {"low": 2.5, "high": 2.0, "slow": 2.2, "ours": 2.01})
    kept = study.book.path.read_text()
    study.book.path.write_text(kept[:-30])  # the last line is torn
    opened = studied(tmp_path, WORLD + CELL)
    assert [(variant.name, seed) for variant, seed in opened.lacking()] == [("high", 4)]
    assert studied(tmp_path, WORLD + CELL).book.path.read_text() == "".join(kept.splitlines(keepends=True)[:-1])
    changed = studied(tmp_path, WORLD + CELL.replace("momentum = 0.5", "momentum = 0.6"))
    assert [(variant.name, seed) for variant, seed in changed.lacking()] == [("high", 4), ("ours", 3), ("ours", 4)]


def test_what_is_not_an_outcome_is_named_with_its_line(tmp_path: Path) -> None:
    study = studied(tmp_path, WORLD + CELL)
    study.book.path.parent.mkdir()
    study.book.path.write_text('{"seed": 1}\n')
    with pytest.raises(UserError, match=r"results/tiny\.jsonl: line 1 is not the outcome of a run"):
        studied(tmp_path, WORLD + CELL)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('choose = ["low", "high"]', 'choose = ["lo"]', 'cell.choose = "lo": must be one of low, high, slow, ours'),
        ('faster_than = "slow"', 'faster_than = "slower"', 'cell.faster_than = "slower": must be one of low, '),
        ("reach = { ours = 0.02 }", "reach = { our = 0.02 }", 'cell.reach = "our": must be one of low, '),
        ("time_share", "time_shares", "cell.time_shares = 0.5: unknown key (did you mean time_share?)"),
        ('title = "two workers"', "", "cell.title is missing"),
    ],
)
def test_what_is_wrong_with_a_cell_is_said_in_one_line(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in CELL
    with pytest.raises(ConfigError) as caught:
        studied(tmp_path, WORLD + CELL.replace(old, new, 1))
    assert str(caught.value).startswith(f"{tmp_path / 'tiny.toml'}: {complaint}")


def test_a_directory_stands_for_the_world_files_in_it(tmp_path: Path) -> None:
    for name in ("b.toml", "a.toml", "c.txt"):
        (tmp_path / name).touch()
    assert find([tmp_path]) == [tmp_path / "a.toml", tmp_path / "b.toml"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no world file"):
        find([tmp_path / "empty"])


def test_what_diverged_is_infinitely_bad_and_can_be_written_down(tmp_path: Path) -> None:
    study = studied(tmp_path, WORLD + CELL)
    fill(study, {"low": 2.5, "high": 2.0, "slow": 2.2, "ours": None})
    (verdict,) = study.verdicts()
    assert math.isinf(verdict.reached.loss)
    assert json.loads(json.dumps(verdict.summary(), allow_nan=False))["excess"] is None


def test_nothing_is_run_where_nothing_is_lacking(tmp_path: Path) -> None:
    study = studied(tmp_path, WORLD + CELL)
    fill(study, {"low": 2.5, "high": 2.0, "slow": 2.2, "ours": 2.01})
    run_all([study], lambda line: pytest.fail(line))


def test_a_world_that_two_studies_share_is_run_once(tmp_path: Path) -> None:
    study = studied(tmp_path, WORLD + CELL)
    fill(study, {"low": 2.5, "high": 2.0, "slow": 2.2, "ours": 2.01})
    (tmp_path / "other.toml").write_text(WORLD + "[variants.mine.run]\nmomentum = 0.5\n")
    other = Study.open(tmp_path / "other.toml", None)
    run_all([study, other], lambda line: pytest.fail(line))
    (figure,) = other.figures("")
    assert (figure.variant, figure.loss) == ("mine", 2.01)


def test_the_time_to_a_loss_is_read_off_the_curve(tmp_path: Path) -> None:
    study = studied(tmp_path, WORLD + CELL)
    fill(study, {"low": 2.5, "high": 2.0, "slow": 2.2, "ours": 1.0})
    (verdict,) = study.verdicts()
    assert verdict.reached.seconds_to(5.5) == 0.0
    assert verdict.reached.seconds_to(3.25) == pytest.approx(5.0)
    assert math.isinf(verdict.reached.seconds_to(0.9))
    assert verdict.summary()["time_to_yardstick"] == pytest.approx((5.5 - 2.0) / (5.5 - 1.0), abs=1e-3)


def test_outcomes_of_another_text_are_not_added_to(tmp_path: Path) -> None:
    study = studied(tmp_path, WORLD + CELL)
    study.book.add(made_up(study.file.variants[0], 3, text="another"))
    with pytest.raises(UserError, match=r"tiny\.jsonl: its outcomes are of another text .* --out DIRECTORY"):
        run_all([study], lambda line: pytest.fail(line))
