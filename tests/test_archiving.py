"""The archiver: everything that is due gets there in the end, nothing is overwritten, nothing is dropped too early."""

import functools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from archives import PATIENCE_SECONDS, Node, node_of, small_run
from shell.bucket import REQUEST_SECONDS, proxied, s3_server
from small_run import SmallRun

from hetero_async.archiving import Archiving
from hetero_async.errors import ArchiveAway
from hetero_async.formats import archived
from hetero_async.formats.archived import checkpoint_name, segment_name, whole_files
from hetero_async.ports import Archive, Archived
from hetero_async.shell.archive import open_archive
from hetero_async.shell.threads import abandonable, in_thread


@pytest.fixture(scope="module")
def run() -> SmallRun:
    return small_run()


@pytest.fixture
def node(tmp_path: Path, run: SmallRun) -> Node:
    return node_of(run, tmp_path / "node")


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return open_archive("archive", tmp_path)


def archived_files(archive: Archive) -> list[str]:
    return sorted(whole_files(archive.list()))


def while_it_runs(archiving: Archiving, until: Callable[[], bool]) -> Awaitable[None]:
    async def watch() -> None:
        with trio.fail_after(PATIENCE_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(archiving.run)
                while not until():  # noqa: ASYNC110, the deadline ends it
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()

    return watch()


def test_closed_segments_and_the_newest_checkpoint_go_and_the_open_segment_waits_for_the_end(
    node: Node, archive: Archive, run: SmallRun
) -> None:
    *closed, opened = node.segments()

    async def scenario() -> None:
        archiving = node.archiving(archive)
        await while_it_runs(archiving, lambda: archiving.checkpoint_lsn > 0 and archiving.lsn == opened - 1)
        status = archiving.status()
        assert (status["lsn"], status["checkpoint"], status["failing"], status["alarm"]) == (opened - 1, 20, "", "")
        assert [name.first_lsn for file in archived_files(archive) if (name := segment_name(file))] == closed
        assert {name.lsn for file in archived_files(archive) if (name := checkpoint_name(file))} == {20}
        await archiving.finish()
        assert archiving.lsn == len(run.entries)
        assert [name.first_lsn for file in archived_files(archive) if (name := segment_name(file))] == [*closed, opened]

    trio.run(scenario)


def test_a_segment_is_archived_as_it_is_without_its_reserve(node: Node, archive: Archive) -> None:
    node.archive_all(archive)
    for name in archived_files(archive):
        if segment := segment_name(name):
            content = b"".join(archive.get(piece) for piece in whole_files(archive.list())[name])
            original = (node.directory / "log" / f"{segment.first_lsn:020d}.log").read_bytes()
            assert original.startswith(content)
            assert not original[len(content) :].strip(b"\0")


def test_what_is_not_archived_is_not_dropped(node: Node, archive: Archive) -> None:
    async def scenario() -> None:
        archiving = node.archiving(archive)
        assert archiving.not_needed(20) == 0
        await archiving.finish()
        assert archiving.not_needed(20) == 20
        assert archiving.not_needed(10**9) == archiving.lsn

    trio.run(scenario)


def test_a_second_life_puts_nothing_twice(node: Node, archive: Archive, run: SmallRun, tmp_path: Path) -> None:
    node.archive_all(archive)
    counted = Counting(archive)
    node.archive_all(counted)
    assert counted.puts == ["small/genesis"]


class Counting:
    """An archive that counts, and whose uploader may be killed before or after some put."""

    def __init__(self, archive: Archive, puts_left: int = 10**9, is_after: bool = False) -> None:
        self.archive = archive
        self.puts: list[str] = []
        self.puts_left = puts_left
        self.is_after = is_after
        self.list = archive.list
        self.get = archive.get

    def put_new(self, name: str, content: bytes) -> None:
        self.puts.append(name)
        if len(self.puts) > self.puts_left and not self.is_after:
            raise Killed
        self.archive.put_new(name, content)
        if len(self.puts) > self.puts_left:
            raise Killed


class Killed(Exception):
    pass


@pytest.mark.parametrize("is_after", [False, True])
def test_an_uploader_killed_at_any_step_leaves_nothing_half_and_the_next_one_completes_it(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_after: bool
) -> None:
    monkeypatch.setattr(archived, "PIECE_BYTES", 1200)
    whole = open_archive("whole", tmp_path)
    node.archive_all(whole)
    steps = len(whole.list())
    assert steps > 10
    for step in range(steps):
        archive = open_archive(f"killed-{step}", tmp_path)
        with pytest.raises(Killed):
            node.archive_all(Counting(archive, step, is_after))
        there = archived_files(archive)
        assert set(there) <= set(archived_files(whole))
        for name in there:
            if name.endswith("manifest.json"):
                assert name.replace("manifest.json", "model.safetensors") in there, "the manifest comes last"
        node.archive_all(archive)
        assert contents(archive) == contents(whole)


def contents(archive: Archive) -> dict[str, bytes]:
    return {name: archive.get(name) for name in archive.list()}


def test_an_archive_that_is_away_is_said_once_and_tried_until_it_is_back(node: Node, archive: Archive) -> None:
    away = Away(archive)

    async def scenario() -> None:
        archiving = node.archiving(away)
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + PATIENCE_SECONDS
            nursery.start_soon(archiving.run)
            while away.asked < 5:  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert archiving.status()["failing"] == "nobody there"
            assert archiving.status()["lsn"] == 0
            away.is_away = False
            while archiving.checkpoint_lsn == 0 or archiving.failing:  # noqa: ASYNC110
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert archiving.lsn > 0

    trio.run(scenario)
    names = node.told.names()
    assert (names.count("archive failing"), names.count("archive well again")) == (1, 1)


class Away:
    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.is_away = True
        self.asked = 0

    def _ask(self) -> None:
        self.asked += 1
        if self.is_away:
            raise ArchiveAway("nobody there")

    def list(self, run: str = "") -> dict[str, Archived]:
        self._ask()
        return dict(self.archive.list(run))

    def put_new(self, name: str, content: bytes) -> None:
        self._ask()
        self.archive.put_new(name, content)

    def get(self, name: str) -> bytes:
        return self.archive.get(name)


def test_other_content_under_one_of_our_names_is_an_alarm_and_stays(
    node: Node, archive: Archive, tmp_path: Path
) -> None:
    other = open_archive("other", tmp_path)
    node.archive_all(other)
    taken = next(name for name in sorted(other.list()) if "/log/" in name)
    archive.put_new(taken, b"somebody else's")

    async def scenario() -> None:
        archiving = node.archiving(archive)
        await while_it_runs(archiving, lambda: bool(archiving.alarm))
        assert taken in archiving.status()["alarm"]
        assert archiving.checkpoint_lsn == 20, "the checkpoint does not wait for it"
        assert archiving.not_needed(20) == 0

    trio.run(scenario)
    assert archive.get(taken) == b"somebody else's"
    assert node.told.names().count("archive alarm") == 1


def test_another_run_of_the_same_name_is_not_mixed_in(node: Node, archive: Archive, tmp_path: Path) -> None:
    node.archive_all(archive)
    before = contents(archive)
    other = Node(tmp_path / "other")
    other.append(SmallRun(settings=replace(SmallRun().settings, seed=7)).entries)

    async def scenario() -> None:
        archiving = other.archiving(archive)
        await archiving.finish()
        assert archiving.alarm == "another run was archived as small: give this one its own place"

    trio.run(scenario)
    assert contents(archive) == before


def test_a_damaged_segment_is_an_alarm_and_not_archived(node: Node, archive: Archive) -> None:
    path = node.directory / "log" / f"{node.segments()[1]:020d}.log"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)

    async def scenario() -> None:
        archiving = node.archiving(archive)
        await archiving.finish()
        assert str(path) in archiving.alarm
        assert archiving.lsn == node.segments()[1] - 1

    trio.run(scenario)
    assert not [name for name in archive.list() if f"/{node.segments()[1]:020d}-" in name]


def test_a_checkpoint_that_is_replaced_while_it_is_read_arrives_whole(
    node: Node, archive: Archive, run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archived, "PIECE_BYTES", 1000)
    is_replaced = False

    async def meddling(call: Callable[..., object], *arguments: object) -> object:
        nonlocal is_replaced
        if not is_replaced and "model.safetensors.00001" in str(arguments[0]):
            is_replaced = True
            await trio.to_thread.run_sync(functools.partial(node.save, run.entries[:25]))
            await trio.to_thread.run_sync(functools.partial(node.save, run.entries[:30]))
        return call(*arguments)

    async def scenario() -> None:
        archiving = node.archiving(archive, network=meddling)
        await archiving.finish()
        assert not archiving.alarm
        assert archiving.checkpoint_lsn == 30

    trio.run(scenario)
    assert is_replaced
    assert {name.lsn for file in archived_files(archive) if (name := checkpoint_name(file))} == {20, 30}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        yield port


def test_everything_reaches_a_bucket_whatever_the_network_does(
    node: Node, port: int, run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxied(port, monkeypatch) as (proxy, url):
        archive = open_archive(url, Path(), REQUEST_SECONDS)
        proxy.faults.extend(
            ["500", "409", "503", "412", "torn before", "torn after", "", "silent", "torn after", "409"]
        )

        async def scenario() -> None:
            with trio.fail_after(PATIENCE_SECONDS):
                archiving = node.archiving(archive, network=abandonable, blocking=in_thread)
                await archiving.finish()
                assert (archiving.alarm, archiving.failing, archiving.lsn) == ("", "", len(run.entries))

        trio.run(scenario)
        assert not proxy.faults
        direct = open_archive("direct", node.directory)
        node.archive_all(direct)
        assert contents(archive) == contents(direct)


def test_stopping_does_not_wait_for_a_request_that_hangs(
    node: Node, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxied(port, monkeypatch) as (proxy, url):
        archive = open_archive(url, Path(), 600.0)
        proxy.method = "GET"
        proxy.faults.append("silent")

        async def scenario() -> None:
            with trio.fail_after(PATIENCE_SECONDS):
                await while_it_runs(node.archiving(archive, network=abandonable), lambda: bool(proxy.seen))

        trio.run(scenario)
