"""A plan beside a run: what is read off the run, and how far off the plan was."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from rich.console import Console
from shell.small_log import SilentDisk, inline
from small_run import BATCH, SmallRun

from hetero_async import cli_plan
from hetero_async.core.heartbeat import Usage
from hetero_async.core.messages import (
    DELTA,
    PUBLISH,
    Ack,
    Beat,
    Chunk,
    Lease,
    LeaseRequest,
    Message,
    PublishReady,
    Push,
    Want,
    Window,
)
from hetero_async.core.records import RunSettings
from hetero_async.core.worker_events import Vitals
from hetero_async.errors import UserError
from hetero_async.measuring import outcome_of
from hetero_async.shell import wire
from hetero_async.shell.log import FileLog
from hetero_async.watch import plan
from hetero_async.watch.history import FIGURES, History
from hetero_async.watch.outcome import Line, Outcome, SiteOutcome, lines, render_outcome
from hetero_async.watch.plan import forecast
from hetero_async.watch.timing import Question, Site

BEGAN, EVERY_SECONDS, PUSHES = 1_790_000_000, 4, 40
SENT, RECEIVED = 1000, 3000  # each push and each publish, with all that goes with them


def a_run(directory: Path, pushes: int = PUSHES) -> SmallRun:
    """One worker that pushes every four seconds, and waits for one of them each time; with its log and history."""
    run = SmallRun(RunSettings(run="small", samples=BATCH * PUSHES, merge="per-push"))
    run.join("a-0")
    for _ in range(pushes):
        run.push("a-0")
    log = FileLog.open(directory / "log", "small", inline, SilentDisk())
    trio.run(log.append, run.entries)
    log.close()
    (directory / "history.json").write_text(noted(pushes).model_dump_json())
    return run


def noted(pushes: int) -> History:
    history = History()
    for second in range(EVERY_SECONDS * pushes + EVERY_SECONDS):
        done = second // EVERY_SECONDS
        known = {"trained": BATCH * done, "version": done, "memory_bytes": 2e9 - second, "disk_bytes": 1000 * second}
        doing = [("a", "a-0", "w" if second % EVERY_SECONDS == 0 else "t")]
        history.look(BEGAN + second, dict.fromkeys(FIGURES, 0.0) | known, doing, {"a": (SENT * done, RECEIVED * done)})
    return history


def test_a_run_is_read_off_its_log_and_its_history(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    outcome = outcome_of(tmp_path)
    assert outcome.samples_per_second == pytest.approx(BATCH / EVERY_SECONDS, rel=0.01)
    assert outcome.merges_per_second == pytest.approx(1 / EVERY_SECONDS, rel=0.01)
    [site] = outcome.sites
    assert (site.name, site.training_share) == ("a", pytest.approx(0.75, abs=0.02))
    assert site.up_bytes_per_second == pytest.approx(SENT / EVERY_SECONDS, rel=0.01)
    assert site.down_bytes_per_second == pytest.approx(RECEIVED / EVERY_SECONDS, rel=0.01)
    sizes = [len(entry.payload) for entry in run.entries if type(entry.record).__name__ == "Delta"]
    assert min(sizes) <= outcome.delta_bytes <= max(sizes)
    assert outcome.staleness == 0
    assert (outcome.server_memory_bytes, outcome.server_disk_bytes) == (2e9, 1000 * (EVERY_SECONDS * PUSHES + 3))
    assert outcome.run_seconds == EVERY_SECONDS * PUSHES


def test_a_run_that_goes_on_has_no_length_yet(tmp_path: Path) -> None:
    a_run(tmp_path, PUSHES // 2)
    assert math.isnan(outcome_of(tmp_path).run_seconds)


def test_a_run_too_short_to_say_anything_says_so(tmp_path: Path) -> None:
    a_run(tmp_path, 10)
    with pytest.raises(UserError, match="too short to be measured: 6 merges while it was steady"):
        outcome_of(tmp_path)


def test_without_a_history_nothing_can_be_said(tmp_path: Path) -> None:
    a_run(tmp_path)
    (tmp_path / "history.json").unlink()
    with pytest.raises(UserError, match=r"there is no history\.json"):
        outcome_of(tmp_path)


def test_the_verb_puts_a_plan_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path)
    cli_plan.plan(parameters=1000, site=["a:workers=1,step=4,batch=8"], against=tmp_path, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["samples/s"]["measured"] == pytest.approx(2.0, rel=0.01)
    assert told["samples/s"]["is_right"]
    assert not told["a sends"]["is_right"]


# --- how far off ---

QUESTION = Question(
    parameters=1e6, settings=RunSettings(run="r", steps_per_round=8), samples=1000,
    sites=(Site(name="a", workers=2, step_seconds=0.5, batch=4, up=1e6),),
)  # fmt: skip


def as_planned() -> Outcome:
    expected = forecast(QUESTION)
    [site] = expected.sites
    return Outcome(
        seconds=100.0,
        merges=25,
        sites=(
            SiteOutcome(
                name="a", up_bytes_per_second=site.up_bytes_per_second, training_share=site.training_share,
                down_bytes_per_second=site.down_bytes_per_second,
            ),
        ),
        samples_per_second=expected.samples_per_second,
        merges_per_second=expected.merges_per_second,
        delta_bytes=QUESTION.delta_bytes,
        staleness=site.staleness,
        server_memory_bytes=expected.server_memory_bytes,
        server_disk_bytes=math.nan,
        run_seconds=math.nan,
    )  # fmt: skip


def compared(outcome: Outcome) -> dict[str, Line]:
    return {line.name: line for line in lines(QUESTION, forecast(QUESTION), outcome)}


def test_a_plan_that_came_true_is_right_in_all_that_is_known() -> None:
    found = compared(as_planned())
    assert all(line.is_right and line.off == pytest.approx(0) for line in found.values())
    assert "a sends, of its link" in found
    assert "a receives, of its link" not in found, "nobody said how fast it is"
    assert not {"server's disk", "the whole run"} & found.keys(), "nobody noted these"


def test_what_is_more_than_a_tenth_off_is_shown() -> None:
    outcome = as_planned()
    outcome = replace(outcome, samples_per_second=outcome.samples_per_second / 1.2, staleness=outcome.staleness + 0.3)
    found = compared(outcome)
    assert found["samples/s"].off == pytest.approx(0.2)
    assert [line.name for line in found.values() if not line.is_right] == ["samples/s", "of all sites' sum"]
    console = Console(file=io.StringIO(), width=100)
    console.print(render_outcome(list(found.values()), outcome))
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue()
    assert "+20.0%" in told and "+16.7 points" in told and "-0.30" in told
    assert "over 1 m 40 s and 25 merges" in told


# --- what goes beside deltas and publishes ---

USAGE = Usage(
    training_seconds=12_345.678, answer_wait_seconds=1.234, sample_wait_seconds=0.123, link_busy_seconds=1234.567,
    upload_bytes_per_second=1234567.8, download_bytes_per_second=1234567.8,
)  # fmt: skip
VITALS = Vitals(
    doing="training", steps=12_345, steps_per_second=2.345, bytes_up=123_456_789, bytes_down=123_456_789, usage=USAGE
)
HASH = bytes(range(100, 116))
A_PUSH = Push(
    incarnation=1, seq=100, anchor=100, anchor_term=1, steps=8, ranges=((12_345, 12_409),), codec="int8",
    tokens=0, payload_bytes=123_456, payload_hash=HASH,
)  # fmt: skip
A_REQUEST = LeaseRequest(
    incarnation=1, number=1 << 32, held=((12_345, 12_409), (13_000, 13_064)), undrawn=300, samples=64, batch=8,
    dataset_samples=100_000,
)  # fmt: skip


def chunk(kind: str) -> Chunk:
    return Chunk(kind=kind, number=100, index=0, total_bytes=123_456, total_hash=HASH)


@pytest.mark.parametrize(
    ("planned", "said"),
    [
        (plan.HEARTBEAT_BYTES, [VITALS.heartbeat(1, 100, 12)]),
        (plan.BEAT_BYTES, [Beat(version=100, publish=100, oldest=90, trained=12_345, positions=123_456)]),
        (plan.ROUND_UP_BYTES, [A_PUSH, chunk(DELTA), A_REQUEST]),
        (
            plan.ROUND_DOWN_BYTES,
            [
                Want(kind=DELTA, number=100, first=0, count=1),
                Ack(seq=100, lsn=1000, receipt=HASH),
                Lease(number=1 << 32, ranges=((12_345, 12_409),), samples=100_000),
                *2 * [Window(number=100, milliseconds=4000, steps=8)],
            ],
        ),
        (plan.PUBLISH_UP_BYTES, [Want(kind=PUBLISH, number=100, first=0, count=1)]),
        (plan.PUBLISH_DOWN_BYTES, [PublishReady(number=100, version=100), chunk(PUBLISH)]),
    ],
)
def test_what_a_plan_adds_is_what_is_said(planned: float, said: list[Message]) -> None:
    assert planned == pytest.approx(sum(sum(map(len, wire.pack(message, b"", 1))) for message in said), rel=0.1)
