"""Lines for people: one an event, and nothing depends on whether they can be read."""

import subprocess
import sys
from typing import IO, Any

TALKING = """
from hetero_async.shell.telemetry import LineObserver
LineObserver(frozenset({"delta"})).event("delta", seq=1)
LineObserver().event("log paused", reason="no space left")
print("goes on")
"""


def talking(errors: int | IO[Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", TALKING], stdout=subprocess.PIPE, stderr=errors, text=True, check=True, timeout=60
    )


def test_an_event_is_a_line_unless_it_is_quiet() -> None:
    [line] = talking(subprocess.PIPE).stderr.splitlines()
    assert line[8:] == " log paused reason=no space left"


def test_a_line_that_finds_no_room_stops_nobody() -> None:
    """Where the lines go is often the disk that is full."""
    with open("/dev/full", "w") as full:
        assert talking(full).stdout == "goes on\n"
