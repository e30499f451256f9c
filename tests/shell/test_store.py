"""Checkpoints: the two newest whole ones, each written whole or not at all."""

import errno
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy
import pytest
import trio

from hetero_async.errors import ConfigError, DiskFull, LogCorrupt
from hetero_async.ports import Checkpoint, ModelSnapshot
from hetero_async.shell import store as store_module
from hetero_async.shell.disk import Disk
from hetero_async.shell.store import MANIFEST, MODEL, CheckpointStore

T = TypeVar("T")


async def inline(function: Callable[..., T], *arguments: object) -> T:
    return function(*arguments)


def checkpoint_at(lsn: int) -> Checkpoint:
    arrays = {"parameters": numpy.arange(1000, dtype=numpy.float32) * lsn, "publish": numpy.array(lsn)}
    return Checkpoint(
        run="demo",
        lsn=lsn,
        chain=bytes(16),
        term=1,
        state={"version": lsn, "members": {"w1": {"norm": 0.1}}},
        state_hash=b"s" * 16,
        model=ModelSnapshot(arrays=arrays, model_hash=b"m" * 16),
    )


def store_at(directory: Path, disk: Disk | None = None) -> CheckpointStore:
    return CheckpointStore(directory, "demo", inline, disk or Disk())


def save(store: CheckpointStore, *lsns: int) -> list[int]:
    return [trio.run(store.save, checkpoint_at(lsn)) for lsn in lsns]


def assert_is(found: Checkpoint | None, lsn: int) -> None:
    expected = checkpoint_at(lsn)
    assert found is not None
    assert found.lsn == lsn
    assert (found.run, found.term, found.state, found.state_hash) == ("demo", 1, expected.state, expected.state_hash)
    assert found.model.model_hash == expected.model.model_hash
    assert found.model.arrays.keys() == expected.model.arrays.keys()
    for name, array in expected.model.arrays.items():
        numpy.testing.assert_array_equal(found.model.arrays[name], array, strict=True)


def path_of(directory: Path, lsn: int) -> Path:
    return directory / f"{lsn:020d}"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", "demo", trio.to_thread.run_sync)
    assert store.load_newest() is None
    assert save(store, 7) == [0]
    assert_is(CheckpointStore(tmp_path / "checkpoints", "demo", trio.to_thread.run_sync).load_newest(), 7)


def test_the_two_newest_are_kept_and_the_log_is_needed_from_the_older_on(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    assert save(store, 7, 12, 120, 1000) == [0, 7, 12, 120]
    assert store.lsns() == [120, 1000]
    assert sorted(path.name for path in tmp_path.iterdir()) == [path_of(tmp_path, lsn).name for lsn in (120, 1000)]
    assert_is(store.load_newest(), 1000)
    assert_is(store.load(120), 120)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped parameter": lambda path: flip(path / MODEL, 2000),
    "flipped header": lambda path: flip(path / MODEL, 20),
    "cut model": lambda path: (path / MODEL).write_bytes((path / MODEL).read_bytes()[:-1]),
    "no model": lambda path: (path / MODEL).unlink(),
    "flipped manifest": lambda path: flip(path / MANIFEST, 60),
    "empty manifest": lambda path: (path / MANIFEST).write_bytes(b""),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "another checkpoint's files": lambda path: shutil.copytree(path_of(path.parent, 7), path, dirs_exist_ok=True),
    "another checkpoint's model": lambda path: shutil.copy(path_of(path.parent, 7) / MODEL, path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_newest_falls_back_to_the_older_and_says_so(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    save(store_at(tmp_path), 7, 12)
    damage(path_of(tmp_path, 12))
    store = store_at(tmp_path)
    assert_is(store.load_newest(), 7)
    (warning,) = store.warnings
    assert str(path_of(tmp_path, 12)) in warning
    assert "\n" not in warning
    with pytest.raises(LogCorrupt):
        store.load(12)


def test_a_damaged_one_is_never_kept_in_place_of_a_whole_one(tmp_path: Path) -> None:
    save(store_at(tmp_path), 7, 12)
    flip(path_of(tmp_path, 12) / MODEL, 2000)
    store = store_at(tmp_path)
    store.load_newest()
    assert save(store, 15) == [7]
    assert store.lsns() == [7, 15]


def test_a_damaged_one_is_written_again(tmp_path: Path) -> None:
    save(store_at(tmp_path), 7, 12)
    flip(path_of(tmp_path, 12) / MODEL, 2000)
    store = store_at(tmp_path)
    store.load_newest()
    assert save(store, 12) == [7]
    assert_is(store.load_newest(), 12)
    assert store.warnings == []


def test_without_a_whole_one_there_is_none(tmp_path: Path) -> None:
    save(store_at(tmp_path), 7, 12)
    for lsn in (7, 12):
        flip(path_of(tmp_path, lsn) / MANIFEST, 60)
    store = store_at(tmp_path)
    assert store.load_newest() is None
    assert len(store.warnings) == 2


def test_saving_the_same_record_again_changes_nothing(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    assert save(store, 7, 12, 12) == [0, 7, 7]
    assert store.lsns() == [7, 12]


def test_another_runs_checkpoint_is_named(tmp_path: Path) -> None:
    save(store_at(tmp_path), 7)
    with pytest.raises(ConfigError, match='belongs to run "demo", not "other"'):
        CheckpointStore(tmp_path, "other", inline).load_newest()


def test_loading_changes_nothing_and_saving_removes_what_a_crash_left(tmp_path: Path) -> None:
    save(store_at(tmp_path), 7)
    leftover = path_of(tmp_path, 12).with_suffix(".new")
    leftover.mkdir()
    (leftover / MODEL).write_bytes(b"half")
    store = store_at(tmp_path)
    assert_is(store.load_newest(), 7)
    assert leftover.exists()
    assert save(store, 12) == [7]
    assert not leftover.exists()


class FullDisk(Disk):
    is_full = False

    def write(self, descriptor: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
        if not self.is_full:
            return super().write(descriptor, buffers, offset)
        if offset:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(descriptor, [memoryview(buffers[0])[:10]], offset)


def test_a_full_disk_leaves_the_older_ones_untouched(tmp_path: Path) -> None:
    disk = FullDisk()
    store = store_at(tmp_path, disk)
    save(store, 7, 12)
    disk.is_full = True
    with pytest.raises(DiskFull, match="no space left"):
        save(store, 15)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path_of(tmp_path, lsn).name for lsn in (7, 12)]
    assert_is(store.load_newest(), 12)
    disk.is_full = False
    assert save(store, 15) == [12]


class LyingDisk(Disk):
    def write(self, descriptor: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
        return super().write(descriptor, [bytes(buffers[0])[:-1] + b"?"], offset)


def test_what_reads_back_differently_halts_before_the_older_ones_are_dropped(tmp_path: Path) -> None:
    save(store_at(tmp_path), 7, 12)
    with pytest.raises(LogCorrupt):
        save(store_at(tmp_path, LyingDisk()), 15)
    store = store_at(tmp_path)
    assert_is(store.load_newest(), 12)
    assert_is(store.load(7), 7)


class Crash(BaseException):
    """The process is gone."""


class CrashingDisk(Disk):
    def __init__(self, crash_at: int = 0) -> None:
        self.crash_at = crash_at
        self.calls: list[str] = []

    def note(self, call: str) -> None:
        self.calls.append(call)
        if len(self.calls) == self.crash_at:
            raise Crash

    def write(self, descriptor: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
        self.note("write")
        return super().write(descriptor, buffers, offset)

    def fsync(self, descriptor: int) -> None:
        self.note("fsync")

    def rename(self, source: Path, target: Path) -> None:
        self.note("rename")
        super().rename(source, target)


def test_a_crash_at_any_call_leaves_two_whole_ones(tmp_path: Path) -> None:
    crashes = 0
    for crash_at in range(1, 100):
        directory = tmp_path / str(crash_at)
        save(store_at(directory), 7, 12)
        try:
            save(store_at(directory, CrashingDisk(crash_at)), 15)
        except Crash:
            crashes += 1
        else:
            break
        store = store_at(directory)
        newest = store.lsns()[-1]
        assert newest in (12, 15)
        assert_is(store.load_newest(), newest)
        assert store.warnings == []
        for lsn in store.lsns():
            assert_is(store.load(lsn), lsn)
        assert save(store, 20)[0] in (12, 15)
    assert crashes > 10


def test_files_and_names_are_synced_before_anything_is_dropped(tmp_path: Path) -> None:
    disk = CrashingDisk()
    store = store_at(tmp_path, disk)
    save(store, 7, 12)
    disk.calls.clear()
    save(store, 15)
    file = ["write", "fsync", "rename", "fsync"]
    assert disk.calls == ["fsync", *file, *file, "rename", "fsync", "rename"]


def test_two_are_kept() -> None:
    assert store_module.KEPT == 2
