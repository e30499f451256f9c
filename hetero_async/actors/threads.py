"""From another thread into trio's."""

import contextlib
from collections.abc import Callable

import trio


def soon(token: trio.lowlevel.TrioToken, call: Callable[..., object], *arguments: object) -> None:
    """Have it called in the thread of that token. Where that has ended nothing happens."""
    with contextlib.suppress(trio.RunFinishedError):
        token.run_sync_soon(call, *arguments)
