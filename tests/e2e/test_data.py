"""Data of all kinds in one run: a site's own, streams, samples that processes fetch ahead, tokens that weigh."""

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from e2e.harness import Run
from e2e.tiny import BATCH, NextByte, Text, leave_results, loss_of, pause, seeded
from torch import Tensor

import hetero_async as ha
from hetero_async.core import ranges
from hetero_async.core.records import Dataset, Delta, Stepped


class Numbered:
    """Samples that say which they are, and fetch slowly."""

    def __init__(self, samples: int = 2000, first: int = 0, seconds: float = 0.0) -> None:
        self.text, self.samples, self.first, self.seconds = Text(), samples, first, seconds

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        time.sleep(self.seconds)
        return self.first + number, self.text[number % 2000]


class Endless:
    """A stream that can say where it stands, and go on from there."""

    def __init__(self) -> None:
        self.text, self.number = Text(), 0

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        while True:
            self.number += 1
            yield self.number - 1, self.text[self.number % 2000]

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def train_on(kind: str, *, step_seconds: float = 0.002, hold: str = "", hold_after: int = 0, **how: Any) -> None:
    """Leaves the numbers of the samples that steps were taken on, as they come."""
    multiprocessing.current_process()._config["daemon"] = False  # its loader has processes of its own, too,
    multiprocessing.set_start_method("fork", force=True)  # and starts them as in a process that was not forked
    model = seeded(NextByte)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    session = ha.join(model, optimizer)
    if kind == "stream":
        batches = session.batches(Endless(), BATCH)
    elif kind == "iterator":
        numbered = Numbered()
        batches = session.batches(iter([numbered[number] for number in range(300)]), BATCH)
    elif kind == "private":
        batches = session.batches(Numbered(400, first=10_000), BATCH, data="private", **how)
    else:
        batches = session.batches(Numbered(seconds=how.pop("fetch_seconds", 0.0)), BATCH, **how)
    trained: list[list[int]] = []
    for numbers, text in batches:
        optimizer.zero_grad()
        loss_of(model, text).backward()
        pause(step_seconds, hold if len(trained) >= hold_after else "")
        optimizer.step()
        trained.append(numbers.tolist())
    leave_results(trained=trained)


def trained(run: Run, worker: str) -> list[int]:
    return [number for batch in run.results(worker)["trained"] for number in batch]


def test_a_sites_own_data_are_trained_on_at_that_site_alone_and_each_once_a_pass(tmp_path: Path) -> None:
    with Run(tmp_path / "run", sites={"here": 1, "there": 2}, samples=2400) as run:
        run.start_server()
        run.start_worker("here-0", train_on, awaited=run.names, kind="shared")
        for worker in ("there-0", "there-1"):
            run.start_worker(worker, train_on, awaited=run.names, kind="private")
        verdict = run.finish()
        assert verdict.samples == verdict.state.ledger.positions == 2400, "the run's budget counts them all"
        assert {book.book for book in run.records(Dataset)} == {"shared", "private there"}
        private = [number for worker in ("there-0", "there-1") for number in trained(run, worker)]
        assert set(private) <= set(range(10_000, 10_400))
        counted = sum(ranges.size(delta.ranges) for delta in run.deltas() if delta.worker != "here-0")
        assert len(private) == counted
        passes = [private.count(number) for number in range(10_000, 10_400)]
        assert max(passes) - min(passes) <= 1 + counted // 400, "in the order of the site's own passes"
        assert set(trained(run, "here-0")) <= set(range(2000))


def test_a_stream_goes_on_behind_what_was_pushed_when_its_worker_is_started_again(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    with Run(tmp_path / "run", workers=1, samples=800) as run:
        run.start_server()
        first = run.start_worker("here-0", train_on, kind="stream", hold=str(hold), hold_after=40)
        run.wait(
            (tmp_path / "hold.reached-here-0").exists, "it has taken 40 steps, more than a round can be stretched to"
        )
        run.wait(lambda: run.deltas("here-0") and not run.unanswered("here-0"), "its deltas are answered")
        first.kill()
        pushed = sum(ranges.size(delta.ranges) for delta in run.deltas("here-0"))
        assert 0 < pushed <= 41 * BATCH
        hold.unlink()
        run.start_worker("here-0", train_on, kind="stream")
        verdict = run.finish()
        numbers = trained(run, "here-0")
        assert numbers[0] == pushed, "the first sample that no delta was made of"
        assert numbers == list(range(pushed, pushed + len(numbers)))
        assert verdict.samples == 800 == pushed + len(numbers)


def test_a_worker_whose_stream_ends_brings_in_all_of_it_and_the_others_go_on(tmp_path: Path) -> None:
    with Run(tmp_path / "run", samples=1200) as run:
        run.start_server()
        run.start_worker("here-0", train_on, awaited=run.names, kind="iterator")
        run.start_worker("here-1", train_on, awaited=run.names, kind="shared")
        verdict = run.finish()
        assert trained(run, "here-0") == list(range(300))
        assert sum(ranges.size(delta.ranges) for delta in run.deltas("here-0")) == 300
        assert verdict.samples == 1200


def test_samples_fetched_ahead_count_when_they_are_trained_on(tmp_path: Path) -> None:
    """One worker is killed with samples under way; others train on them, and it goes on."""
    hold = tmp_path / "hold"
    hold.touch()
    with Run(tmp_path / "run", samples=2000, steps_per_round=4, max_staleness=100) as run:
        run.start_server()
        options = {"kind": "shared", "workers": 2, "fetch_seconds": 0.0005}
        caught = run.start_worker("here-0", train_on, awaited=run.names, hold=str(hold), hold_after=40, **options)
        run.start_worker("here-1", train_on, awaited=run.names, **options)
        run.wait((tmp_path / "hold.reached-here-0").exists, "it has taken steps")
        run.wait(lambda: run.deltas("here-0"), "it has pushed")
        caught.kill()
        hold.unlink()
        again = len(run.deltas("here-0"))
        run.start_worker("here-0", train_on, **options)
        verdict = run.finish()
        assert len(run.deltas("here-0")) > again
        assert verdict.samples == 2000
        positions = ranges.normal(stretch for delta in run.deltas() for stretch in delta.ranges)
        assert positions == ((0, 2000),)
        counted = sum(ranges.size(delta.ranges) for delta in run.deltas("here-1"))
        assert len(trained(run, "here-1")) == counted, "what was fetched and not trained on is in no delta"
        numbers = trained(run, "here-1") + trained(run, "here-0")
        assert len(set(numbers)) == len(numbers), "of one pass, none came twice in these two lives"


def test_deltas_are_weighed_by_tokens_where_they_are_counted(tmp_path: Path) -> None:
    with Run(tmp_path / "run", samples=1200, weights="tokens", merge="all", warm_up_rounds=0) as run:
        run.start_server()
        run.start_worker("here-0", train_tokens, awaited=run.names, each=1)
        run.start_worker("here-1", train_tokens, awaited=run.names, each=3)
        run.finish()
        deltas = {entry.lsn: entry.record for entry in run.entries() if isinstance(entry.record, Delta)}
        for delta in deltas.values():
            each = 1 if delta.worker == "here-0" else 3
            assert delta.tokens == each * ranges.size(delta.ranges)
        equal = [
            step for step in run.records(Stepped)
            if len(step.deltas) == 2 and len({deltas[lsn].steps for lsn in step.deltas}) == 1
        ]  # fmt: skip
        assert equal, "rounds of one length"
        for step in equal:
            weights = {deltas[lsn].worker: weight for lsn, weight in zip(step.deltas, step.weights, strict=True)}
            tokens = {deltas[lsn].worker: deltas[lsn].tokens for lsn in step.deltas}
            share = tokens["here-0"] / sum(tokens.values())
            assert abs(weights["here-0"] / sum(weights.values()) - share) < 1e-9


def train_tokens(each: int) -> None:
    model = seeded(NextByte)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = ha.join(model, optimizer)
    for text in session.batches(Text(), BATCH, tokens=lambda text: each * len(text)):
        optimizer.zero_grad()
        loss_of(model, text).backward()
        time.sleep(0.002)
        optimizer.step()
