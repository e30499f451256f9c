"""A simulated process: its tasks run until it is killed, and rest while it is frozen.

The code under test never asks whether it is alive. It meets its process at the ports: each of them passes through
`here` or `rest`, where a frozen process rests and a dead one ends: nothing of a killed process reaches the world.
"""

from collections.abc import Callable
from random import Random
from typing import TypeVar

import trio

T = TypeVar("T")


class Killed(BaseException):
    """Raised at the ports of a dead process; not an Exception, so that nobody's error handling brings it back."""


class Process:
    def __init__(self, name: str, site: str) -> None:
        self.name = name
        self.site = site
        self.is_dead = False
        self.scope = trio.CancelScope()
        self._death = trio.Event()
        self._thawed = trio.Event()
        self._thawed.set()

    def kill(self) -> None:
        """At once: not another byte of it leaves or lands."""
        self.is_dead = True
        self.scope.cancel()
        self._death.set()
        self._thawed.set()

    async def died(self) -> None:
        """Wait for its death."""
        await self._death.wait()

    def freeze(self) -> None:
        if not self.is_dead and self._thawed.is_set():
            self._thawed = trio.Event()

    def thaw(self) -> None:
        self._thawed.set()

    async def here(self) -> None:
        """Pass a port: others may run meanwhile."""
        await self._thawed.wait()
        self.check()

    async def rest(self) -> None:
        """The same beside something else that lets others run: those rounds of the scheduler are what a world costs."""
        if not self._thawed.is_set():
            await self._thawed.wait()
        self.check()

    def check(self) -> None:
        if self.is_dead:
            raise Killed

    async def work(self, seconds: float) -> None:
        """Time that a thread takes: no cancellation ends it, only death."""
        with trio.move_on_after(seconds, shield=True):
            await self._death.wait()
        await self.rest()


class Worktime:
    """Fulfils ports.Blocking: the work takes a while, and is done at its beginning or at its end."""

    def __init__(self, process: Process, random: Random, seconds: float, delay: Callable[[], float]) -> None:
        """Up to `seconds` a call, and what `delay` says that the disk has added."""
        self._process = process
        self._random = random
        self._seconds = seconds
        self._delay = delay

    async def __call__(self, function: Callable[..., T], *arguments: object) -> T:
        await self._process.rest()
        seconds = self._random.uniform(0, self._seconds)
        if self._random.random() < 0.5:
            await self._process.work(seconds)
            seconds = 0.0
        result = function(*arguments)
        if (left := seconds + self._delay()) > 0:
            await self._process.work(left)
        return result
