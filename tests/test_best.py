"""The best publish's file: written when it is handed out for measuring, kept or dropped when it is answered."""

from collections.abc import Callable
from typing import Any

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from hetero_async.best import BestKeeper
from hetero_async.core.records import Entry, Evaluated, Evaluation
from hetero_async.core.state import Kept, State
from hetero_async.errors import DiskFull


class Files:
    def __init__(self, *held: tuple[int, int]) -> None:
        self.kept: dict[tuple[int, int], bytes] = dict.fromkeys(held, b"old")
        self.is_full = False
        self.most = 0

    def held(self) -> list[tuple[int, int]]:
        return list(self.kept)

    def save(self, name: tuple[int, int], content: bytes) -> None:
        if self.is_full:
            raise DiskFull("no space")
        self.kept[name] = content
        self.most = max(self.most, len(self.kept))

    def drop(self, name: tuple[int, int]) -> None:
        del self.kept[name]


class Told:
    def __init__(self) -> None:
        self.events: list[str] = []

    def event(self, name: str, **fields: object) -> None:
        self.events.append(name)


class Shown:
    """A model whose parameters are the number of its publish."""

    def __init__(self, number: int) -> None:
        self.number = number

    def published(self) -> "Shown":
        return Shown(self.number)

    def packed(self, about: dict[str, str]) -> bytes:
        return f"{self.number} as {about['publish']}".encode()


class Scene:
    def __init__(self, files: Files) -> None:
        self.files, self.told, self.state = files, Told(), State()
        self.keeper = BestKeeper(files, self._blocking, self.told)

    async def _blocking(self, function: Callable[..., Any], *arguments: object) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    def handed_out(self, lsn: int, publish: int) -> None:
        record = Evaluation(worker="w", publish=publish)
        self.keeper.seen(Entry(lsn=lsn, term=1, record=record), Shown(publish))
        self.state.evaluation = Kept(term=1, lsn=lsn, worker="w", publish=publish, version=publish, trained=0)
        self.keeper.settle(self.state)

    def answered(self, lsn: int, *, is_best: bool) -> None:
        given = self.state.evaluation
        record = Evaluated(worker="w", publish=given.publish, name="loss" if is_best else "")
        self.keeper.seen(Entry(lsn=lsn, term=1, record=record), Shown(99))
        self.state.best, self.state.evaluation = given if is_best else self.state.best, None
        self.keeper.settle(self.state)


def play(scene: Scene, act: Callable[[], Any]) -> None:
    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.keeper.run)
            await act()
            nursery.cancel_scope.cancel()

    trio.run(run, clock=MockClock(autojump_threshold=0.01))


def test_what_was_measured_best_stays_and_all_else_goes() -> None:
    scene = Scene(Files())

    async def act() -> None:
        for number, is_best in enumerate([True, False, True, False], 1):
            scene.handed_out(10 * number, number)
            assert scene.keeper.is_busy, "a checkpoint waits for it"
            await wait_all_tasks_blocked(0.001)
            assert not scene.keeper.is_busy
            scene.answered(10 * number + 5, is_best=is_best)
            await wait_all_tasks_blocked(0.001)
        assert scene.files.kept == {(1, 30): b"3 as 3"}
        assert scene.files.most == 2

    play(scene, act)


def test_an_answer_may_come_before_the_file_is_written() -> None:
    scene = Scene(Files())

    async def act() -> None:
        scene.handed_out(10, 1)
        scene.answered(11, is_best=True)
        scene.handed_out(20, 2)
        await wait_all_tasks_blocked(0.001)
        assert scene.files.kept == {(1, 10): b"1 as 1", (1, 20): b"2 as 2"}

    play(scene, act)


def test_a_full_disk_is_waited_for_and_told() -> None:
    scene = Scene(Files())

    async def act() -> None:
        scene.files.is_full = True
        scene.handed_out(10, 1)
        await trio.sleep(2.5)
        assert scene.keeper.is_busy
        assert scene.told.events == ["best not kept"] * 3
        scene.files.is_full = False
        await trio.sleep(1.0)
        assert not scene.keeper.is_busy and scene.files.kept == {(1, 10): b"1 as 1"}

    play(scene, act)


def test_a_recovery_finds_the_files_of_an_earlier_life_and_makes_those_that_lack() -> None:
    scene = Scene(Files((1, 10), (1, 7)))
    for lsn, publish in ((10, 1), (20, 2)):
        scene.keeper.seen(Entry(lsn=lsn, term=1, record=Evaluation(worker="w", publish=publish)), Shown(publish))
        best = Evaluated(worker="w", publish=publish, name="loss" if publish == 1 else "")
        scene.keeper.seen(Entry(lsn=lsn + 1, term=1, record=best), Shown(99))
    scene.keeper.seen(Entry(lsn=30, term=1, record=Evaluation(worker="w", publish=3)), Shown(3))
    scene.state.best = Kept(term=1, lsn=10, worker="w", publish=1, version=1, trained=0, name="loss")
    scene.state.evaluation = Kept(term=1, lsn=30, worker="w", publish=3, version=3, trained=0)

    async def act() -> None:
        scene.keeper.settle(scene.state)
        await wait_all_tasks_blocked(0.001)
        assert scene.files.kept == {(1, 10): b"old", (1, 30): b"3 as 3"}

    play(scene, act)
