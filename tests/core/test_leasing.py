"""How much a worker is leased: by its speed, and little before that is known."""

import pytest

from hetero_async.core import ranges
from hetero_async.core.leasing import FIRST_STEPS, ROUNDS_MAX, granted
from hetero_async.core.ledger import Ledger
from hetero_async.core.messages import LeaseRequest

BATCH, WANTED = 8, 8 * 1000


def ledger(positions: int = 100_000, held: int = 0) -> Ledger:
    opened = Ledger()
    opened.open("shared", positions, positions)
    if held:
        opened.lease("w", ((0, held),))
    return opened


def size(
    rates: dict[str, float], steps_per_round: int, *, held: int = 0, undrawn: int = 0, positions: int = 100_000
) -> int | None:
    request = LeaseRequest(
        incarnation=1, number=1, held=((0, held),) if held else (), undrawn=undrawn, samples=WANTED, batch=BATCH,
        dataset_samples=positions,
    )  # fmt: skip
    found = granted(ledger(positions, held), "w", "shared", request, rates, steps_per_round)
    return None if found is None else ranges.size(found)


def test_a_worker_of_unknown_speed_is_given_a_few_steps_and_then_told_to_ask_again() -> None:
    assert size({"w": 0.0}, 32) == FIRST_STEPS * BATCH
    assert size({"w": 0.0}, 32, undrawn=BATCH) == (FIRST_STEPS - 1) * BATCH
    assert size({"w": 0.0}, 32, undrawn=FIRST_STEPS * BATCH) is None


def test_a_worker_that_has_nothing_left_is_given_more_whatever_it_holds() -> None:
    assert size({"w": 1.0, "other": 1.0}, 1, held=10_000) == ROUNDS_MAX * BATCH


@pytest.mark.parametrize("steps_per_round", [1, 4, 32])
def test_so_many_of_its_own_rounds_lie_ready_at_most(steps_per_round: int) -> None:
    rates = {"w": 1.0, "other": 1.0}
    most = ROUNDS_MAX * steps_per_round * BATCH
    assert size(rates, steps_per_round) == most
    assert size(rates, steps_per_round, undrawn=most - BATCH) == BATCH
    assert size(rates, steps_per_round, undrawn=most) is None


@pytest.mark.parametrize(
    ("rates", "share"),
    [({"w": 1.0, "other": 3.0}, 0.25), ({"w": 3.0, "other": 1.0}, 0.75), ({"w": 3.0, "other": 0.0}, 0.5)],
)
def test_near_the_end_it_is_half_of_its_share_of_the_rest(rates: dict[str, float], share: float) -> None:
    rest = 1600
    assert size(rates, 32, positions=rest) == int(rest * share / 2) // BATCH * BATCH


def test_the_last_positions_go_to_whoever_asks_and_then_there_are_none() -> None:
    assert size({"w": 1.0, "other": 1.0}, 32, positions=5) == 5
    assert size({"w": 0.0}, 32, positions=64, held=64) == 0, "nothing is free: that is an answer"
