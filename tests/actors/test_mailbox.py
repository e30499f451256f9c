"""Mailboxes: order, back-pressure, answers, and what a crash leaves behind."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from hetero_async.actors.mailbox import IN_HAND_CHARACTERS_MAX, ActorDied, Mailbox, Ref


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    return trio.run(main, clock=MockClock(autojump_threshold=0))


async def doubled(number: int) -> int:
    return 2 * number


def test_asking_returns_what_the_handler_returns() -> None:
    async def main() -> object:
        mailbox = Mailbox[int]("doubler", 4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mailbox.serve, doubled)
            with trio.fail_after(1):
                answer = await mailbox.ref.ask(21)
            nursery.cancel_scope.cancel()
        return answer

    assert run(main) == 42


def test_messages_are_handled_one_at_a_time_and_in_order() -> None:
    async def main() -> list[int]:
        handled: list[int] = []
        at_work = 0

        async def slowly(number: int) -> None:
            nonlocal at_work
            at_work += 1
            assert at_work == 1
            await trio.sleep(1)
            at_work -= 1
            handled.append(number)

        mailbox = Mailbox[int]("slow", 4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mailbox.serve, slowly)
            for number in range(10):
                await mailbox.ref.tell(number)
            await mailbox.ref.ask(10)
            nursery.cancel_scope.cancel()
        return handled

    assert run(main) == list(range(11))


def test_telling_waits_while_the_mailbox_is_full() -> None:
    async def main() -> None:
        mailbox = Mailbox[int]("unattended", 2)
        await mailbox.ref.tell(1)
        await mailbox.ref.tell(2)
        with pytest.raises(trio.TooSlowError), trio.fail_after(60):
            await mailbox.ref.tell(3)

    run(main)


def test_a_crash_of_the_handler_reaches_the_asker_and_ends_the_actor() -> None:
    async def main() -> None:
        async def crash(message: str) -> None:
            raise ValueError("cannot")

        mailbox = Mailbox[str]("weak", 1)
        asked: list[str] = []

        async def ask(ref: Ref[str]) -> None:
            with pytest.raises(ActorDied, match="weak died over 'poison'"):
                await ref.ask("poison")
            asked.append("poison")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, mailbox.ref)
            with pytest.raises(ValueError, match="cannot") as caught:
                await mailbox.serve(crash)
        assert asked == ["poison"]
        assert caught.value.__notes__ == ["while handling 'poison'"]

    run(main)


def test_stopping_an_actor_frees_its_asker() -> None:
    async def main() -> None:
        async def never(message: str) -> None:
            await trio.sleep_forever()

        mailbox = Mailbox[str]("stopped", 1)

        async def serve_for_a_while() -> None:
            with trio.move_on_after(5):
                await mailbox.serve(never)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_for_a_while)
            with pytest.raises(ActorDied):
                await mailbox.ref.ask("anything")

    run(main)


def test_a_late_answer_to_an_asker_who_left_is_dropped() -> None:
    async def main() -> object:
        async def late(seconds: int) -> int:
            await trio.sleep(seconds)
            return seconds

        mailbox = Mailbox[int]("late", 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mailbox.serve, late)
            with pytest.raises(trio.TooSlowError), trio.fail_after(1):
                await mailbox.ref.ask(10)
            answer = await mailbox.ref.ask(0)
            nursery.cancel_scope.cancel()
        return answer

    assert run(main) == 0


def test_the_mailbox_outlives_its_actor_and_only_the_message_in_hand_is_gone() -> None:
    async def main() -> list[str]:
        handled: list[str] = []

        async def handle(message: str) -> None:
            if message == "poison":
                raise ValueError(message)
            handled.append(message)

        mailbox = Mailbox[str]("phoenix", 8)
        for message in ("a", "poison", "b", "c"):
            await mailbox.ref.tell(message)
        with pytest.raises(ValueError):
            await mailbox.serve(handle)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mailbox.serve, handle)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        return handled

    assert run(main) == ["a", "b", "c"]


def test_a_large_message_is_cut_short_in_the_report() -> None:
    async def main() -> None:
        async def crash(message: bytes) -> None:
            raise ValueError

        mailbox = Mailbox[bytes]("weak", 1)
        await mailbox.ref.tell(bytes(1_000_000))
        with pytest.raises(ValueError) as caught:
            await mailbox.serve(crash)
        [note] = caught.value.__notes__
        assert len(note) <= IN_HAND_CHARACTERS_MAX + len("while handling ")

    run(main)
