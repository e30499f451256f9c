"""Checkpoints on their way from one node to another, and those that a standby must forget."""

from pathlib import Path

import numpy
import pytest
import trio
from shell.small_log import SilentDisk, inline
from shell.test_log_faults import Crash, CrashingDisk

from hetero_async.errors import ConfigError, HeteroAsyncError, LogCorrupt
from hetero_async.ports import Checkpoint, ModelSnapshot
from hetero_async.shell.disk import Disk
from hetero_async.shell.store import MODEL, CheckpointStore

CHAIN = b"c" * 16


def store_at(directory: Path, run: str = "demo", disk: Disk | None = None) -> CheckpointStore:
    return CheckpointStore(directory, run, inline, disk or SilentDisk())


def saved(directory: Path, *lsns: int) -> CheckpointStore:
    store = store_at(directory)
    for lsn in lsns:
        arrays = {"parameters": numpy.arange(500, dtype=numpy.float32) * lsn}
        model = ModelSnapshot(arrays=arrays, model_hash=b"m" * 16)
        checkpoint = Checkpoint(
            run="demo", lsn=lsn, term=2, chain=CHAIN, state={"version": lsn}, state_hash=b"s" * 16, model=model
        )
        trio.run(store.save, checkpoint)
    return store


def kept(store: CheckpointStore, manifest: bytes, arrays: bytes | memoryview) -> Checkpoint:
    return trio.run(store.keep, manifest, bytes(arrays))


def packed(store: CheckpointStore, lsn: int) -> tuple[int, bytes, bytes]:
    found = store.packed(lsn)
    assert found is not None
    return found[0], found[1], bytes(found[2])


def test_a_checkpoint_that_was_packed_is_kept_elsewhere_and_is_the_same(tmp_path: Path) -> None:
    here, there = saved(tmp_path / "here", 7, 12), store_at(tmp_path / "there")
    lsn, manifest, arrays = packed(here, 12)
    checkpoint = kept(there, manifest, arrays)
    assert (lsn, checkpoint.lsn, checkpoint.term, checkpoint.chain) == (12, 12, 2, CHAIN)
    again = store_at(tmp_path / "there").load_newest()
    assert again is not None
    assert (again.lsn, again.chain, again.state, again.model.model_hash) == (12, CHAIN, {"version": 12}, b"m" * 16)
    numpy.testing.assert_array_equal(again.model.arrays["parameters"], here.load(12).model.arrays["parameters"])


@pytest.mark.parametrize(("asked", "given"), [(0, 12), (7, 7), (12, 12), (9, None)])
def test_the_one_that_is_asked_for_is_packed_or_the_newest(tmp_path: Path, asked: int, given: int | None) -> None:
    found = saved(tmp_path, 7, 12).packed(asked)
    assert (found and found[0]) == given


def test_a_damaged_one_is_not_handed_out(tmp_path: Path) -> None:
    path = saved(tmp_path, 7, 12).directory / f"{12:020d}" / MODEL
    path.write_bytes(b"damaged" + path.read_bytes()[7:])
    store = store_at(tmp_path)
    store.load_newest()  # a node has done so before it hands anything out
    assert packed(store, 0)[0] == 7
    assert store.packed(12) is None
    assert store_at(tmp_path / "empty").packed(0) is None


@pytest.mark.parametrize("at", [0, 8, 100, -1])
def test_a_checkpoint_that_was_damaged_on_its_way_is_not_used(tmp_path: Path, at: int) -> None:
    _, manifest, arrays = packed(saved(tmp_path / "here", 7), 7)
    damaged = bytearray(arrays)
    damaged[at] ^= 1
    there = saved(tmp_path / "there", 3)
    with pytest.raises(LogCorrupt, match="fails its checksum"):
        kept(there, manifest, bytes(damaged))
    newest = store_at(tmp_path / "there").load_newest()
    assert newest is not None and newest.lsn == 3


def test_a_manifest_that_is_none_changes_nothing(tmp_path: Path) -> None:
    _, manifest, arrays = packed(saved(tmp_path / "here", 7), 7)
    there = store_at(tmp_path / "there")
    for hostile in (b"", b"{}", b"\xff" * 40, manifest[:-1]):
        with pytest.raises(HeteroAsyncError, match="the checkpoint that came"):
            kept(there, hostile, arrays)
    with pytest.raises(ConfigError, match='belongs to run "demo", not "other"'):
        kept(store_at(tmp_path / "there", "other"), manifest, arrays)
    assert not (tmp_path / "there").exists()


def test_keeping_that_crashed_leaves_all_or_nothing_and_is_done_again(tmp_path: Path) -> None:
    _, manifest, arrays = packed(saved(tmp_path / "here", 7), 7)
    crashes = 0
    for crash_at in range(1, 100):
        directory = tmp_path / str(crash_at)
        saved(directory, 3)
        try:
            kept(store_at(directory, disk=CrashingDisk(crash_at)), manifest, arrays)
        except Crash:
            crashes += 1
        else:
            break
        newest = store_at(directory).load_newest()
        assert newest is not None and newest.lsn in (3, 7)
        assert kept(store_at(directory), manifest, arrays).lsn == 7
        assert store_at(directory).lsns() == [3, 7]
    assert crashes > 5


@pytest.mark.parametrize(("lsn", "left"), [(0, []), (6, []), (7, [7]), (11, [7]), (12, [7, 12]), (99, [7, 12])])
def test_those_of_records_that_were_cut_are_forgotten(tmp_path: Path, lsn: int, left: list[int]) -> None:
    store = saved(tmp_path, 7, 12)
    store.drop_after(lsn)
    assert store.lsns() == left
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"{each:020d}" for each in left]
