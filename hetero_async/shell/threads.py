"""Work that would stop the event loop, in a thread: fulfils ports.Blocking."""

import functools
from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Not cancellable once begun: a write to the log is finished or not begun."""
    return await trio.to_thread.run_sync(functools.partial(function, *arguments))


async def abandonable(function: Callable[..., T], *arguments: object) -> T:
    """For a call to somewhere else that may hang: cancelled, it is left to itself, and what came of it is not known."""
    return await trio.to_thread.run_sync(functools.partial(function, *arguments), abandon_on_cancel=True)
