"""The counter between the training loop and the background: when a round ends, what is drawn, which target counts."""

import pytest

from hetero_async.core.heartbeat import Usage
from hetero_async.core.worker_events import Anchor
from hetero_async.desk import FOR_ANSWER, FOR_SAMPLES, Desk, Published, Round, Target
from hetero_async.errors import RefusedError


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def opened(*, steps: int = 4, batch: int = 4, granted: int = 64, clock: Clock | None = None) -> Desk:
    desk = Desk(clock or Clock())
    desk.batch, desk.stretch = batch, 4
    desk.pace(0, None, steps)
    desk.grant(((0, granted),), 64)
    return desk


def step(desk: Desk, times: int = 1) -> None:
    for _ in range(times):
        assert desk.draw(desk.batch)
        desk.count_step()


def settled(desk: Desk, *, unmerged: bool = False) -> None:
    desk.tell(rounds=desk.rounds, in_flight=False, unmerged=unmerged, progress=0.5)


def test_without_a_deadline_a_round_is_due_after_its_steps() -> None:
    desk = opened(steps=2)
    assert not desk.is_round_due(), "nothing was done yet"
    step(desk)
    assert not desk.is_round_due()
    step(desk)
    assert desk.is_round_due()


def test_with_a_deadline_a_round_is_due_then_whatever_the_steps() -> None:
    clock = Clock()
    desk = opened(steps=2, clock=clock)
    desk.pace(1, 3.0, 2)
    step(desk, 3)
    clock.seconds += 2.9
    assert not desk.is_round_due()
    clock.seconds += 0.2
    assert desk.is_round_due()


def test_a_round_ends_with_the_last_step_that_is_over_before_the_deadline() -> None:
    clock = Clock()
    desk = opened(steps=8, clock=clock)
    desk.pace(1, 3.5, 8)
    for number in range(1, 4):
        clock.seconds += 1.0
        step(desk)
        assert desk.is_round_due() == (number == 3), "another second would end behind it"


def answered(desk: Desk, clock: Clock, seconds: float) -> None:
    step(desk)
    desk.cut("delta")
    clock.seconds += seconds
    settled(desk)


def test_the_time_that_an_answer_takes_is_set_aside_as_well() -> None:
    clock = Clock()
    desk = opened(steps=20, clock=clock)
    for _ in range(3):
        answered(desk, clock, 1.0)
    desk.pace(1, 5.0, 20)
    for seconds in range(1, 6):
        step(desk)
        assert desk.is_round_due() == (seconds == 5), "the next would end, and its delta be there, behind it"
        clock.seconds += 1.0


def test_an_answer_that_something_else_held_up_says_nothing_about_the_way() -> None:
    clock = Clock()
    desk = opened(steps=20, clock=clock)
    for seconds in (1.0, 30.0):
        answered(desk, clock, seconds)
    desk.pace(1, 30.0, 20)
    step(desk)
    clock.seconds += 1.0
    assert not desk.is_round_due()


def test_a_window_is_served_once_however_often_it_is_named() -> None:
    clock = Clock()
    desk = opened(steps=2, clock=clock)
    desk.pace(1, 1.0, 2)
    clock.seconds += 1.1
    step(desk)
    assert desk.is_round_due()
    desk.cut("delta")
    settled(desk)
    desk.pace(1, 0.1, 2)
    step(desk)
    assert not desk.is_round_due(), "its delta is under way already"
    desk.pace(2, 0.1, 2)
    clock.seconds += 0.2
    assert desk.is_round_due()


def test_a_server_that_has_restarted_counts_its_windows_anew() -> None:
    clock = Clock()
    desk = opened(steps=20, clock=clock)
    desk.pace(7, 0.0, 20)
    step(desk)
    desk.cut("delta")
    settled(desk)
    desk.pace(1, 1.0, 20)
    step(desk)
    clock.seconds += 1.1
    assert desk.is_round_due()


def test_a_deadline_that_never_comes_near_ends_the_round_when_it_is_stretched_out() -> None:
    clock = Clock()
    desk = opened(steps=2, clock=clock)
    desk.pace(1, 1000.0, 2)
    step(desk, 7)
    assert not desk.is_round_due()
    step(desk)
    assert desk.is_round_due()


def test_the_news_of_the_next_window_makes_the_old_one_overdue() -> None:
    clock = Clock()
    desk = opened(clock=clock)
    desk.pace(1, 3.0, 4)
    step(desk)
    desk.pace(1, 2.0, 4)
    assert not desk.is_round_due(), "the same window, said again"
    desk.pace(2, 5.0, 4)
    assert desk.is_round_due()
    desk.cut("delta")
    settled(desk)
    step(desk)
    assert not desk.is_round_due(), "it was pushed already, and the new window is young"


def test_after_the_deadlines_cut_the_steps_count_until_a_new_deadline_is_known() -> None:
    clock = Clock()
    desk = opened(steps=2, clock=clock)
    desk.pace(1, 1.0, 2)
    step(desk)
    clock.seconds += 1.0
    desk.cut("delta")
    settled(desk)
    step(desk)
    assert not desk.is_round_due()
    step(desk)
    assert desk.is_round_due()


def test_while_a_push_is_in_flight_the_round_stretches_and_then_the_loop_waits() -> None:
    desk = opened(steps=2)
    desk.stretch = 3
    step(desk, 2)
    desk.cut("delta")
    step(desk, 5)
    assert (desk.is_round_due(), desk.is_stretched_out()) == (False, False)
    step(desk)
    assert (desk.is_round_due(), desk.is_stretched_out()) == (False, True)
    settled(desk)
    assert (desk.is_round_due(), desk.is_stretched_out()) == (True, False)


def test_a_synchronous_run_waits_until_its_delta_is_merged() -> None:
    desk = opened(steps=1)
    desk.stretch = 0
    step(desk)
    desk.cut("delta")
    desk.tell(rounds=0, in_flight=False, unmerged=False, progress=0.0)
    assert desk.is_stretched_out(), "the background has not even taken it"
    settled(desk, unmerged=True)
    assert desk.is_stretched_out(), "acknowledged is not merged"
    settled(desk)
    assert not desk.is_stretched_out()


def test_a_cut_hands_over_what_was_drawn_and_leaves_an_empty_round() -> None:
    desk, rounds = opened(), []
    desk.hand_over = rounds.append
    desk.anchor = Anchor(3, 2)
    step(desk, 2)
    desk.cut("delta")
    assert rounds == [Round("delta", Anchor(3, 2), 2, ((0, 8),))]
    assert (desk.round_steps, desk.rounds, desk.is_busy) == (0, 1, True)


def test_a_target_computed_before_the_latest_cut_is_not_taken() -> None:
    desk = opened()
    old = Target("flat", anchor=Anchor(1, 1), rounds=0)
    desk.offer_target(old)
    assert desk.take_target() == old
    assert desk.take_target() is None, "once"
    desk.offer_target(old)
    step(desk)
    desk.cut("delta")
    assert desk.take_target() is None
    new = Target("flat", anchor=Anchor(1, 1), rounds=1)
    desk.offer_target(new)
    assert desk.take_target() == new


def test_whole_batches_are_drawn_until_the_server_has_nothing_left() -> None:
    desk = opened(granted=6)
    assert desk.draw(4) == [0, 1, 2, 3]
    assert desk.draw(4) == [], "half a batch waits for the other half"
    desk.grant(((10, 12),), 64)
    assert desk.draw(4) == [4, 5, 10, 11]
    desk.grant(((20, 22),), 64)
    desk.count_step()
    desk.grant((), 64)
    assert desk.draw(4) == [20, 21], "the run's last ones"
    assert desk.can_flush()
    desk.finish()
    assert desk.draw(4) is None


def test_the_last_samples_are_drawn_again_when_no_step_came_of_them() -> None:
    desk = opened(granted=4)
    desk.grant((), 64)
    assert desk.draw(4) == [0, 1, 2, 3]
    assert not desk.can_flush(), "a delta without a step says nothing"
    assert desk.draw(4) == [0, 1, 2, 3]
    desk.count_step()
    assert desk.draw(4) == []
    assert desk.can_flush()


def test_drawn_samples_stay_held_until_their_delta_is_in_the_outbox() -> None:
    desk = opened(granted=16)
    step(desk)
    desk.cut("delta")
    step(desk)
    assert desk.vitals(0, 0).held == ((0, 16),)
    settled(desk)
    assert desk.vitals(0, 0).held == ((4, 16),)


def test_after_a_new_join_only_what_is_still_leased_and_not_drawn_is_drawn() -> None:
    desk = opened(granted=16)
    step(desk)
    desk.cut("delta")
    step(desk)
    desk.regrant(((0, 10),))
    desk.grant((), 64)
    assert desk.draw(4) == [8, 9]


def test_what_was_lost_in_a_new_join_and_comes_back_is_not_drawn_twice() -> None:
    desk = opened(granted=8)
    assert desk.draw(4) == [0, 1, 2, 3]
    desk.regrant(())
    desk.grant(((0, 8),), 64)
    assert desk.draw(4) == [4, 5, 6, 7]
    assert desk.draw(4) == []


def test_leases_last_until_a_round_is_stretched_out_though_the_server_falls_silent() -> None:
    desk = opened(steps=2, granted=48)
    assert desk.vitals(0, 0).wanted_samples == 0, "six rounds of two batches"
    step(desk)
    assert desk.vitals(0, 0).wanted_samples == 12, "what was drawn, and another round"
    step(desk)
    desk.cut("delta")
    step(desk, 8)
    assert desk.is_stretched_out() and desk.draw(4), "it waits for the answer, and not for samples"


def test_speed_is_measured_between_steps_and_a_wait_is_not_a_slow_step() -> None:
    clock = Clock()
    desk = opened(clock=clock)
    for _ in range(3):
        step(desk)
        clock.seconds += 0.5
    assert desk.vitals(0, 0).steps_per_second == 2.0
    desk.fail(RefusedError("over"))
    with pytest.raises(RefusedError, match="over"):
        desk.wait("for the end")
    with pytest.raises(RefusedError, match="over"):
        desk.draw(4)


# --- what became of the time ---


class Passing(Clock):
    """A quarter of a second passes with each look at it."""

    def __call__(self) -> float:
        self.seconds += 0.25
        return self.seconds


def test_time_is_spent_training_or_waiting_from_the_first_batch_on() -> None:
    clock = Clock()
    desk = opened(clock=clock)
    clock.seconds += 40
    assert desk.vitals(0, 0).usage == Usage(), "joining is not counted"
    step(desk)
    clock.seconds += 7
    usage = desk.vitals(0, 0, Usage(link_busy_seconds=3.0)).usage
    assert usage == Usage(training_seconds=7.0, link_busy_seconds=3.0)


@pytest.mark.parametrize(("why", "field"), [(FOR_ANSWER, "answer_wait_seconds"), (FOR_SAMPLES, "sample_wait_seconds")])
def test_a_wait_is_counted_by_what_it_was_for(why: str, field: str) -> None:
    clock = Passing()
    desk = opened(clock=clock)
    step(desk)
    before = desk.vitals(0, 0).usage
    desk.wait(why)
    after = desk.vitals(0, 0).usage
    assert getattr(before, field) == 0 and getattr(after, field) >= 0.25
    others = {"answer_wait_seconds", "sample_wait_seconds"} - {field}
    assert all(getattr(after, other) == 0 for other in others)
    assert after.training_seconds >= before.training_seconds
    step(desk)
    assert getattr(desk.vitals(0, 0).usage, field) == getattr(after, field), "it is over"


def test_samples_that_are_fetched_ahead_are_held_and_not_yet_drawn() -> None:
    desk = opened(granted=16)
    first, second = desk.reserve(4), desk.reserve(4)
    assert first and second
    assert desk.vitals(0, 0).held == ((0, 16),) and desk.vitals(0, 0).undrawn_samples == 16
    assert desk.consume(first)
    desk.count_step()
    handed_over: list[Round] = []
    desk.hand_over = handed_over.append
    desk.cut("delta")
    assert handed_over[0].ranges == ((0, 4),), "what lies ready is in no delta"
    desk.regrant(((8, 16),))
    assert not desk.consume(second), "they were leased to others meanwhile"
    desk.grant(((4, 8),), 64)
    assert desk.draw(4) == [4, 5, 6, 7], "and come back as any others"


def test_at_the_end_nothing_is_drawn_again_while_samples_are_under_way() -> None:
    desk = opened(granted=8)
    first, second = desk.reserve(4), desk.reserve(4)
    desk.grant((), 64)
    assert first and second and desk.consume(first)
    assert desk.reserve(4) == []
    assert desk.consume(second)
    assert desk.reserve(4) == [0, 1, 2, 3], "no step came of them"


def test_tokens_are_those_of_the_round_and_of_no_batch_that_comes_again() -> None:
    desk, rounds = opened(granted=8), []
    desk.hand_over = rounds.append
    desk.grant((), 64)
    assert desk.draw(8)
    desk.count_tokens(100)
    assert desk.draw(8), "again, for no step came of it"
    desk.count_tokens(100)
    desk.count_step()
    desk.cut("delta")
    assert rounds[0].tokens == 100


def test_what_is_to_be_measured_waits_for_the_rounds_end_and_takes_no_time_of_a_step() -> None:
    clock = Clock()
    desk = opened(clock=clock)
    for _ in range(3):
        step(desk)
        clock.seconds += 0.5
    published = Published("flat", Anchor(3, 1))
    desk.offer_published(published)
    assert desk.take_published() is None, "a round is under way"
    desk.pace(1, 100.0, 4)
    desk.cut("delta")
    assert desk.take_published() == published
    assert desk.take_published() is None
    desk.pace(2, 1.0, 4)
    with desk.stepping_aside("evaluating"):
        assert desk.vitals(0, 0).doing == "evaluating"
        settled(desk)
        clock.seconds += 60.0
        desk.pace(3, 1.0, 4)
    step(desk)
    assert not desk.is_round_due(), "the windows that passed meanwhile are done with"
    assert desk.vitals(0, 0).steps_per_second == 2.0
