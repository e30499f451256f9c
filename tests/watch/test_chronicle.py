"""The thread that keeps a history and shows it: whatever goes wrong in there, whoever hands over does not feel it."""

import json
import threading
from pathlib import Path
from typing import Any

import trio
from e2e.harness import until
from watch.long_run import status_at

from hetero_async.core.records import Delta, Left, Stepped
from hetero_async.watch.chronicle import Chronicle, load_history, open_chronicle

PATIENCE_SECONDS = 60.0


class Heard:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def event(self, name: str, **fields: object) -> None:
        self.events.append((name, fields))

    def names(self) -> list[str]:
        return [name for name, _ in self.events]


def looked(chronicle: Chronicle, trained: int) -> None:
    def is_taken() -> bool:
        looks = chronicle.looks
        return looks is not None and looks.status.get("trained") == trained

    until(is_taken, f"{trained} samples are seen", PATIENCE_SECONDS, str)


def delta(lsn: int, worker: str, anchor: int) -> dict[str, Any]:
    record = Delta(
        worker=worker, incarnation=1, seq=lsn, anchor_version=anchor, steps=1, ranges=((lsn, lsn + 1),), codec="int8",
        norm=1.0, payload_hash=b"",
    )  # fmt: skip
    return {"lsn": lsn, "record": record}


def test_what_is_handed_over_and_told_is_in_its_file(tmp_path: Path) -> None:
    heard = Heard()
    with open_chronicle(tmp_path, heard, None) as chronicle:
        chronicle.hand(status_at(1))
        looked(chronicle, status_at(1)["trained"])
        chronicle.event("delta", **delta(3, "office-0", 4))
        chronicle.event("stepped", lsn=4, record=Stepped(version=6, deltas=(3,), weights=(1.0,), gain=1.0))
        chronicle.event("left", lsn=5, record=Left(worker="office-0", reason="said bye"))
        chronicle.event("log paused", reason="no space")
        chronicle.hand(status_at(2, dead=frozenset(["office-0"])))
    history = load_history(tmp_path / "history.json")
    assert history is not None
    assert history.staleness == {1: 1}
    assert [(mark.kind, mark.who, mark.text) for mark in history.marks] == [
        ("paused", "", "no space"),
        ("left", "office-0", "said bye"),
    ]
    assert heard.names() == ["delta", "stepped", "left", "log paused"], "and everything was passed on"


def test_a_page_that_crashes_is_told_of_once_and_the_history_goes_on(tmp_path: Path) -> None:
    heard, tries = Heard(), []

    async def crash(chronicle: Chronicle) -> None:
        tries.append(1)
        raise ValueError("a page without sense")

    with open_chronicle(tmp_path, heard, crash) as chronicle:
        chronicle.hand(status_at(1))
        until(lambda: tries, "it crashes", PATIENCE_SECONDS, str)
        for again in range(3):
            chronicle.complain("dashboard crashed: ValueError: a page without sense")
            chronicle.hand(status_at(10 + again))
            looked(chronicle, status_at(10 + again)["trained"])
    assert heard.names() == ["dashboard failing"]
    assert load_history(tmp_path / "history.json") is not None


def test_a_thread_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    release = threading.Event()

    async def hang(chronicle: Chronicle) -> None:
        release.wait()

    with open_chronicle(tmp_path, Heard(), hang) as chronicle:
        chronicle.hand(status_at(0))
        for second in range(1000):
            chronicle.hand(status_at(1))
            chronicle.event("delta", **delta(second + 1, "office-0", 0))
        assert chronicle._newest is not None, "only the newest waits to be taken"
    release.set()


def test_a_status_that_cannot_be_had_ends_nothing(tmp_path: Path) -> None:
    heard = Heard()
    asked: list[int] = []

    def status() -> dict[str, Any]:
        asked.append(1)
        raise KeyError("worker")

    async def follow(chronicle: Chronicle) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(chronicle.follow, status)
            with trio.fail_after(PATIENCE_SECONDS):
                while not heard.events:  # noqa: ASYNC110, the deadline ends it
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    with open_chronicle(tmp_path, heard, None) as chronicle:
        trio.run(follow, chronicle)
    assert [name for name, _ in heard.events] == ["dashboard failing"]
    assert "KeyError" in str(heard.events[0][1]["reason"])


def test_a_damaged_history_is_begun_anew(tmp_path: Path) -> None:
    heard = Heard()
    (tmp_path / "history.json").write_text("{")
    with open_chronicle(tmp_path, heard, None) as chronicle:
        chronicle.hand(status_at(1))
    assert heard.names() == ["history begun anew"]
    kept = json.loads((tmp_path / "history.json").read_text())
    assert kept["whole"]["figures"]["trained"] == [status_at(1)["trained"]]


def test_where_it_cannot_be_written_the_run_goes_on(tmp_path: Path) -> None:
    heard = Heard()
    (tmp_path / "history.json.new").mkdir()
    with open_chronicle(tmp_path, heard, None) as chronicle:
        chronicle.hand(status_at(1))
    assert heard.names() == ["dashboard failing"]
    assert "not written" in str(heard.events[0][1]["reason"])
