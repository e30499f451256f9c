"""Rows 28–33 and 41 with real processes: the server's disk fills up, fails, slows down or loses its power in a run.

Only the server's log, or its checkpoints, lie on the bad disk, so that the witnesses of the harness see everything. It
judges each run at its end: what was acknowledged is in the log at the place that was named.
"""

import contextlib
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.harness import PATIENCE_SECONDS, Life, Run, until
from e2e.lives import PROMISED
from filesystems.power import payload_of, push
from filesystems.volumes import Volume, volume
from hostile import wide

from hetero_async.core.records import Left
from hetero_async.errors import DiskFull
from hetero_async.shell.outbox import ACKNOWLEDGED, FileOutbox
from hetero_async.shell.store import CheckpointStore
from hetero_async.shell.threads import in_thread

# Smaller than the initial parameters: the first segment's last write goes beyond what was preallocated.
SEGMENT_BYTES = 8 * 1024
SHORT: dict[str, Any] = {"samples": 800, "seconds_per_round": 0.06, "steps_per_round": 4}
STEP_SECONDS = 0.004
# Of the 100 batches of such a run; more than a round, so that each of two workers has pushed by then.
STEPS_BEFORE_HOLD = 20


@contextlib.contextmanager
def run_on(disk: Volume, directory: Path, *, part: str = "log", **training: Any) -> Iterator[Run]:
    """A run whose `part` lies on that disk."""
    with Run(directory, **{**SHORT, "server": {"checkpoint_every": 1}, **training}) as run:
        (disk.path / part).mkdir()
        (run.config.directory / part).symlink_to(disk.path / part)
        yield run


def start(run: Run) -> tuple[Life, Life]:
    """The server, and both workers in one process."""
    return start_server(run), run.start_together(step_seconds=STEP_SECONDS)


def start_server(run: Run) -> Life:
    return run.start_server(segment_bytes=SEGMENT_BYTES)


def promised(run: Run) -> list[str]:
    path = run.config.directory / PROMISED
    return path.read_text().splitlines() if path.exists() else []


def wait_for_promises(run: Run, count: int = 3) -> None:
    run.wait(lambda: len(promised(run)) >= count, f"{count} deltas are acknowledged")


@contextlib.contextmanager
def injected(life: Life, directory: Path, fault: str) -> Iterator[None]:
    """That fault in the process's system calls from now on, for as long as this lasts."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    said = directory / "strace.said"
    call = fault.split(":")[0]
    with said.open("wb") as file:
        words = ["strace", "-f", "-p", str(life.pid), "-e", f"trace={call}", "-e", f"inject={fault}"]
        strace = subprocess.Popen(words, stderr=file)
    try:
        until(
            lambda: "attached" in said.read_text() or strace.poll() is not None,
            "strace attaches",
            PATIENCE_SECONDS,
            said.read_text,
        )
        if "attached" not in said.read_text():
            pytest.skip(said.read_text().strip())
        yield
    finally:
        strace.terminate()
        strace.wait()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_33_a_server_whose_disk_loses_its_power_stops_and_has_all_it_acknowledged(tmp_path: Path, kind: str) -> None:
    with volume(kind, tmp_path / "disk") as disk, run_on(disk, tmp_path / "run") as run:
        server, workers = start(run)
        wait_for_promises(run)
        disk.cut_power()
        assert server.ending() == 74
        disk.power_on()
        run.finish(start_server(run), workers)


def test_28_29_after_a_failed_fdatasync_nothing_is_acknowledged_and_the_page_cache_is_not_believed(
    tmp_path: Path,
) -> None:
    with volume("ext4", tmp_path / "disk") as disk, run_on(disk, tmp_path / "run") as run:
        server, workers = start(run)
        wait_for_promises(run)
        with injected(server, tmp_path, "fdatasync:error=EIO:when=1"):
            assert server.ending() == 74
        assert server.said.splitlines()[-1].endswith(
            "Input/output error: stopping at once, restart when it is repaired"
        )
        server = start_server(run)  # it goes on from what the page cache shows, and promises more
        wait_for_promises(run, len(promised(run)) + 2)
        disk.cut_power()
        assert server.ending() == 74
        disk.power_on()
        run.finish(start_server(run), workers)


def slow_commits(server: Life) -> list[float]:
    return [float(seconds) for seconds in re.findall(r"slow disk seconds=([\d.]+)", server.said)]


def test_41_a_slow_disk_slows_acknowledgements_and_nobody_is_given_up_for_it(tmp_path: Path) -> None:
    with volume("ext4", tmp_path / "disk") as disk, run_on(disk, tmp_path / "run", lease_ttl_seconds=3.0) as run:
        server, workers = start(run)
        wait_for_promises(run)
        with injected(server, tmp_path, "fdatasync:delay_enter=3500000:when=1"):
            run.wait(lambda: any(seconds >= 3.5 for seconds in slow_commits(server)), "the server tells of it")
        run.finish(server, workers)
        assert {left.reason for left in run.records(Left)} == {"said bye"}


def fill_at_the_start(disk: Volume, run: Run) -> tuple[Life, Life]:
    disk.fill()
    return start(run)


def fill_before_the_initial_parameters(disk: Volume, run: Run) -> tuple[Life, Life]:
    """The first segment fits, and a part of the first record behind it."""
    disk.fill(leaving_bytes=16 * 1024)
    return start(run)


def fill_in_the_middle(disk: Volume, run: Run) -> tuple[Life, Life]:
    started = start(run)
    wait_for_promises(run)
    disk.fill()
    return started


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
@pytest.mark.parametrize(
    "filled",
    [fill_at_the_start, fill_before_the_initial_parameters, fill_in_the_middle],
    ids=lambda fill: fill.__name__,
)
def test_30_a_full_disk_pauses_the_server_until_there_is_space(
    tmp_path: Path, filled: Callable[[Volume, Run], tuple[Life, Life]], kind: str
) -> None:
    with volume(kind, tmp_path / "disk") as disk, run_on(disk, tmp_path / "run") as run:
        server, workers = filled(disk, run)
        told = f"log paused reason=no space left to write {run.config.log}"
        run.wait(lambda: told in server.said, "the server pauses")
        if filled is not fill_at_the_start:  # nobody can ask before there is a log
            before = promised(run)
            assert run.status()["state"].startswith("paused: no space left to write ")
            assert promised(run) == before
        disk.free()
        run.finish(server, workers)
        assert server.said.count("log paused") == server.said.count("log resumed") == 1


def test_30_a_worker_whose_disk_is_full_waits_and_loses_nothing(tmp_path: Path) -> None:
    with volume("tmpfs", tmp_path / "disk") as disk, run_on(disk, tmp_path / "run", part="workers") as run:
        run.start_server()
        workers = [run.start_worker(name, awaited=run.names, step_seconds=STEP_SECONDS) for name in run.names]
        wait_for_promises(run)
        for worker in workers:  # what one frees the other may take, so it is filled again and again
            run.wait(lambda worker=worker: disk.fill() or "outbox paused" in worker.said, f"{worker.name} waits")
        disk.free()
        run.finish()
        assert all(run.acknowledged(name) for name in run.names)


def test_30_a_note_of_an_acknowledgement_takes_the_space_of_its_delta(tmp_path: Path) -> None:
    with volume("tmpfs", tmp_path / "disk") as disk:
        outbox = FileOutbox(disk.path)
        outbox.save(push(1), payload_of(1))
        disk.fill()
        with pytest.raises(DiskFull):
            outbox.drop(1, is_acknowledged=True)
        outbox.drop(1, is_acknowledged=True)
        assert len((disk.path / ACKNOWLEDGED).read_text().splitlines()) == 1
        assert outbox.load() == {}


def test_31_a_disk_too_full_for_a_checkpoint_leaves_the_older_one_and_the_log(tmp_path: Path) -> None:
    options: dict[str, Any] = {"samples": 1600, "server": {"checkpoint_every": 1, "keep_log": False}}
    with (
        volume("ext4", tmp_path / "disk") as disk,
        run_on(disk, tmp_path / "run", part="checkpoints", **options) as run,
    ):
        store = CheckpointStore(run.config.checkpoints, "tiny", in_thread)
        server, workers = start(run)
        run.wait(lambda: len(store.lsns()) == 2, "there are two checkpoints")
        run.wait(lambda: disk.fill() or "checkpoint failed" in server.said, "there is no space for the next")
        server.kill()
        newest = store.load_newest()
        assert newest is not None and not store.warnings
        server = start_server(run)
        run.wait(lambda: "checkpoint failed" in server.said, "it has gone on, and there is still no space")
        assert f"recovered from_checkpoint={newest.lsn} " in server.said
        disk.free()
        run.wait(lambda: store.lsns()[-1] > newest.lsn, "checkpoints are written again")
        run.finish(server, workers)


def make_read_only(disk: Volume, server: Life) -> None:
    disk.find_error()


def forbid_more_files(disk: Volume, server: Life) -> None:
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (3, 3))


@pytest.mark.parametrize(
    ("hurt", "options", "told"),
    [
        # What a commit under way gets to see is the journal's end, the next call the read-only file system.
        (
            make_read_only,
            "errors=remount-ro",
            "(Read-only file system|Input/output error): stopping at once, restart when",
        ),
        (forbid_more_files, "", "Too many open files: stopping at once, raise the limit of open files"),
    ],
    ids=["EROFS", "EMFILE"],
)
def test_32_a_disk_that_refuses_ends_the_server_with_a_clear_line(
    tmp_path: Path, hurt: Callable[[Volume, Life], None], options: str, told: str
) -> None:
    with volume("ext4", tmp_path / "disk", options) as disk, run_on(disk, tmp_path / "run") as run:
        server, workers = start(run)
        wait_for_promises(run)
        hurt(disk, server)
        code = server.ending()
        if code == 1 and hurt is forbid_more_files:  # the harness's witness wanted a file before the disk's calls did
            assert re.search("Too many open files: .*/(witness|promised)'", server.said), server.said
        else:
            assert code == 74, server.said
            assert re.search(f"^the disk failed: .*: {told}", server.said.splitlines()[-1]), server.said
        disk.power_on()
        run.finish(start_server(run), workers)


def test_32_a_disk_that_is_read_only_at_the_start_is_named(tmp_path: Path) -> None:
    with volume("ext4", tmp_path / "disk") as disk, run_on(disk, tmp_path / "run") as run:
        disk.remount("ro")
        server = start_server(run)
        assert server.ending() == 74
        [line] = server.said.splitlines()
        assert line.startswith(f"the disk failed: {run.config.log}") and "Read-only file system" in line
        disk.remount("rw")
        run.finish(*start(run))


def test_32_a_server_that_gets_no_more_memory_says_so_and_what_it_acknowledged_is_there(tmp_path: Path) -> None:
    """With a model whose vectors are large, so that the next thing to do needs some."""
    with Run(tmp_path / "run", workers=1, samples=wide.SAMPLES) as run:
        server = run.start_server()
        [name] = run.names
        run.start_worker(name, wide.train)
        run.wait(lambda: len(run.acknowledged(name)) > 1, "deltas are acknowledged")
        resource.prlimit(server.pid, resource.RLIMIT_AS, (0, 0))  # what it has it keeps
        assert server.ending() == 1, server.said
        told = "error: (the machine gives no more memory|.* crashed: .*(memory|Memory|new thread))"
        assert re.match(told, server.said.splitlines()[-1]), server.said
        known = run.acknowledged(name)
        run.start_server()
        run.wait(lambda: len(run.acknowledged(name)) > len(known), "it goes on")
        assert {delta.seq for delta in run.deltas(name)} >= {*known}


def test_28_a_worker_whose_disk_fails_stops_and_its_next_life_goes_on(tmp_path: Path) -> None:
    """Both are held in the middle of the run: one until its disk is bad, the other until the next life has pushed."""
    with Run(tmp_path / "run", **SHORT) as run:
        server = run.start_server()
        name, holds = run.names[0], {name: tmp_path / f"hold-{name}" for name in run.names}
        for hold in holds.values():
            hold.touch()
        hurt, other = (
            run.start_worker(
                name, awaited=run.names, step_seconds=STEP_SECONDS, hold=str(hold), hold_after=STEPS_BEFORE_HOLD
            )
            for name, hold in holds.items()
        )
        run.wait(lambda: run.deltas(name) and are_held(holds), "both have pushed, and are held")
        with injected(hurt, tmp_path, "fsync:error=EIO:when=1"):
            holds[name].unlink()
            assert hurt.ending() == 1
        told = f"the disk failed: {run.config.worker_directory(name)}: Input/output error: this worker stops"
        assert told in hurt.said.splitlines()[-1]
        again = run.start_worker(name, step_seconds=STEP_SECONDS)
        run.wait(lambda: any(delta.incarnation > 1 for delta in run.deltas(name)), "the next life has pushed")
        holds[run.names[1]].unlink()
        run.finish(server, other, again)


def are_held(holds: dict[str, Path]) -> bool:
    return all(Path(f"{hold}.reached-{name}").exists() for name, hold in holds.items())
