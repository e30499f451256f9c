"""Starts again what crashed, as long as that helps: one child at a time, the others go on.

Whoever puts a process together calls `supervise`. The limit on restarts is one for all its children; past it the
failure climbs to the caller. Only `Exception` is answered with a restart: cancellation, Ctrl-C and exit pass through.
It never retries an operation: a child's next life begins at its beginning.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field

import trio

from hetero_async.errors import HeteroAsyncError, first_error

Child = Callable[[], Awaitable[None]]


class RestartLimit(HeteroAsyncError):
    """The children crash more often than their supervisor tolerates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashReport:
    """Who crashed, of what, over which message (empty when it was not a message's fault)."""

    name: str
    error: Exception
    in_hand: str

    def __str__(self) -> str:
        error = first_error(self.error) if isinstance(self.error, ExceptionGroup) else self.error
        cause = f"{type(error).__name__}: {error}".removesuffix(": ")
        return f"{self.name} crashed: {cause}" + (f" ({self.in_hand})" if self.in_hand else "")


@dataclass(slots=True)
class RestartWindow:
    """At most `intensity` restarts within any `period_seconds`: bursts are tolerated, a steady rate above it is not."""

    intensity: int
    period_seconds: float
    _restarts: list[float] = field(default_factory=list)

    def admits(self, now: float) -> bool:
        """Count a restart at `now`, and say whether it is still within the limit."""
        self._restarts = [at for at in self._restarts if at >= now - self.period_seconds] + [now]
        return len(self._restarts) <= self.intensity


async def supervise(
    children: Mapping[str, Child],
    window: RestartWindow,
    *,
    backoff_seconds: float,
    report: Callable[[CrashReport], None],
) -> None:
    """Run the children until all have ended well. Raises RestartLimit, from the last crash, when it is too many.

    A crashed child rests for `backoff_seconds` before its next life; meanwhile its siblings go on.
    """
    async with trio.open_nursery() as nursery:
        for name, child in children.items():
            nursery.start_soon(_keep_alive, name, child, window, backoff_seconds, report, name=name)


async def _keep_alive(
    name: str, child: Child, window: RestartWindow, backoff_seconds: float, report: Callable[[CrashReport], None]
) -> None:
    while True:
        try:
            await child()
        except Exception as error:
            crash = CrashReport(name=name, error=error, in_hand=_in_hand(error))
            report(crash)
            if not window.admits(trio.current_time()):
                raise RestartLimit(
                    f"{crash}; that is more than {window.intensity} restarts in {window.period_seconds:g} s"
                ) from error
        else:
            return
        await trio.sleep(backoff_seconds)


def _in_hand(error: Exception) -> str:
    """The note that an envelope left on the error, however deep it lies in groups."""
    return next((note for leaf in _leaves(error) for note in getattr(leaf, "__notes__", [])), "")


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
