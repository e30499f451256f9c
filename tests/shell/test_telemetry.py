"""Lines for people: one an event, and nothing depends on whether they can be read."""

import subprocess
import sys
from typing import IO, Any

from shell.place import Notes

from hetero_async.shell.telemetry import SUM_EVERY_SECONDS, SeldomObserver

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


# --- once a minute at most ---


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def seldom() -> tuple[SeldomObserver, Notes, Clock]:
    notes, clock = Notes(), Clock()
    return SeldomObserver(notes, clock), notes, clock


def test_the_first_of_a_kind_is_told_at_once_and_what_follows_is_summed_up_after_a_minute() -> None:
    observer, notes, clock = seldom()
    for number in range(9):
        observer.event("refused key", key=f"K{number}", reason="it is not in allowed.json")
        observer.event("strangers", connections_so_far=number)
        observer.event("refused message", worker=f"a-{number % 2}", key="A", reason="a header of 0 bytes")
    assert [name for name, _ in notes.events] == ["refused key", "refused message"]
    clock.seconds += SUM_EVERY_SECONDS
    observer.event("delta", lsn=7)
    assert notes.events[2:] == [
        ("more strangers", {"count": 17, "among": "K1, K2, K3, K4, K5", "last_connections_so_far": 8}),
        (
            "more refused messages",
            {
                "count": 8,
                "among": "a-1, a-0",
                "last_worker": "a-0",
                "last_key": "A",
                "last_reason": "a header of 0 bytes",
            },
        ),
        ("delta", {"lsn": 7}),
    ]


def test_however_long_it_goes_on_there_is_one_line_a_minute() -> None:
    observer, notes, clock = seldom()
    for number in range(4_801):
        observer.event("refused key", key=f"K{number}", reason="it is not in allowed.json")
        clock.seconds += 0.125
    told = [fields.get("count", 1) for _, fields in notes.events]
    assert len(told) == 1 + 10
    observer.tell_the_rest()
    assert sum([*told, *(fields["count"] for _, fields in notes.events[11:])]) == 4_801  # type: ignore[list-item]


def test_after_a_quiet_minute_the_next_is_told_at_once_again() -> None:
    observer, notes, clock = seldom()
    observer.event("quarantined", worker="a-0", key="A", reason="not finite")
    clock.seconds += SUM_EVERY_SECONDS
    observer.event("quarantined", worker="a-1", key="B", reason="not finite")
    observer.tell_the_rest()
    assert [(name, fields["worker"]) for name, fields in notes.events] == [
        ("quarantined", "a-0"),
        ("quarantined", "a-1"),
    ]
