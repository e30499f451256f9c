"""A run rebuilt without somebody: what an arithmetic of our own on the pushed deltas says, to the bit, every time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from small_run import SmallRun

from hetero_async.core.records import Delta, Entry, RunSettings, Settings, Stepped
from hetero_async.core.server import Server
from hetero_async.core.state import State
from hetero_async.errors import UserError
from hetero_async.ports import Checkpoint
from hetero_async.tensors.model import ServerModel
from hetero_async.tensors.replica import hash_of
from hetero_async.watch.without import LeftOut, Rebuilt, left_out, rebuild

WORKERS = ("a-0", "b-0", "c-0")


def ran(merge: str, rule: str = "sgd", rounds: int = 2) -> SmallRun:
    """Three workers push in every round; `all` makes one step of the three."""
    run = SmallRun(RunSettings(run="small", samples=64, merge=merge, rule=rule))
    for worker in WORKERS:
        run.join(worker)
    for _ in range(rounds):
        push_round(run)
    return run


def push_round(run: SmallRun, workers: Sequence[str] = WORKERS) -> None:
    for worker in workers:
        run.lease(worker)
    for worker in workers:
        run.push(worker, "fp32")


def without(entries: Sequence[Entry], *names: str, start: Checkpoint | None = None) -> Rebuilt:
    state = State.load(start.state) if start else State()
    for entry in entries:
        state.fold(entry)
    return rebuild(start, entries, left_out(names, state), lambda _: None)


def oracle(
    run: SmallRun, is_out: Callable[[Delta, int], bool], weight: Callable[[list[Delta]], float]
) -> numpy.ndarray:
    """θ ← θ − ηg by hand, in fp32, over the deltas as they were before any codec."""
    parameters = numpy.concatenate([part.detach().numpy().ravel() for part in run.make_model().parameters()])
    deltas = [(entry.lsn, entry.record) for entry in run.entries if isinstance(entry.record, Delta)]
    vectors = {lsn: pushed.numpy() for (lsn, _), pushed in zip(deltas, run.pushed, strict=True)}
    kept = {lsn: delta for lsn, delta in deltas if not is_out(delta, lsn)}
    for entry in run.entries:
        if isinstance(entry.record, Stepped) and (merged := [lsn for lsn in entry.record.deltas if lsn in kept]):
            each = numpy.float32(weight([kept[lsn] for lsn in merged]))
            mean = numpy.zeros_like(parameters)
            for lsn in merged:
                mean += vectors[lsn] * each
            parameters = parameters - mean * numpy.float32(entry.record.gain)
    return parameters


def of_workers(merged: list[Delta]) -> float:
    return 1 / len({delta.worker for delta in merged})


def checkpoint_of(entries: Sequence[Entry]) -> Checkpoint:
    state, model = State(), ServerModel()
    for entry in entries:
        state.fold(entry)
        model.apply(entry)
    return Checkpoint(
        run="small",
        lsn=state.lsn,
        term=1,
        chain=bytes(16),
        state=state.dump(),
        state_hash=state.digest(),
        model=model.snapshot(),
    )


@pytest.mark.parametrize("merge", ["all", "per-push"])
@pytest.mark.parametrize("rule", ["sgd", "nesterov", "lookahead"])
def test_without_nobody_it_is_the_run(merge: str, rule: str) -> None:
    run = ran(merge, rule)
    rebuilt = without(run.entries)
    assert hash_of(rebuilt.model.theta) == hash_of(rebuilt.original.theta) == hash_of(run.model.theta)
    assert rebuilt.distance() == (0.0, 0.0)
    assert (rebuilt.deltas, rebuilt.samples, rebuilt.steps_changed, rebuilt.steps_skipped) == (0, 0, 0, 0)
    assert all(
        (left.numpy() == right.numpy()).all()
        for left, right in zip(rebuilt.model.momenta, run.model.momenta, strict=True)
    )


def test_a_worker_that_never_pushed_is_not_missed() -> None:
    run = ran("all", "nesterov")
    run.join("idle-0")
    push_round(run, WORKERS[:2])
    rebuilt = without(run.entries, "idle-0")
    assert rebuilt.state.members["idle-0"].deltas == rebuilt.deltas == 0
    assert hash_of(rebuilt.model.theta) == hash_of(run.model.theta)


@pytest.mark.parametrize("gone", [("b-0",), ("a-0", "c-0"), WORKERS])
def test_what_is_left_is_averaged_as_if_there_had_been_no_others(gone: tuple[str, ...]) -> None:
    run = ran("all")
    push_round(run, ("b-0",))
    rebuilt = without(run.entries, *gone)
    assert numpy.array_equal(
        rebuilt.model.theta.numpy(), oracle(run, lambda delta, _: delta.worker in gone, of_workers)
    )
    left = sum(isinstance(entry.record, Delta) and entry.record.worker in gone for entry in run.entries)
    assert (rebuilt.deltas, rebuilt.samples) == (left, 8 * left)
    assert rebuilt.steps == 3
    assert rebuilt.steps_skipped == {1: 1, 2: 0, 3: 3}[len(gone)]
    assert rebuilt.steps_changed == {1: 2, 2: 2, 3: 0}[len(gone)]


def test_where_each_push_steps_its_share_is_that_of_fewer_workers() -> None:
    run = ran("per-push")
    rebuilt = without(run.entries, "b-0")
    assert numpy.array_equal(
        rebuilt.model.theta.numpy(), oracle(run, lambda delta, _: delta.worker == "b-0", lambda _: 1 / 2)
    )
    assert (rebuilt.steps, rebuilt.steps_skipped) == (6, 2)


def test_the_oracle_itself_comes_to_where_the_run_came() -> None:
    run = ran("all")
    assert numpy.array_equal(run.model.theta.numpy(), oracle(run, lambda *_: False, of_workers))


def test_a_key_is_left_out_and_the_workers_next_key_is_not() -> None:
    run = ran("all", rounds=1)
    renewed_after = run.entries[-1].lsn
    run.keys["b-0"] = "another-key-of-b-0"
    run.join("b-0")
    push_round(run)
    rebuilt = without(run.entries, "another-key")
    expected = oracle(run, lambda delta, lsn: delta.worker == "b-0" and lsn > renewed_after, of_workers)
    assert numpy.array_equal(rebuilt.model.theta.numpy(), expected)
    assert rebuilt.deltas == 1
    assert without(run.entries, "b-0").deltas == 2
    assert without(run.entries, "key-of-b-0", "another-key-of-b-0").deltas == 2


def test_the_distance_is_that_of_the_two(tmp_path: Path) -> None:
    run = ran("all")
    rebuilt = without(run.entries, "a-0")
    moved = run.model.theta.double() - rebuilt.model.theta.double()
    distance, share = rebuilt.distance()
    assert distance == pytest.approx(float(moved.norm()), rel=1e-12)
    assert share == pytest.approx(float(moved.norm() / run.model.theta.double().norm()), rel=1e-12)
    assert distance > 0


def test_the_same_words_give_the_same_bytes(tmp_path: Path) -> None:
    run = ran("all", "nesterov")
    for name in ("one", "two"):
        without(run.entries, "c-0").model.export(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    run.model.export(tmp_path / "run")
    assert (tmp_path / "one").read_bytes() != (tmp_path / "run").read_bytes()


def test_settings_that_changed_on_the_way_change_here_too() -> None:
    run = ran("all", "nesterov", rounds=1)
    run.server = Server(replace(run.settings, momentum=0.5, outer_learning_rate=0.1), run.server.state)
    for worker in WORKERS:
        run.join(worker)
    push_round(run)
    rebuilt = without(run.entries)
    assert hash_of(rebuilt.model.theta) == hash_of(run.model.theta)
    assert any(isinstance(entry.record, Settings) for entry in run.entries)


def test_it_can_begin_at_a_checkpoint_that_holds_nothing_of_it() -> None:
    run = SmallRun(RunSettings(run="small", samples=64, merge="all"))
    run.join("a-0")
    push_round(run, ("a-0",))
    run.lease("a-0")
    run.join("b-0")
    run.lease("b-0")
    run.push("a-0", "fp32")  # waits for b-0 to be merged
    middle = len(run.entries)
    run.push("b-0", "fp32")
    push_round(run, ("a-0", "b-0"))
    start = checkpoint_of(run.entries[:middle])
    assert State.load(start.state).pending
    from_there = without(run.entries[middle:], "b-0", start=start)
    assert hash_of(from_there.model.theta) == hash_of(without(run.entries, "b-0").model.theta)
    assert hash_of(from_there.original.theta) == hash_of(run.model.theta)


@pytest.mark.parametrize("name", ["b-0", "key-of-b-0"])
def test_what_a_checkpoint_holds_cannot_be_taken_out_again(name: str) -> None:
    run = ran("all", rounds=1)
    start, middle = checkpoint_of(run.entries), len(run.entries)
    push_round(run)
    with pytest.raises(
        UserError, match=rf"checkpoint at record {middle}, and 1 deltas of (b-0|key-of-b…) are.*keep_log"
    ):
        without(run.entries[middle:], name, start=start)


def test_who_gave_the_initial_parameters_is_said() -> None:
    run = ran("all")
    assert without(run.entries, "key-of-a-0").is_initial
    assert any("still in it" in line for line in without(run.entries, "a-0").lines())
    assert not without(run.entries, "b-0").is_initial


def test_a_name_that_is_not_in_the_log_is_answered_with_those_that_are() -> None:
    run = ran("all", rounds=1)
    state = run.server.state
    assert left_out(["key-of-a-0", "b-0", "key-of-c…"], state) == LeftOut(("key-of-a-0", "key-of-c-0"), ("b-0",))
    with pytest.raises(UserError, match=r"--without mars-0: no such worker or key .* it has: a-0 \(key-of-a…\), b-0"):
        left_out(["mars-0"], state)
    with pytest.raises(UserError, match="no such worker or key"):
        left_out(["key-of"], state)
    run.keys["b-0"] = "key-of-a-1"
    run.join("b-0")
    with pytest.raises(UserError, match="more than one key in this log begins so"):
        left_out(["key-of-a"], run.server.state)


def test_a_log_without_parameters_is_nothing_to_rebuild() -> None:
    with pytest.raises(UserError, match="no parameters yet"):
        without([])
