"""Virtual time: it stands still while anything can be done, and then goes on to the next deadline at once."""

import math
from collections.abc import Callable

import trio

# More steps of tasks than any honest work takes at one moment.
STEPS_AT_ONCE_MAX = 20_000


class VirtualClock(trio.abc.Clock, trio.abc.Instrument):
    """A world's clock, in seconds from 0; to be given to trio.run as its instrument as well.

    trio's MockClock does the same with two more rounds of its scheduler for each step of time.
    """

    def __init__(self, stuck: Callable[[str], None]) -> None:
        """`stuck` is given the name of a task that is busy without end while no time passes."""
        self._now = 0.0
        self._steps = 0
        self._stuck = stuck

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Asked by trio when no task can run: then this is the time."""
        if deadline == math.inf:
            return math.inf
        if deadline > self._now:
            self._now, self._steps = deadline, 0
        return 0.0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._steps += 1
        if self._steps > STEPS_AT_ONCE_MAX:
            self._stuck(task.name)
