"""Rows 29, 33–36, 39: the power goes before every disk call of a short life; all that was promised is there after it.

The same lives, and those of rows 29, 30 and 32, with code that does one thing wrong must break a promise, or they
would prove nothing.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filesystems.changed import BROKEN
from filesystems.power import CALLS, fill_up, restart, sweep
from filesystems.volumes import JOURNAL_ONLY, NOTHING_MORE, Volume, volume, why_not
from sim.mutants import MUTANTS, Mutant, plant

KINDS = ("ext4", "xfs")
SIMULATED = {mutant.name: mutant for mutant in MUTANTS}
# Each where it shows: XFS makes a segment's name durable with the first record that is written behind it.
WRONG = (
    ("ext4", "sweep", SIMULATED["no fdatasync"]),
    ("xfs", "sweep", SIMULATED["no fsync of a new segment"]),
    ("ext4", "sweep", SIMULATED["no fsync of the directory after a new segment"]),
    ("xfs", "sweep", SIMULATED["checkpoint without fsync of its directory"]),
    ("ext4", "restart", Mutant(
        "what a start has read is not written anew",
        "shell/log.py",
        "            self._install(path, _blocks(path, end.offset), end.offset)\n",
        "            self._path, self._segment, self._offset = path, os.open(path, os.O_RDWR), end.offset\n",
    )),
    ("ext4", "fill up", Mutant(
        "a record for which there is no space is acknowledged",
        "shell/log.py",
        "                self._disk.fsync(self._segment)\n            raise\n",
        "                self._disk.fsync(self._segment)\n            return self._offset\n",
    )),
    ("ext4", "refuse", Mutant(
        "a disk that fails ends nothing",
        "shell/disk.py",
        "        disk.failed(path, error)\n",
        "        pass\n",
    )),
    ("xfs", "sweep", Mutant(
        "a checkpoint's files are renamed before they are synced",
        "shell/disk.py",
        "        write_all(disk, descriptor, content, 0)\n        disk.fsync(descriptor)\n",
        "        write_all(disk, descriptor, content, 0)\n",
    )),
    ("ext4", "sweep", Mutant(
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
    possible = [(kind, life, mutant) for kind, life, mutant in WRONG if not why_not(kind)]
    directories = {mutant.name: tmp_path_factory.mktemp("mutant") for _, _, mutant in possible}
    for _, _, mutant in possible:
        plant(mutant, directories[mutant.name])
    words = [word for kind, life, mutant in possible for word in (kind, life, str(directories[mutant.name]))]
    tests = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-m", "filesystems.changed", *words],
        cwd=tests,
        env={**os.environ, "PYTHONPATH": str(tests)},
        check=True,
    )
    return {name: (directory / BROKEN).read_text() for name, directory in directories.items()}


@pytest.mark.parametrize(("kind", "life", "mutant"), WRONG, ids=lambda given: getattr(given, "name", given))
def test_wrong_code_breaks_a_promise(kind: str, life: str, mutant: Mutant, broken: dict[str, str]) -> None:
    if reason := why_not(kind):
        pytest.skip(reason)
    print(broken[mutant.name])
    found = "promised: Told\\(" if life == "sweep" else "a record is lost|found record 2 in its place"
    assert re.search(found, broken[mutant.name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("life", [restart, fill_up])
def test_29_30_what_a_start_has_read_is_kept_and_a_full_disk_takes_nothing(
    tmp_path: Path, kind: str, life: Callable[[Volume], None]
) -> None:
    with volume(kind, tmp_path) as disk:
        life(disk)
