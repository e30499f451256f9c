"""What a standby has promised outlives it."""

from pathlib import Path

import pytest
from shell.test_log_faults import Crash, CrashingDisk

from hetero_async.errors import LogCorrupt
from hetero_async.shell.promise import FilePromises


def test_the_last_promise_is_what_is_loaded(tmp_path: Path) -> None:
    promises = FilePromises(tmp_path / "promised-term")
    assert promises.load() == 0
    for term in (3, 4, 10**15):
        promises.save(term)
        assert FilePromises(tmp_path / "promised-term").load() == term
    assert [path.name for path in tmp_path.iterdir()] == ["promised-term"]


@pytest.mark.parametrize("content", [b"", b"3", b"{}", b'{"term": null}', b'{"term": "x"}', b"\xff\0", b"[]"])
def test_a_damaged_promise_is_told_and_not_taken_for_none(tmp_path: Path, content: bytes) -> None:
    """Taken for none it would let two servers reign."""
    path = tmp_path / "promised-term"
    path.write_bytes(content)
    with pytest.raises(LogCorrupt, match=r'promised-term: must be \{"term": NUMBER\}'):
        FilePromises(path).load()


def test_a_crash_leaves_the_old_promise_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "promised-term"
    seen = []
    for crash_at in range(1, 5):
        FilePromises(path).save(3)
        with pytest.raises(Crash):
            FilePromises(path, CrashingDisk(crash_at)).save(4)
        seen.append(FilePromises(path).load())
    assert seen == [3, 3, 3, 4], "write, fsync, rename, fsync of the directory"
