"""What a run's directory says when nothing runs: the state its log comes to, what was refused, what is damaged."""

import io
from pathlib import Path

import pytest
from archives import SilentDisk, checkpoint_of, node_of, small_run
from rich.console import Console
from small_run import SmallRun

from hetero_async import roster
from hetero_async.config import RunConfig
from hetero_async.core import ranges
from hetero_async.core.messages import MetricReport
from hetero_async.core.records import Metric
from hetero_async.errors import ConfigError
from hetero_async.remains import oldest_start, status_on_disk
from hetero_async.shell.refusals import NAME, RefusalNotes
from hetero_async.shell.store import CheckpointStore
from hetero_async.tables import template
from hetero_async.watch.status import render


def measured_run() -> SmallRun:
    run = small_run(4)
    for value in (3.0, 2.5, 2.75):
        run.say(
            "a-0", MetricReport(incarnation=1, figures=(("validation_loss", value),), publish=run.server.state.publish)
        )
        run.push("a-0")
    return run


def config_in(directory: Path, name: str = "small") -> RunConfig:
    return roster.initialize(directory, template(run={"name": name, "samples": 64}, sites={"a": 1}))


def noted(path: Path, **refused: int) -> None:
    class Silent:
        def event(self, name: str, **fields: object) -> None:
            pass

    notes = RefusalNotes(path, Silent())
    for worker, count in refused.items():
        for number in range(count):
            notes.event("refused", worker=worker, key=f"K{worker}", reason=f"too stale: {number} versions behind")
    notes.write()


def drawn(status: dict[str, object]) -> str:
    file = io.StringIO()
    Console(file=file, width=100).print(render(status))
    return file.getvalue()


def test_the_status_is_what_the_log_comes_to(tmp_path: Path) -> None:
    run, config = measured_run(), config_in(tmp_path / "run")
    node_of(run, config.directory)
    noted(config.directory / NAME, office=2, lab=5)
    status = status_on_disk(config)
    assert status is not None
    state = run.server.state
    assert (status["state"], status["version"], status["trained"]) == (
        "not running", state.version, ranges.size(state.ledger.trained),
    )  # fmt: skip
    assert status["remains"]["lsn"] == len(run.entries) and status["remains"]["checkpoint"] == 20
    seen = [entry.record for entry in run.entries[20:] if isinstance(entry.record, Metric)]
    metric = status["metrics"]["validation_loss"]
    assert (metric["value"], metric["lowest"][1]) == (2.75, 2.5)
    assert [value for _, value in metric["curve"]] == [record.value for record in seen] == [3.0, 2.5, 2.75]
    assert [worker["state"] for worker in status["workers"]] == ["was here"]
    assert [(note["worker"], note["count"]) for note in status["refusal_notes"]] == [("lab", 5), ("office", 2)]
    assert status["deltas"]["refused"] == 7
    text = drawn(status)
    assert "no server is running" in text and "lab: 5 times, at last: too stale: 4 versions behind" in text


def test_a_finished_run_says_that_it_is(tmp_path: Path) -> None:
    run, config = small_run(8), config_in(tmp_path / "run")
    node_of(run, config.directory)
    status = status_on_disk(config)
    assert status is not None and run.server.state.is_finished
    assert status["state"] == "finished" and "64 / 64 samples" in drawn(status)


def test_of_a_run_that_never_began_there_is_nothing(tmp_path: Path) -> None:
    assert status_on_disk(config_in(tmp_path / "run")) is None


def test_the_parameters_are_not_read_and_neither_is_what_a_checkpoint_covers(tmp_path: Path) -> None:
    run, config = measured_run(), config_in(tmp_path / "run")
    node = node_of(run, config.directory)
    whole = status_on_disk(config)
    for arrays in config.directory.glob("checkpoints/*/model.safetensors"):
        arrays.write_bytes(b"")
    covered = [path for path in sorted(config.log.glob("*.log")) if int(path.stem) <= 20][:-1]
    assert covered and len(node.segments()) > len(covered)
    for path in covered:
        path.unlink()
    assert status_on_disk(config) == whole
    checkpoint, entries = oldest_start(config.log, with_arrays=False)
    assert checkpoint is not None and checkpoint.model.arrays == {}
    assert [entry.lsn for entry in entries] == list(range(checkpoint.lsn + 1, len(run.entries) + 1))


def test_a_damaged_log_is_told_as_far_as_it_goes(tmp_path: Path) -> None:
    run, config = measured_run(), config_in(tmp_path / "run")
    node_of(run, config.directory)
    paths = [path for path in sorted(config.log.glob("*.log")) if int(path.stem) > 20]
    hurt = bytearray(paths[0].read_bytes())
    hurt[len(hurt) // 2] ^= 1
    paths[0].write_bytes(hurt)
    assert len(paths) > 1
    status = status_on_disk(config)
    assert status is not None and str(paths[0]) in status["remains"]["damage"]
    assert 20 <= status["remains"]["lsn"] < len(run.entries)
    assert paths[0].name in drawn(status).replace("\n", "")


def test_another_runs_directory_is_an_error(tmp_path: Path) -> None:
    config = config_in(tmp_path / "run", name="other")
    node_of(small_run(4), config.directory)
    with pytest.raises(ConfigError, match='belongs to run "small", not "other"'):
        status_on_disk(config)


def test_a_manifest_alone_says_the_state_and_is_checked(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, "small", lambda function, *told: function(*told), SilentDisk())  # type: ignore[arg-type]
    run = small_run(4)
    store._save(checkpoint_of(run.entries[:10]))
    newest = store.load_newest(with_arrays=False)
    assert newest is not None and newest.state == store.load(10).state
    [manifest] = tmp_path.glob("*/manifest.json")
    manifest.write_text(manifest.read_text().replace('"lsn":10', '"lsn":11'))
    assert store.load_newest(with_arrays=False) is None and "fails its checksum" in store.warnings[0]
