"""Rows 29, 33–36, 39: the power goes before every disk call of a short life; all that was promised is there after it.

The same lives with code that forgets one sync must break a promise, or they would prove nothing.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filesystems.changed import BROKEN
from filesystems.power import CALLS, SEGMENT_BYTES, PowerCut, sweep
from filesystems.volumes import JOURNAL_ONLY, NOTHING_MORE, Volume, volume, why_not
from shell.small_log import append, entries_of, inline
from sim.mutants import MUTANTS, Mutant, plant

from hetero_async.shell.disk import Disk
from hetero_async.shell.log import FileLog

KINDS = ("ext4", "xfs")
SIMULATED = {mutant.name: mutant for mutant in MUTANTS}
# Each where it shows: XFS makes a segment's name durable with the first record that is written behind it.
FORGETFUL = (
    ("ext4", SIMULATED["no fdatasync"]),
    ("xfs", SIMULATED["no fsync of a new segment"]),
    ("ext4", SIMULATED["no fsync of the directory after a new segment"]),
    ("xfs", SIMULATED["checkpoint without fsync of its directory"]),
    ("xfs", Mutant(
        "a checkpoint's files are renamed before they are synced",
        "shell/disk.py",
        "        write_all(disk, descriptor, content, 0)\n        disk.fsync(descriptor)\n",
        "        write_all(disk, descriptor, content, 0)\n",
    )),
    ("ext4", Mutant(
        "no fsync of the directory after a rename in the outbox",
        "shell/disk.py",
        "            disk.rename(temporary, path)\n            sync_directory(path.parent, disk)\n",
        "            disk.rename(temporary, path)\n",
    )),
)  # fmt: skip


@pytest.mark.parametrize("leaving", [NOTHING_MORE, JOURNAL_ONLY], ids=["nothing more", "journal only"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_before_any_disk_call_takes_nothing_that_was_promised(
    tmp_path: Path, kind: str, leaving: int
) -> None:
    with volume(kind, tmp_path) as disk:
        calls = sweep(disk, leaving)
    assert set(calls) == set(CALLS)
    print(f"{kind}: the power was cut at {len(calls)} calls")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By mutant: the first promise that it broke."""
    possible = [(kind, mutant) for kind, mutant in FORGETFUL if not why_not(kind)]
    directories = {mutant.name: tmp_path_factory.mktemp("mutant") for _, mutant in possible}
    for _, mutant in possible:
        plant(mutant, directories[mutant.name])
    words = [word for kind, mutant in possible for word in (kind, str(directories[mutant.name]))]
    tests = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-m", "filesystems.changed", *words],
        cwd=tests,
        env={**os.environ, "PYTHONPATH": str(tests)},
        check=True,
    )
    return {name: (directory / BROKEN).read_text() for name, directory in directories.items()}


@pytest.mark.parametrize(("kind", "mutant"), FORGETFUL, ids=lambda given: getattr(given, "name", given))
def test_a_sync_that_is_forgotten_breaks_a_promise(kind: str, mutant: Mutant, broken: dict[str, str]) -> None:
    if reason := why_not(kind):
        pytest.skip(reason)
    print(broken[mutant.name])
    assert "promised: Told(" in broken[mutant.name]


class UnsyncedDisk(Disk):
    def fdatasync(self, descriptor: int) -> None:
        raise PowerCut


def opened(volume: Volume, disk: Disk) -> FileLog:
    return FileLog.open(volume.path / "log", "demo", inline, disk, SEGMENT_BYTES)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_restart_has_seen_in_the_page_cache_is_on_the_disk_before_it_goes_on(tmp_path: Path, kind: str) -> None:
    with volume(kind, tmp_path) as disk:
        log = opened(disk, Disk())
        append(log, entries_of(1, 1))
        log.close()
        log = opened(disk, UnsyncedDisk())
        with pytest.raises(PowerCut):
            append(log, entries_of(2, 2))
        log.close()
        log = opened(disk, Disk())
        assert log.last_lsn == 2, "read from memory: the disk has never got it"
        log.close()
        disk.cut_power()
        disk.power_on()
        log = opened(disk, Disk())
        assert list(log.entries()) == entries_of(1, 2)
        log.close()
