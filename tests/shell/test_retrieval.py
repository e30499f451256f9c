"""Of all that several servers archived, the one history that goes furthest comes back, and nothing else."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from archives import RUN, Node, checkpoint_of, small_run
from shell.small_log import inline
from small_run import SmallRun

from hetero_async.core.records import Entry, Metric
from hetero_async.errors import ArchiveAway, UserError
from hetero_async.ports import Archive
from hetero_async.shell import retrieval as retrieval_module
from hetero_async.shell.archive import open_archive
from hetero_async.shell.log import FileLog
from hetero_async.shell.retrieval import History, Retrieval, lay_out
from hetero_async.shell.segments import read_log
from hetero_async.shell.store import CheckpointStore

FORK = 30


@pytest.fixture(scope="module")
def run() -> SmallRun:
    return small_run()


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return open_archive("archive", tmp_path)


def found(archive: Archive, tmp_path: Path) -> tuple[History, list[str]]:
    """The history, laid out in tmp_path/restored."""
    retrieval = Retrieval(archive=archive, run=RUN, scratch=tmp_path / "scratch", fetched=lambda _: None)
    history = retrieval.find()
    lay_out(history, retrieval.scratch, tmp_path / "restored")
    return history, retrieval.warnings


def restored(tmp_path: Path) -> list[Entry]:
    return list(read_log(tmp_path / "restored" / "log", RUN))


def second_term(entries: Sequence[Entry], count: int = 6) -> list[Entry]:
    """The same up to the fork, and then what another server wrote."""
    told = Metric(worker="a-0", name="loss", value=1.0, version=1)
    later = [Entry(lsn=FORK + number, term=2, record=told) for number in range(1, count + 1)]
    return [*entries[:FORK], *later]


def remove(tmp_path: Path, *patterns: str) -> None:
    for pattern in patterns:
        paths = list((tmp_path / "archive").glob(f"{RUN}/{pattern}"))
        assert paths, f"there is no {pattern}"
        for path in paths:
            path.unlink()


def damage(tmp_path: Path, pattern: str) -> None:
    [path] = (tmp_path / "archive").glob(f"{RUN}/{pattern}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_whole_log_comes_back_from_its_first_record(run: SmallRun, archive: Archive, tmp_path: Path) -> None:
    node = Node(tmp_path / "node")
    node.append(run.entries)
    node.archive_all(archive)
    history, warnings = found(archive, tmp_path)
    assert (history.lsn, history.term, history.checkpoint, warnings) == (len(run.entries), 1, None, [])
    assert restored(tmp_path) == run.entries
    assert len(history.parts) == len(node.segments())


def test_from_the_newest_checkpoint_on_no_older_segment_is_fetched(
    run: SmallRun, archive: Archive, tmp_path: Path
) -> None:
    node = Node(tmp_path / "node")
    node.append(run.entries)
    for lsn in (5, 10, FORK):
        node.save(run.entries[:lsn])
        node.archive_all(archive)
    history, _ = found(archive, tmp_path)
    assert history.checkpoint is not None
    assert history.checkpoint.lsn == FORK
    first_lsn = max(first for first in node.segments() if first <= FORK + 1)
    assert restored(tmp_path) == run.entries[first_lsn - 1 :]
    store = CheckpointStore(tmp_path / "restored" / "checkpoints", RUN, inline)
    assert store.load_newest() is not None
    assert store.lsns() == [FORK]


def test_a_server_goes_on_in_what_came_back(run: SmallRun, archive: Archive, tmp_path: Path) -> None:
    node = Node(tmp_path / "node")
    node.append(run.entries[:FORK])
    node.archive_all(archive)
    found(archive, tmp_path)
    again = Node(tmp_path / "restored")
    again.append(run.entries[FORK:])
    assert restored(tmp_path) == run.entries


def test_a_checkpoint_beyond_all_segments_is_the_end_and_the_log_begins_after_it(
    run: SmallRun, archive: Archive, tmp_path: Path
) -> None:
    node = Node(tmp_path / "node", segment_bytes=1 << 20)
    node.append(run.entries[:10])
    node.archive_all(archive)
    node.append(run.entries[10:FORK])
    node.save(run.entries[:FORK])
    node.archive_all(archive)
    remove(tmp_path, f"log/*-{FORK:020d}-*")
    history, _ = found(archive, tmp_path)
    assert (history.lsn, history.parts) == (FORK, [])
    assert restored(tmp_path) == []
    log = FileLog.open(tmp_path / "restored" / "log", RUN, inline)
    assert (log.last_lsn, log.first_lsn, list(log.entries(FORK))) == (FORK, FORK + 1, [])
    log.close()
    again = Node(tmp_path / "restored", segment_bytes=1 << 20)
    for server in (node, again):
        server.append(run.entries[FORK:])
    assert restored(tmp_path) == run.entries[FORK:]
    chains = []
    for server in (node, again):
        held = server.holdings.segment_after(0, with_open=True)
        assert held is not None
        held.file.close()
        chains.append(held.name.split("-")[-2])
    assert chains[0] == chains[1], "the chain goes on as if nothing had been"


def test_pieces_of_two_servers_with_other_boundaries_make_one_log(
    run: SmallRun, archive: Archive, tmp_path: Path
) -> None:
    for number, segment_bytes in enumerate((1500, 2100)):
        node = Node(tmp_path / f"node-{number}", segment_bytes)
        node.append(run.entries)
        node.archive_all(archive)
    first, second = (Node(tmp_path / f"node-{number}").segments() for number in (0, 1))
    assert not set(first[1:]) & set(second[1:])
    remove(tmp_path, f"log/{first[1]:020d}-*", f"log/{second[-1]:020d}-*")
    assert found(archive, tmp_path)[0].lsn == len(run.entries)
    assert restored(tmp_path) == run.entries


@pytest.mark.parametrize("sizes", [(1500, 1500), (1500, 2100), (6000, 900), (900, 6000)])
@pytest.mark.parametrize("is_saved_early", [False, True])
def test_what_a_deposed_server_wrote_alone_does_not_come_back(
    run: SmallRun, archive: Archive, tmp_path: Path, sizes: tuple[int, int], is_saved_early: bool
) -> None:
    deposed, successor = (Node(tmp_path / f"node-{size}-{index}", size) for index, size in enumerate(sizes))
    deposed.append(run.entries)
    if is_saved_early:
        deposed.save(run.entries[:10])
        deposed.archive_all(archive)
    deposed.save(run.entries[: FORK + 4])  # a checkpoint of a history that was cut
    history = second_term(run.entries)
    successor.append(history)
    deposed.archive_all(archive)
    successor.archive_all(archive)
    chosen, warnings = found(archive, tmp_path)
    assert (chosen.lsn, chosen.term) == (history[-1].lsn, 2)
    entries = restored(tmp_path)
    assert entries == history[entries[0].lsn - 1 :]
    assert (chosen.checkpoint.lsn if chosen.checkpoint else 0) == (10 if is_saved_early else 0)
    assert any(warning.startswith("records of term 1 that term 2 replaced: ") for warning in warnings)


def test_a_damaged_segment_is_replaced_by_another_server_s(run: SmallRun, archive: Archive, tmp_path: Path) -> None:
    for number, segment_bytes in enumerate((1500, 2100)):
        node = Node(tmp_path / f"node-{number}", segment_bytes)
        node.append(run.entries)
        node.archive_all(archive)
    damaged = Node(tmp_path / "node-0").segments()[1]
    damage(tmp_path, f"log/{damaged:020d}-*")
    history, warnings = found(archive, tmp_path)
    assert history.lsn == len(run.entries)
    assert restored(tmp_path) == run.entries
    assert not warnings or "damaged in the archive: " in warnings[0]


def test_a_damaged_checkpoint_is_passed_over(run: SmallRun, archive: Archive, tmp_path: Path) -> None:
    node = Node(tmp_path / "node")
    node.append(run.entries)
    for lsn in (10, 20):
        node.save(run.entries[:lsn])
        node.archive_all(archive)
    damage(tmp_path, "checkpoints/*020-*/model.safetensors.*")
    history, warnings = found(archive, tmp_path)
    assert history.checkpoint is not None
    assert history.checkpoint.lsn == 10
    assert (history.lsn, restored(tmp_path)[-1]) == (len(run.entries), run.entries[-1])
    assert len(warnings) == 1
    assert "fails its checksum" in warnings[0]


@pytest.mark.parametrize("is_gone", [True, False])
def test_where_nothing_bridges_a_gap_what_lies_before_it_comes_back_and_that_is_said(
    run: SmallRun, archive: Archive, tmp_path: Path, is_gone: bool
) -> None:
    node = Node(tmp_path / "node")
    node.append(run.entries)
    node.archive_all(archive)
    third = node.segments()[2]
    if is_gone:
        remove(tmp_path, f"log/{third:020d}-*")
    else:
        damage(tmp_path, f"log/{third:020d}-*")
    history, warnings = found(archive, tmp_path)
    assert history.lsn == third - 1
    assert restored(tmp_path) == run.entries[: third - 1]
    assert f"nothing leads to record {len(run.entries)} of term 1" in "\n".join(warnings)


def test_a_checkpoint_without_its_manifest_is_none(run: SmallRun, archive: Archive, tmp_path: Path) -> None:
    node = Node(tmp_path / "node")
    node.append(run.entries)
    node.save(run.entries[:20])
    node.archive_all(archive)
    remove(tmp_path, "checkpoints/*/manifest.json.*")
    assert found(archive, tmp_path)[0].checkpoint is None


def test_an_archive_with_nothing_to_go_on_from_says_so(run: SmallRun, archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the archive holds nothing of run small"):
        found(archive, tmp_path)
    node = Node(tmp_path / "node")
    node.append(run.entries)
    node.archive_all(archive)
    remove(tmp_path, f"log/{1:020d}-*")
    with pytest.raises(UserError, match="the archive holds nothing of run small"):
        found(archive, tmp_path)


def test_an_archive_that_never_answers_is_given_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_module, "PATIENCE_SECONDS", 0.5)
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:1", "ALLOW_HTTP": "true", "ACCESS_KEY_ID": "x"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    with pytest.raises(ArchiveAway, match="error sending request"):
        found(open_archive("s3://bucket/prefix", tmp_path), tmp_path)


def test_checkpoints_of_a_test_are_real(run: SmallRun) -> None:
    assert checkpoint_of(run.entries).state_hash == run.server.state.digest()
