"""Work that would stop the event loop, in a thread: fulfils ports.Blocking."""

import functools
from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Not cancellable once begun: a write to the log is finished or not begun."""
    return await trio.to_thread.run_sync(functools.partial(function, *arguments))
