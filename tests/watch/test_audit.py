"""The audit's figures are those of the log, counted here once more, under the keys they came with."""

import io
import json
from collections import defaultdict
from dataclasses import replace

import pytest
from rich.console import Console
from small_run import SmallRun

from hetero_async.core.records import Beacon, Delta
from hetero_async.core.state import State
from hetero_async.errors import LogCorrupt
from hetero_async.ports import Checkpoint
from hetero_async.shell.refusals import Refusals, Refused
from hetero_async.watch.audit import Audit, Row, audit, render

B_KEYS = ("key-of-b-0", "another-key-of-b-0")


def noted(worker: str, **counts: int) -> Refused:
    kinds = {kind: Refusals(count=count, last=f"the last {kind}", at=count) for kind, count in counts.items()}
    return Refused(worker=worker, kinds=kinds)


@pytest.fixture
def run() -> SmallRun:
    """a-0 pushes four times, b-0 once with each of two keys; the first of them joined twice; c-0 only joins."""
    run = SmallRun()
    for worker in ("a-0", "b-0", "c-0"):
        run.join(worker)
    for _ in range(3):
        run.push("a-0", "fp32")
    run.join("b-0")
    run.push("b-0", "fp32", scale=0.5)
    run.keys["b-0"] = B_KEYS[1]
    run.join("b-0")
    run.push("b-0", "fp32", scale=0.25)
    run.push("a-0", "fp32")
    return run


def rows_of(audited: Audit) -> dict[str, Row]:
    return {row.key: row for row in audited.rows}


def drawn(audited: Audit, width: int = 140) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(render(audited))
    return file.getvalue()


def test_every_delta_is_counted_under_the_key_it_came_with(run: SmallRun) -> None:
    rows = rows_of(audit(None, run.entries, {}))
    assert {key: (row.worker, row.lives, row.deltas, row.steps, row.samples) for key, row in rows.items()} == {
        "key-of-a-0": ("a-0", 1, 4, 4, 32),
        B_KEYS[0]: ("b-0", 2, 1, 1, 8),
        B_KEYS[1]: ("b-0", 1, 1, 1, 8),
        "key-of-c-0": ("c-0", 1, 0, 0, 0),
    }
    assert [rows[key].share for key in ("key-of-a-0", *B_KEYS, "key-of-c-0")] == [32 / 48, 8 / 48, 8 / 48, 0.0]
    assert next(iter(rows)) == "key-of-a-0", "the largest contributor comes first"


def test_norms_are_those_of_the_pushed_deltas(run: SmallRun) -> None:
    norms = defaultdict(list)
    workers = [entry.record.worker for entry in run.entries if isinstance(entry.record, Delta)]
    for worker, pushed in zip(workers, run.pushed, strict=True):
        norms[worker].append(float(pushed.double().norm()))
    rows = rows_of(audit(None, run.entries, {}))
    low, second, third, high = sorted(norms["a-0"])
    expected = {"min": low, "median": (second + third) / 2, "max": high}
    assert rows["key-of-a-0"].norms == pytest.approx(expected, rel=1e-6)
    assert rows["key-of-a-0"].norms_of == 4
    assert [rows[key].norms["max"] for key in B_KEYS] == pytest.approx(norms["b-0"], rel=1e-6)  # type: ignore[index]
    assert rows["key-of-c-0"].norms is None


def test_refusals_are_listed_with_their_reasons_also_of_keys_that_never_contributed(run: SmallRun) -> None:
    refused = {B_KEYS[0]: noted("b-0", rarely=2, often=9), "stranger-key": noted("d-0", once=1)}
    audited = audit(None, run.entries, refused)
    rows = rows_of(audited)
    assert rows[B_KEYS[0]].refused == {"often": 9, "rarely": 2}
    assert rows[B_KEYS[0]].last_refusal == "the last often"
    assert (rows["stranger-key"].worker, rows["stranger-key"].deltas) == ("d-0", 0)
    text = drawn(audited)
    assert "refused 9 of b-0 (key-of-b…): often" in text
    assert "refused 1 of d-0 (stranger…): once" in text


def test_the_table_says_it_all_in_a_line_a_key(run: SmallRun) -> None:
    audited = audit(None, run.entries, {"key-of-a-0": noted("a-0", late=1234)})
    text = drawn(audited)
    (line,) = [line for line in text.splitlines() if line.startswith("key-of-a…")]
    assert line.split()[:7] == ["key-of-a…", "a-0", "a", "1", "4", "4", "32"]
    assert line.split()[7] == "66.7%" and line.split()[-1] == "1,234"
    assert f"small: records from genesis to {run.entries[-1].lsn}; the initial parameters came from key-of-a…" in text


def test_a_narrow_terminal_gets_the_figures_that_matter_and_none_cut_off(run: SmallRun) -> None:
    text = drawn(audit(None, run.entries, {"key-of-a-0": noted("a-0", late=1234)}), width=80)
    (line,) = [line for line in text.splitlines() if line.startswith("key-of-a…")]
    words = line.split()
    assert [*words[:5], words[-1]] == ["key-of-a…", "a-0", "4", "32", "66.7%", "1,234"]
    assert "refused" in text.splitlines()[1] and len(words) == 8


def test_json_has_whole_keys_and_every_figure(run: SmallRun) -> None:
    audited = audit(None, run.entries, {B_KEYS[1]: noted("b-0", late=3)})
    told = json.loads(json.dumps(audited.summary()))
    assert told["initial"] == "key-of-a-0"
    row = next(row for row in told["rows"] if row["key"] == B_KEYS[1])
    assert (row["samples"], row["refused"], row["norms_of"]) == (8, {"late": 3}, 1)


def test_what_came_before_the_logs_first_record_is_still_counted(run: SmallRun) -> None:
    middle = next(i for i, entry in enumerate(run.entries) if getattr(entry.record, "key", "") == B_KEYS[1])
    state = State()
    for entry in run.entries[:middle]:
        state.fold(entry)
    start = Checkpoint(
        run="small",
        lsn=state.lsn,
        term=1,
        chain=bytes(16),
        state=state.dump(),
        state_hash=state.digest(),
        model=run.model.snapshot(),
    )
    late, whole = audit(start, run.entries[middle:], {}), audit(None, run.entries, {})
    assert (late.from_lsn, late.initial) == (middle, "")
    for row in whole.rows:
        again = rows_of(late)[row.key]
        assert (again.lives, again.deltas, again.samples, again.share) == (
            row.lives,
            row.deltas,
            row.samples,
            row.share,
        )
    assert rows_of(late)["key-of-a-0"].norms_of == 1, "norms are of the deltas that the log still has"
    assert rows_of(late)[B_KEYS[0]].norms is None


def test_a_log_that_contradicts_itself_is_not_audited(run: SmallRun) -> None:
    index = next(i for i, entry in enumerate(run.entries) if isinstance(entry.record, Beacon))
    entry = run.entries[index]
    run.entries[index] = replace(entry, record=replace(entry.record, state_hash=b"0" * 16))  # type: ignore[arg-type]
    with pytest.raises(LogCorrupt, match="the state before record"):
        audit(None, run.entries, {})


def test_what_peers_wrote_is_neither_markup_nor_control_sequence(run: SmallRun) -> None:
    text = drawn(audit(None, run.entries, {"[red]\x1b[2J": noted("[bold]\n", **{"[blink]\x1b": 1})}))
    assert "refused 1 of [bold]? ([red]?[2…): [blink]?" in text
    assert "\x1b" not in text
