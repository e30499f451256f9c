"""The notes of what was refused: counted by key and kind, kept over a restart, bounded, and never in the way."""

import time
from pathlib import Path

import pytest

from hetero_async.errors import ConfigError
from hetero_async.shell import refusals
from hetero_async.shell.refusals import KEYS_MAX, KINDS_MAX, NAME, OTHER, RefusalNotes, kind_of, load_refusals


class Heard:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def event(self, name: str, **fields: object) -> None:
        self.events.append((name, fields))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]


def noting(directory: Path) -> tuple[RefusalNotes, Heard]:
    heard = Heard()
    return RefusalNotes(directory / NAME, heard), heard


def counts(directory: Path) -> dict[str, dict[str, int]]:
    found = load_refusals(directory / NAME)
    return {key: {kind: noted.count for kind, noted in refused.kinds.items()} for key, refused in found.items()}


def test_refusals_are_counted_by_key_and_kind(tmp_path: Path) -> None:
    notes, heard = noting(tmp_path)
    for reason in ("too stale: 5 versions behind, 4 allowed", "too stale: 7 versions behind, 4 allowed", "not finite"):
        notes.event("refused", worker="a-0", key="A", reason=reason)
    notes.event("refused", worker="b-0", key="B", reason="not finite")
    notes.write()
    assert counts(tmp_path) == {
        "A": {"too stale: … versions behind, … allowed": 2, "not finite": 1},
        "B": {"not finite": 1},
    }
    kept = load_refusals(tmp_path / NAME)["A"]
    assert kept.worker == "a-0"
    assert kept.kinds["too stale: … versions behind, … allowed"].last == "too stale: 7 versions behind, 4 allowed"
    assert abs(kept.kinds["not finite"].at - time.time()) < 3600
    assert heard.names == ["refused"] * 4, "everything is passed on"


def test_other_events_are_passed_on_and_not_noted(tmp_path: Path) -> None:
    notes, heard = noting(tmp_path)
    notes.event("delta", lsn=7)
    notes.write()
    assert heard.events == [("delta", {"lsn": 7})]
    assert not (tmp_path / NAME).exists()


def test_a_restart_counts_on(tmp_path: Path) -> None:
    for _ in range(2):
        notes, heard = noting(tmp_path)
        notes.event("refused", worker="a-0", key="A", reason="late")
        notes.write()
        assert heard.names == ["refused"]
    assert counts(tmp_path) == {"A": {"late": 2}}


def test_what_was_refused_is_on_disk_soon_without_anybody_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(refusals.time, "monotonic", lambda: now)
    notes, _ = noting(tmp_path)
    notes.event("refused", worker="a-0", key="A", reason="late")
    assert counts(tmp_path) == {"A": {"late": 1}}
    for _ in range(1000):
        notes.event("refused", worker="a-0", key="A", reason="late")
    assert counts(tmp_path) == {"A": {"late": 1}}, "a flood is written once a second"
    now += 1.0
    notes.event("beacon", lsn=9)
    assert counts(tmp_path) == {"A": {"late": 1001}}


def test_the_file_stays_small_whatever_comes(tmp_path: Path) -> None:
    notes, _ = noting(tmp_path)
    for number in range(100):
        notes.event("refused", worker="a-0", key="A", reason="é" * 10_000 + "x" * number)
        notes.event("refused", worker="a-0", key="A", reason="x" * number)
    for number in range(KEYS_MAX + 100):
        notes.event("refused", worker="w", key=f"key {number}", reason="late")
    notes.write()
    kept = counts(tmp_path)
    assert len(kept) == KEYS_MAX
    assert len(kept["A"]) == KINDS_MAX + 1
    assert sum(kept["A"].values()) == 200, "what has no room of its own is counted all the same"
    assert kept["A"][OTHER] == 200 - sum(count for kind, count in kept["A"].items() if kind != OTHER) > 0


def test_a_full_or_missing_disk_does_not_stop_the_server(tmp_path: Path) -> None:
    notes, heard = noting(tmp_path / "gone")
    notes.event("refused", worker="a-0", key="A", reason="late")
    assert heard.names == ["refused", "refusals not written"]
    (tmp_path / "gone").mkdir()
    notes.write()
    assert counts(tmp_path / "gone") == {"A": {"late": 1}}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"A": 1}', b'{"A": {"worker": "a", "kinds": {"x": {"count": 0}}}}']
)
def test_a_damaged_file_is_told_and_begun_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(ConfigError, match=r"refusals.json: is not a list of refusals \(.*\); remove it"):
        load_refusals(tmp_path / NAME)
    notes, heard = noting(tmp_path)
    assert heard.names == ["refusals counted anew"]
    notes.event("refused", worker="a-0", key="A", reason="late")
    assert counts(tmp_path) == {"A": {"late": 1}}


def test_no_file_means_that_nothing_was_refused(tmp_path: Path) -> None:
    assert load_refusals(tmp_path / NAME) == {}


def test_a_kind_is_a_reason_without_its_figures() -> None:
    assert kind_of("its norm 1.5e+03 is more than 20 times the median 0.07") == (
        "its norm … is more than … times the median …"
    )
