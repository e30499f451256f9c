"""What each outer rule decides, as its paper has it."""

import pytest

from hetero_async.core.outer import RULES, Coefficients
from hetero_async.core.records import RunSettings
from hetero_async.core.state import Member, PendingDelta, State

ETA, MU = 0.7, 0.9
SETTINGS = RunSettings(run="r", outer_learning_rate=ETA, momentum=MU)


def moved(rule: str, deltas: list[float], merge: str = "window", workers: int = 1, pushed: int = 0) -> float:
    """How far one parameter moves by these merged deltas, one step each. `pushed`: of the workers; 0: all of them."""
    state = State(members={f"w{number}": Member(site="s", active=True) for number in range(workers)})
    state.pending = {
        number: PendingDelta(worker=f"w{number}", seq=1, anchor_version=0, steps=4, samples=8)
        for number in range(1 if merge == "per-push" else pushed or workers)
    }
    settings = RunSettings(run="r", merge=merge, outer_learning_rate=ETA, momentum=MU)
    theta = m = 0.0
    for g in deltas:
        found = RULES[rule].coefficients(state, settings)
        m = found.decay * m + found.intake * g
        theta += found.gain * g + found.pull * m
        state.version += 1
    return theta


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sgd", Coefficients(decay=0.0, intake=0.0, gain=ETA, pull=0.0)),
        ("nesterov", Coefficients(decay=MU, intake=1.0, gain=ETA, pull=ETA * MU)),
        ("lookahead", Coefficients(decay=MU, intake=1.0 - MU, gain=ETA, pull=ETA * MU)),
        ("delayed-nesterov", Coefficients(decay=MU, intake=1.0, gain=ETA, pull=ETA * MU)),
    ],
)
def test_each_rule_decides_what_its_formula_says(rule: str, expected: Coefficients) -> None:
    assert RULES[rule].coefficients(State(), SETTINGS) == pytest.approx(expected)


@pytest.mark.parametrize(("rule", "reach"), [("sgd", ETA), ("nesterov", ETA / (1 - MU)), ("lookahead", ETA * (1 + MU))])
def test_a_constant_delta_moves_the_parameters_by_the_rules_gain(rule: str, reach: float) -> None:
    assert moved(rule, [1.0] * 1001) - moved(rule, [1.0] * 1000) == pytest.approx(reach)


def test_delayed_nesterov_makes_of_a_turn_of_pushes_what_nesterov_makes_of_its_mean() -> None:
    rounds = [[0.3, -0.1, 0.5, 0.2], [0.1, 0.4, -0.2, 0.6], [0.7, 0.2, 0.1, 0.3]]
    pushes = [delta / 4 for deltas in rounds for delta in deltas]
    means = [sum(deltas) / 4 for deltas in rounds]
    assert moved("delayed-nesterov", pushes, "per-push", 4) == pytest.approx(moved("nesterov", means))
    assert moved("nesterov", pushes, "per-push", 4) != pytest.approx(moved("nesterov", means), rel=0.05)


# --- auto ---


def momentum(version: int, workers: int = 4, **settings: str) -> float:
    state = State(version=version, members={f"w{n}": Member(site="s", active=True) for n in range(workers)})
    state.pending = {
        n: PendingDelta(worker=f"w{n}", seq=1, anchor_version=0, steps=4, samples=8) for n in range(workers)
    }
    return RULES["auto"].coefficients(state, RunSettings(run="r", **settings)).decay


def test_auto_follows_a_lasting_direction_by_the_sum_of_all_workers_progress() -> None:
    for workers in (1, 4, 16):
        reach = moved("auto", [1.0] * 1001, workers=workers) - moved("auto", [1.0] * 1000, workers=workers)
        assert reach == pytest.approx(workers)


@pytest.mark.parametrize("pushed", [1, 2, 8])
def test_auto_follows_those_who_pushed_by_the_sum_of_their_progress(pushed: int) -> None:
    one, further = (moved("auto", [1.0] * merges, workers=16, pushed=pushed) for merges in (3000, 3001))
    assert further - one == pytest.approx(pushed, rel=1e-4)


def test_auto_is_not_moved_by_who_comes_alone_as_by_all() -> None:
    alone = moved("auto", [1.0], workers=4, pushed=1)
    assert alone == pytest.approx(moved("auto", [1.0], workers=4) / 4)


def test_auto_has_no_momentum_at_first_and_gains_it_merge_by_merge() -> None:
    assert [momentum(version) for version in (0, 3, 6, 9, 100)] == pytest.approx([0.0, 0.5, 2 / 3, 0.75, 0.75])
    assert [momentum(100, workers) for workers in (1, 2, 8)] == pytest.approx([0.0, 0.5, 0.875])


def test_auto_leaves_momentum_to_a_codec_that_has_it() -> None:
    assert momentum(100, codec_up="topk") == 0.0
    assert momentum(100, codec_up="2bit") == 0.75


def test_auto_makes_of_a_turn_of_pushes_what_it_makes_of_their_mean() -> None:
    rounds = [[0.3, -0.1], [0.1, 0.4], [0.7, 0.2], [0.2, 0.2]]
    pushes = [delta / 2 for deltas in rounds for delta in deltas]
    assert moved("auto", pushes, "per-push", 2) == pytest.approx(moved("auto", [sum(d) / 2 for d in rounds], workers=2))


@pytest.mark.parametrize("late", [0.0, 0.5, 3.0])
def test_auto_is_pulled_less_by_its_momentum_where_answers_are_late(late: float) -> None:
    members = {f"w{n}": Member(site="s", active=True) for n in range(4)}
    pending = {n: PendingDelta(worker=f"w{n}", seq=1, anchor_version=0, steps=4, samples=8) for n in range(4)}
    found = RULES["auto"].coefficients(State(version=100, lag=late, members=members, pending=pending), SETTINGS)
    assert found == pytest.approx(Coefficients(decay=0.75, intake=1.0, gain=1.0, pull=0.75 / (1 + late)))


@pytest.mark.parametrize("weights", [1.0, 4 / 3])
@pytest.mark.parametrize("left", [0.0, 0.3, 0.6, 0.9])
def test_a_direction_that_answers_a_round_late_dies_out(left: float, weights: float) -> None:
    """`left`: of a worker's distance from the best in that direction after one round; Δ = (1 − left)·distance."""
    members = {f"w{n}": Member(site="s", active=True) for n in range(4)}
    pending = {n: PendingDelta(worker=f"w{n}", seq=1, anchor_version=0, steps=4, samples=8) for n in range(4)}
    far = {}
    for late in (0.0, 1.0):  # as it is told, or left in the dark
        found = RULES["auto"].coefficients(State(version=100, lag=late, members=members, pending=pending), SETTINGS)
        before = theta = 1.0
        m = delta = 0.0
        for _ in range(60):
            delta = (1 - left) * (before - delta)  # from the last publish, and what it has pushed since
            m = found.decay * m + found.intake * weights * delta
            before, theta = theta, theta - found.gain * weights * delta - found.pull * m
        far[late] = abs(theta)
    assert far[1.0] < 0.02
    if left == 0 and weights > 1:
        assert far[0.0] > 1
