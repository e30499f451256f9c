"""Curves for TensorBoard, read back as it reads them."""

import sys
from pathlib import Path
from typing import Any

import pytest
from archives import Node, small_run
from small_run import SmallRun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hetero_async import following, roster
from hetero_async.config import RunConfig
from hetero_async.core.messages import MetricReport
from hetero_async.core.records import Stepped
from hetero_async.core.state import State
from hetero_async.errors import UserError
from hetero_async.following import follow, write_curves
from hetero_async.tables import template
from hetero_async.watch.curves import RUN, Curves


@pytest.fixture
def run() -> SmallRun:
    """Two workers, each of which measures something twice."""
    run = small_run(2)
    run.join("b-0")
    for worker, value in (("a-0", 3.0), ("b-0", 2.5), ("a-0", 2.0), ("b-0", 1.5)):
        publish, incarnation = run.server.state.publish, run.server.state.members[worker].incarnation
        run.say(worker, MetricReport(incarnation=incarnation, figures=(("validation_loss", value),), publish=publish))
        run.push(worker)
    return run


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return roster.initialize(tmp_path / "run", template(run={"name": "small", "samples": 64}, sites={"a": 1}))


def read(directory: Path, name: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(directory)).Reload()
    return [(point.step, point.value) for point in accumulator.Scalars(name)]


def written(config: RunConfig, directory: Path) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    write_curves(config, directory, watch=False, told=lambda points, lsn: told.append((points, lsn)))
    return told


def test_what_was_measured_is_a_curve_of_whoever_measured_it(run: SmallRun, config: RunConfig, tmp_path: Path) -> None:
    Node(config.directory).append(run.entries)
    [(points, lsn)] = written(config, tmp_path / "events")
    assert read(tmp_path / "events" / "a-0", "validation_loss") == [(2, 3.0), (4, 2.0)]
    assert read(tmp_path / "events" / "b-0", "validation_loss") == [(3, 2.5), (5, 1.5)]
    steps = sum(isinstance(entry.record, Stepped) for entry in run.entries)
    assert (points, lsn) == (4 + 4 * steps, len(run.entries))


def test_the_runs_own_curves_are_those_of_its_state(run: SmallRun, config: RunConfig, tmp_path: Path) -> None:
    Node(config.directory).append(run.entries)
    written(config, tmp_path / "events")
    trained = read(tmp_path / "events" / RUN, "samples_trained")
    assert trained == [(version, 8.0 * version) for version in range(1, 7)]
    assert read(tmp_path / "events" / RUN, "workers")[-1] == (6, 2.0)
    assert read(tmp_path / "events" / RUN, "deltas_merged")[0] == (1, 1.0)
    assert {value for _, value in read(tmp_path / "events" / RUN, "staleness")} == {0.0}


def test_a_log_that_has_lost_its_beginning_is_drawn_from_its_checkpoint(
    run: SmallRun, config: RunConfig, tmp_path: Path
) -> None:
    node = Node(config.directory)
    node.append(run.entries)
    node.save(run.entries[:20])
    whole = tmp_path / "whole"
    written(config, whole)
    for path in [path for path in sorted(config.log.glob("*.log")) if int(path.stem) <= 20][:-1]:
        path.unlink()
    written(config, tmp_path / "rest")
    rest = read(tmp_path / "rest" / RUN, "samples_trained")
    assert 0 < len(rest) < 6 and read(whole / RUN, "samples_trained")[-len(rest) :] == rest


class Enough(Exception):
    """The test has seen what it wanted."""


def test_a_run_that_goes_on_is_followed(run: SmallRun, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "FOLLOW_EVERY_SECONDS", 0.0)
    node, begun = Node(config.directory), 7
    node.append(run.entries[:begun])
    lsns: list[int] = []

    def grown(lsn: int) -> None:
        """The server goes on after each reading."""
        assert lsn == (lsns[-1] if lsns else begun)
        if lsn == len(run.entries):
            raise Enough
        node.append(run.entries[lsn : lsn + 5])

    def seen(entry: Any, state: State) -> None:
        assert entry.lsn == state.lsn == (lsns[-1] if lsns else 0) + 1, "each once, in order"
        lsns.append(entry.lsn)

    with pytest.raises(Enough):
        follow(config.log, seen, read=grown, watch=True)
    assert lsns == list(range(1, len(run.entries) + 1))


def test_curves_are_not_written_beside_others(run: SmallRun, config: RunConfig, tmp_path: Path) -> None:
    Node(config.directory).append(run.entries)
    written(config, tmp_path / "events")
    with pytest.raises(UserError, match="has curves already, which would be shown twice; remove it, or name another"):
        written(config, tmp_path / "events")


def test_without_tensorboard_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(UserError, match=r"pip install 'hetero-async\[tensorboard\]'"):
        Curves(tmp_path)


def test_neither_torch_nor_tensorflow_is_needed_for_it(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; from hetero_async.watch.curves import Curves; from pathlib import Path; Curves(Path(sys.argv[1]));"
    )
    code += "print('torch' in sys.modules, 'tensorflow' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, timeout=60
    )
    assert said.stdout == "False False\n"
