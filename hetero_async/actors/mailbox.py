"""A mailbox: how one task asks another, which owns something, to do something with it.

Whoever builds a shell makes the mailboxes and hands out their `Ref`s; an actor serves its own. The mailbox outlives
the actor: after a restart the same Refs reach the new life, and it goes on with the messages that were queued. A
Mailbox never starts a task, never waits by a clock of its own, and knows nothing of restarts.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

import trio

from hetero_async.errors import HeteroAsyncError

MessageT = TypeVar("MessageT")
# A crash report is one line: of a message with a large payload its start says enough.
IN_HAND_CHARACTERS_MAX = 200


class ActorDied(HeteroAsyncError):
    """The actor crashed on this message, or was stopped with it in hand; there will be no answer."""


@dataclass(frozen=True, slots=True)
class Envelope(Generic[MessageT]):
    """A message and the way back to its asker, if there is one. Leaving it closes that way, whatever happened."""

    message: MessageT
    answers: "trio.MemorySendChannel[object] | None" = None

    def __enter__(self) -> MessageT:
        return self.message

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, Exception):
            error.add_note(f"while handling {shortened(repr(self.message))}")
        if self.answers is not None:
            self.answers.close()

    def answer(self, value: object) -> None:
        """Answer an `ask`. A `tell` wants none, and an asker whose patience ended is not there any more."""
        if self.answers is None:
            return
        try:
            self.answers.send_nowait(value)
        except trio.BrokenResourceError:
            return


def shortened(text: str) -> str:
    is_long = len(text) > IN_HAND_CHARACTERS_MAX
    return text[: IN_HAND_CHARACTERS_MAX - 1] + "…" if is_long else text


class Ref(Generic[MessageT]):
    """What others hold of an actor. Stays good across its restarts."""

    def __init__(self, name: str, inbox: "trio.MemorySendChannel[Envelope[MessageT]]") -> None:
        self.name = name
        self._inbox = inbox

    async def tell(self, message: MessageT) -> None:
        """Leave a message; waits while the mailbox is full. Cancel-atomic: cancelled means not left."""
        await self._inbox.send(Envelope(message))

    async def ask(self, message: MessageT) -> object:
        """The actor's answer. Waits without end, so put it under `trio.fail_after`. Raises ActorDied.

        Cancelled, the message may still be handled; its answer is dropped.
        """
        answer_in, answer_out = trio.open_memory_channel[object](1)
        with answer_out:
            await self._inbox.send(Envelope(message, answer_in))
            try:
                return await answer_out.receive()
            except trio.EndOfChannel:
                raise ActorDied(f"{self.name} died over {shortened(repr(message))}") from None


class Mailbox(Generic[MessageT]):
    """`size` messages wait at most; then tellers wait, which is the back-pressure."""

    def __init__(self, name: str, size: int) -> None:
        self._inbox, self._waiting = trio.open_memory_channel[Envelope[MessageT]](size)
        self.ref = Ref(name, self._inbox)

    async def serve(self, handle: Callable[[MessageT], Awaitable[object]]) -> None:
        """Handle one message after the other until cancelled; what `handle` returns is the answer to an `ask`.

        An error of `handle` ends the actor. The message in hand is gone with it, so that it cannot kill the next life.
        """
        while True:
            envelope = await self._waiting.receive()
            with envelope as message:
                envelope.answer(await handle(message))
