"""One for one: who is restarted, how often, and what climbs."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from hetero_async.actors.mailbox import Mailbox
from hetero_async.actors.supervisor import CrashReport, RestartLimit, RestartWindow, supervise


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    return trio.run(main, clock=MockClock(autojump_threshold=0))


class Child:
    """Lives for `life_seconds`, `crashes` times badly and then well."""

    def __init__(self, crashes: int, life_seconds: float = 1.0) -> None:
        self.crashes = crashes
        self.life_seconds = life_seconds
        self.born: list[float] = []

    async def __call__(self) -> None:
        self.born.append(trio.current_time())
        await trio.sleep(self.life_seconds)
        if len(self.born) <= self.crashes:
            raise OSError(f"crash {len(self.born)}")


def test_a_crashed_child_starts_again_after_the_backoff_while_its_siblings_go_on() -> None:
    async def main() -> None:
        weak, strong = Child(crashes=2), Child(crashes=0, life_seconds=100)
        reports: list[CrashReport] = []
        start = trio.current_time()
        await supervise(
            {"weak": weak, "strong": strong}, RestartWindow(5, 60), backoff_seconds=3, report=reports.append
        )
        assert [at - start for at in weak.born] == [0, 4, 8]
        assert len(strong.born) == 1
        assert [str(report) for report in reports] == [
            "weak crashed: OSError: crash 1",
            "weak crashed: OSError: crash 2",
        ]

    run(main)


def test_supervising_ends_when_all_children_have_ended_well() -> None:
    async def main() -> float:
        start = trio.current_time()
        children = {"a": Child(0, 5), "b": Child(0, 7)}
        await supervise(children, RestartWindow(0, 60), backoff_seconds=1, report=lambda report: None)
        return trio.current_time() - start

    assert run(main) == 7


def test_too_many_crashes_in_the_window_stop_the_siblings_and_climb() -> None:
    async def main() -> None:
        weak, strong = Child(crashes=1000, life_seconds=0.1), Child(crashes=0, life_seconds=1e6)
        start = trio.current_time()
        with pytest.raises(ExceptionGroup) as caught:
            await supervise(
                {"weak": weak, "strong": strong}, RestartWindow(3, 60), backoff_seconds=0, report=lambda report: None
            )
        [limit] = caught.value.exceptions
        assert isinstance(limit, RestartLimit)
        assert str(limit) == "weak crashed: OSError: crash 4; that is more than 3 restarts in 60 s"
        assert isinstance(limit.__cause__, OSError)
        assert len(weak.born) == 4
        assert trio.current_time() - start < 1

    run(main)


def test_the_limit_is_one_for_all_children() -> None:
    async def main() -> None:
        children = {f"child {number}": Child(crashes=1) for number in range(4)}
        with pytest.raises(ExceptionGroup):
            await supervise(children, RestartWindow(3, 60), backoff_seconds=0, report=lambda report: None)

    run(main)


def test_crashes_slower_than_the_window_never_escalate() -> None:
    async def main() -> int:
        child = Child(crashes=150, life_seconds=21)
        await supervise({"child": child}, RestartWindow(3, 60), backoff_seconds=0, report=lambda report: None)
        return len(child.born)

    assert run(main) == 151


@pytest.mark.parametrize(
    ("times", "admitted"),
    [
        ([0, 1, 2], [True, True, False]),
        ([0, 60, 120], [True, True, True]),
        ([0, 58, 61, 62], [True, True, True, False]),
        ([0, 0, 0, 1000], [True, True, False, True]),
    ],
)
def test_the_window_admits_a_burst_and_no_steady_rate_above_it(times: list[float], admitted: list[bool]) -> None:
    window = RestartWindow(2, 59)
    assert [window.admits(at) for at in times] == admitted


def test_cancellation_passes_through_and_restarts_nothing() -> None:
    async def main() -> None:
        child = Child(crashes=0, life_seconds=100)
        reports: list[CrashReport] = []
        with trio.move_on_after(5) as scope:
            await supervise({"child": child}, RestartWindow(5, 60), backoff_seconds=0, report=reports.append)
        assert scope.cancelled_caught
        assert (len(child.born), reports) == (1, [])

    run(main)


def test_ctrl_c_passes_through_and_restarts_nothing() -> None:
    async def interrupted() -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        await supervise({"child": interrupted}, RestartWindow(5, 60), backoff_seconds=0, report=pytest.fail)

    with pytest.raises(BaseExceptionGroup) as caught:
        run(main)
    assert caught.group_contains(KeyboardInterrupt)


def test_an_actor_is_restarted_without_its_poison_and_the_report_names_it() -> None:
    async def main() -> None:
        handled: list[str] = []
        reports: list[CrashReport] = []

        async def handle(message: str) -> None:
            if message == "poison":
                raise ValueError("cannot")
            handled.append(message)

        mailbox = Mailbox[str]("writer", 4)

        async def life() -> None:
            async with trio.open_nursery() as nursery:  # whose group hides the note one level down
                nursery.start_soon(mailbox.serve, handle)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                lambda: supervise({"writer": life}, RestartWindow(5, 60), backoff_seconds=1, report=reports.append)
            )
            for message in ("a", "poison", "b"):
                await mailbox.ref.tell(message)
            await trio.sleep(10)
            nursery.cancel_scope.cancel()
        assert handled == ["a", "b"]
        assert [report.in_hand for report in reports] == ["while handling 'poison'"]
        assert str(reports[0]).startswith("writer crashed: ")

    run(main)


def test_of_a_group_of_errors_the_first_is_told() -> None:
    error = ExceptionGroup("nursery", [ExceptionGroup("inner", [OSError("no route")]), ValueError("late")])
    assert str(CrashReport(name="lane", error=error, in_hand="")) == "lane crashed: OSError: no route"
