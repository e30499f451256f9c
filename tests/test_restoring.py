"""A server comes back from the archive alone, equal to the bit, however often the attempt is interrupted."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from archives import RUN, Node, node_of, replayed, small_run
from e2e.harness import Run, forked
from shell.bucket import REQUEST_SECONDS, proxied, s3_server
from shell.small_log import inline
from small_run import SmallRun

from hetero_async import looking
from hetero_async.core.state import State
from hetero_async.errors import ConfigError, LogCorrupt, UserError
from hetero_async.replay import recover, replay
from hetero_async.restoring import restore_directory
from hetero_async.shell import archive as archive_module
from hetero_async.shell.archive import open_archive
from hetero_async.shell.log import FileLog
from hetero_async.shell.segments import segment_paths
from hetero_async.shell.store import CheckpointStore
from hetero_async.tensors.model import ServerModel
from hetero_async.unarchiving import RESTORING, Restored


@pytest.fixture(scope="module")
def run() -> SmallRun:
    return small_run()


@pytest.fixture
def node(tmp_path: Path, run: SmallRun) -> Node:
    return node_of(run, tmp_path / "node")


def restore(directory: Path, url: str, run_name: str = "") -> Restored:
    return restore_directory(directory, url, run_name, lambda _: None, lambda _: None)


def hashes(directory: Path) -> tuple[int, str, str]:
    """What a server comes to that starts there: record, state, model."""
    log = FileLog.open(directory / "log", RUN, inline)
    model = ServerModel()
    state = recover(log, CheckpointStore(directory / "checkpoints", RUN, inline), model, Node(directory).told)
    log.close()
    return state.lsn, state.digest().hex(), model.model_hash().hex()


def test_a_restored_server_stands_where_the_lost_one_stood(node: Node, tmp_path: Path, run: SmallRun) -> None:
    archive = str(tmp_path / "archive")
    node.archive_all(open_archive(archive, Path()))
    before = datetime.now(UTC)
    restored = restore(tmp_path / "again", archive)
    assert hashes(tmp_path / "again") == hashes(tmp_path / "node")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["checkpoints", "log"]
    lines = "\n".join(restored.lines(before))
    assert f"restored    small: record {len(run.entries)} of term 1, version {run.server.state.version}\n" in lines
    assert "verify      ok" in lines
    assert re.search(r"archived    2\d{3}-\d\d-\d\d \d\d:\d\d:\d\d UTC, \S+ s ago\n", lines)
    assert "may lack    deltas acknowledged since" in lines
    assert looking.verify_directory(tmp_path / "again" / "log", lambda _: None).is_ok


def test_a_server_restored_from_a_checkpoint_alone_is_equal_to_the_bit(
    node: Node, tmp_path: Path, run: SmallRun
) -> None:
    archive = tmp_path / "archive"
    node.archive_all(open_archive(str(archive), Path()))
    for path in (archive / RUN / "log").iterdir():
        path.unlink()
    restored = restore(tmp_path / "again", str(archive))
    assert restored.verdict.records == 0
    state, model = replayed(run.entries[:20])
    assert hashes(tmp_path / "again") == (20, state.digest().hex(), model.model_hash().hex())
    assert looking.verify_directory(tmp_path / "again" / "log", lambda _: None).state.lsn == 20


def test_what_is_there_already_is_not_touched(node: Node, tmp_path: Path) -> None:
    archive = str(tmp_path / "archive")
    node.archive_all(open_archive(archive, Path()))
    for name in ("log", "checkpoints"):
        used = tmp_path / f"used-{name}"
        (used / name).mkdir(parents=True)
        restore(tmp_path / f"empty-{name}", archive)
        (used / name / "something").write_text("precious")
        with pytest.raises(ConfigError, match=f"{used / name}: there is something already; move it away"):
            restore(used, archive)
        assert (used / name / "something").read_text() == "precious"


def test_an_archive_of_several_runs_wants_a_name(node: Node, tmp_path: Path) -> None:
    archive = open_archive("archive", tmp_path)
    with pytest.raises(UserError, match="holds no run"):
        restore(tmp_path / "again", str(tmp_path / "archive"))
    node.archive_all(archive)
    archive.put_new("other/genesis", b"")
    with pytest.raises(UserError, match=r"holds 2 runs \(other, small\): say which with --run-name"):
        restore(tmp_path / "again", str(tmp_path / "archive"))
    with pytest.raises(UserError, match="holds nothing of run other"):
        restore(tmp_path / "again", str(tmp_path / "archive"), "other")
    restore(tmp_path / "again", str(tmp_path / "archive"), "small")


def test_a_restore_killed_at_any_step_goes_on_where_it_was(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = str(tmp_path / "archive")
    node.archive_all(open_archive(archive, Path()))
    fetched: list[str] = []
    restore(tmp_path / "whole", archive)
    step, again = 0, tmp_path / "again"
    while killed_at(step, lambda: restore_directory(again, archive, RUN, fetched.append, lambda _: None), monkeypatch):
        step += 1
        if (again / "log").exists():
            with pytest.raises(UserError, match="an earlier restore was done with it"):
                restore(again, archive)
            break
    assert step > 10
    assert hashes(again) == hashes(tmp_path / "whole")
    assert not (again / RESTORING).exists()
    assert len(fetched) == len(set(fetched)) > 0, "nothing was fetched again"


class Killed(Exception):
    pass


def killed_at(step: int, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Die at the step-th change of a name on the disk: before it for even numbers, after it for odd ones."""
    number, is_after = divmod(step, 2)
    made = 0

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call_or_die(*arguments: object) -> object:
            nonlocal made
            made += 1
            if made == number + 1 and not is_after:
                raise Killed
            answer = real(*arguments)
            if made == number + 1:
                raise Killed
            return answer

        return call_or_die

    with monkeypatch.context() as patched:
        for name in ("replace", "link"):
            patched.setattr(os, name, dying(getattr(os, name)))
        try:
            call()
        except Killed:
            return True
    return False


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        yield port


def test_a_server_comes_back_from_a_bucket_whatever_the_network_does(
    node: Node, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_module, "REQUEST_SECONDS", REQUEST_SECONDS)
    with proxied(port, monkeypatch) as (proxy, url):
        node.archive_all(open_archive(url, Path()))
        proxy.method = "GET"
        proxy.faults.extend(["503", "torn before", "torn within", "", "", "500", "silent", "torn within"])
        restore(tmp_path / "again", url)
        assert not proxy.faults
    assert hashes(tmp_path / "again") == hashes(tmp_path / "node")


def test_what_was_archived_wrongly_is_not_put_in_place(node: Node, tmp_path: Path, run: SmallRun) -> None:
    """A chain that is whole says that these records were written, not that they are a run."""
    wrong = Node(tmp_path / "wrong")
    wrong.append([*run.entries[:20], replace(run.entries[0], lsn=21)])
    wrong.archive_all(open_archive("archive", tmp_path))
    with pytest.raises(LogCorrupt, match="cannot be"):
        restore(tmp_path / "again", str(tmp_path / "archive"))
    assert not (tmp_path / "again" / "log").exists()


def test_a_run_whose_server_is_killed_goes_on_from_the_archive_alone(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    with Run(tmp_path / "run", samples=100_000, server={"archive": str(archive), "keep_log": False}) as lost:
        archive.write_text("not a directory")
        server = lost.start_server(segment_bytes=3000)
        lost.start_workers(step_seconds=0.01)
        lost.wait(lambda: server.said.count(" checkpoint lsn=") >= 3, "checkpoints that cover a part of the log")
        assert "Not a directory" in lost.status()["archive"]["failing"]
        assert next(lost.entries()).lsn == 1, "the log keeps what is not archived"
        archive.unlink()
        lost.wait(
            lambda: "archived file=tiny/checkpoints" in server.said and "/log/" in server.said, "both are archived"
        )
        lost.wait(lambda: segment_paths(lost.config.log)[0].stem > f"{1:020d}", "the log drops what is archived")
        status = lost.status()["archive"]
        assert (status["failing"], status["alarm"]) == ("", "")
        for life in lost.lives:
            life.signal(signal.SIGKILL)
        for life in lost.lives:
            life.kill()
        answer = forked(tmp_path, "restore", tmp_path / "back", "--from", archive)
        assert answer.exit_code == 0, answer.errors
        assert "verify      ok" in answer.output
        came_back = looking.verify_directory(tmp_path / "back" / "log", lambda _: None)
        assert came_back.state.lsn >= status["lsn"]
        assert came_back.state.lsn >= status["checkpoint"]
        assert (came_back.state.digest(), came_back.model_hash) == at_record(lost, came_back.state.lsn)


def at_record(run: Run, lsn: int) -> tuple[bytes, bytes]:
    """State and model of the lost server after that record, from its own log."""
    model, seen = ServerModel(), dict[int, tuple[bytes, bytes]]()
    start, entries = looking.oldest_start(run.config.log)

    def note(entry: object, state: State) -> None:
        seen[state.lsn] = state.digest(), model.model_hash()

    if start is not None:
        seen[start.lsn] = start.state_hash, start.model.model_hash
    replay(start, entries, model, note)
    return seen[lsn]
