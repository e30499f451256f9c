"""Lines for people: one an event, and nothing depends on whether they can be read."""

import json
import math
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import pytest
from shell.place import Notes

from hetero_async.core.records import Genesis, Metric, RunSettings
from hetero_async.errors import ConfigError
from hetero_async.shell.telemetry import (
    ENV_LOG,
    SUM_EVERY_SECONDS,
    JsonObserver,
    LineObserver,
    SeldomObserver,
    event_log,
    note,
)

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


# --- for what gathers logs ---


def told(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_an_event_is_one_json_object_with_its_time_in_utc(capsys: pytest.CaptureFixture[str]) -> None:
    log = JsonObserver("here-0", frozenset({"delta"}))
    log.event("delta", seq=1)
    log.event("log paused", reason="no\nspace \x1b[2J", path=Path("/runs/log"), after=(1, 2.5), is_full=True, what=None)
    [line] = told(capsys)
    assert line.pop("time").endswith("Z")
    assert line == {
        "process": "here-0", "event": "log paused", "reason": "no\nspace \x1b[2J", "path": "/runs/log",
        "after": [1, 2.5], "is_full": True, "what": None,
    }  # fmt: skip


def test_the_time_is_now(capsys: pytest.CaptureFixture[str]) -> None:
    JsonObserver("server").event("serving")
    [line] = told(capsys)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(line["time"])) < timedelta(minutes=1)


def test_a_record_is_an_object_that_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    log = JsonObserver("server")
    log.event("metric", lsn=7, record=Metric(worker="a-0", name="loss", value=2.5, version=3))
    log.event(
        "genesis", record=Genesis(key="K", settings=RunSettings(run="r"), schema_hash=b"\1\2", parameters_hash=b"")
    )
    metric, genesis = told(capsys)
    assert metric["record"] == {"type": "Metric", "worker": "a-0", "name": "loss", "value": 2.5, "version": 3}
    assert genesis["record"]["schema_hash"] == "0102" and genesis["record"]["settings"]["run"] == "r"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_number_for_is_text(capsys: pytest.CaptureFixture[str], value: float) -> None:
    JsonObserver("a-0").event("measured", value=value, time="mine", event="mine")
    [line] = told(capsys)
    assert line["value"] == str(value) and line["event"] == "measured" and line["time"] != "mine"


def test_the_environment_says_which(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_LOG, raising=False)
    assert isinstance(event_log("server"), LineObserver)
    note("a-0", "the optimizer begins anew")
    assert capsys.readouterr().err == "a-0: the optimizer begins anew\n"
    monkeypatch.setenv(ENV_LOG, "json")
    assert isinstance(event_log("server"), JsonObserver)
    note("a-0", "the optimizer begins anew")
    [line] = told(capsys)
    assert (line["process"], line["event"], line["text"]) == ("a-0", "note", "the optimizer begins anew")
    monkeypatch.setenv(ENV_LOG, "xml")
    with pytest.raises(ConfigError, match="HETERO_ASYNC_LOG=xml: must be lines or json"):
        event_log("server")


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
