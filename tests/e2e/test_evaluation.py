"""Evaluation on published parameters: who does it and on what, what it leaves behind, and the best that is kept."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from e2e.harness import Run, forked
from e2e.tiny import BATCH, NextByte, Text, leave_results, loss_of, loss_on_all, pause, seeded
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import hetero_async as ha
from hetero_async.core.records import Evaluated, Evaluation, Metric, Published
from hetero_async.tensors.model import ServerModel

EVERY = 0.2
BEST = {"keep_best": "validation_loss"}


class Bumpy(nn.Module):
    """Has a buffer, and a mode that evaluating changes."""

    def __init__(self) -> None:
        super().__init__()
        self.text = NextByte()
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return self.text(text) + 0 * self.dropout(self.seen).sum()


def train_evaluated(*, hold: str = "", step_seconds: float = 0.003) -> None:
    """Evaluates with a function that changes what it can, and compares what its loop could notice."""
    model = seeded(Bumpy)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    session = ha.join(model, optimizer)
    evaluated: list[float] = []
    is_changed: list[bool] = []

    def measure(shown: nn.Module) -> dict[str, float]:
        assert not any(module.training for module in shown.modules())
        assert not torch.is_grad_enabled()
        pause(0.0, hold)
        shown.zero_grad()
        random.random(), numpy.random.rand(), torch.rand(3)
        evaluated.append(weights_of(shown))
        return {"validation_loss": loss_on_all(shown), "weights": evaluated[-1], "useless": float("nan")}

    session.evaluate(measure, every=EVERY)
    figures = session._evaluation.figures

    def watched(showing: Any) -> Any:
        before = everything(model)
        measured = figures(showing)
        is_changed.append(not same(before, everything(model)))
        return measured

    session._evaluation.figures = watched
    for text in session.batches(Text(), BATCH):
        optimizer.zero_grad()
        loss_of(model, text).backward()
        time.sleep(step_seconds)
        optimizer.step()
    leave_results(evaluated=evaluated, is_changed=is_changed)


def weights_of(model: nn.Module) -> float:
    return model.text.output.weight.double().sum().item()


def everything(model: nn.Module) -> list[Any]:
    tensors = [value.clone() for value in model.state_dict().values()]
    gradients = [None if value.grad is None else value.grad.clone() for value in model.parameters()]
    chance = [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()]
    return [tensors, gradients, [module.training for module in model.modules()], chance]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def published(run: Run) -> dict[int, torch.Tensor]:
    """By version, what each publish showed, recomputed from the log."""
    model, shown = ServerModel(), {}
    for entry in run.entries():
        model.apply(entry)
        if isinstance(entry.record, Published):
            shown[entry.record.version] = model.shadow.clone()
    return shown


def part_of(shown: torch.Tensor, number: int) -> torch.Tensor:
    """One of the two weights, which come first and are of one size."""
    return shown[number * 256 * 12 : (number + 1) * 256 * 12]


def test_one_worker_at_a_time_measures_what_was_published_and_its_loop_notices_nothing(tmp_path: Path) -> None:
    with Run(tmp_path / "run", samples=4000, server=BEST) as run:
        run.start_server()
        for worker in run.names:
            run.start_worker(worker, train_evaluated)
        verdict = run.finish()
        handed_out, answered = run.records(Evaluation), run.records(Evaluated)
        assert [given.publish for given in handed_out] == [done.publish for done in answered]
        assert 3 <= len(answered) <= 1 / EVERY + 1
        assert answered[-1].publish == verdict.state.publish, "the last parameters are measured, too"
        assert len({given.worker for given in handed_out}) == 1, "figures of one run come from one device"
        results = [run.results(worker) for worker in run.names]
        assert sum(len(result["evaluated"]) for result in results) == len(answered)
        assert not any(is_changed for result in results for is_changed in result["is_changed"])
        shown, figures = published(run), run.records(Metric)
        assert {metric.name for metric in figures} == {"validation_loss", "weights"}, "a NaN is not recorded"
        for metric in figures:
            if metric.name == "weights":
                assert metric.value == pytest.approx(part_of(shown[metric.version], 1).double().sum().item(), rel=1e-6)
        check_best(run, tmp_path, shown)


def check_best(run: Run, tmp_path: Path, shown: dict[int, torch.Tensor]) -> None:
    answered = {done.publish for done in run.records(Evaluated)}  # another one's figures came too late to be the best
    eligible = {published.version for published in run.records(Published) if published.number in answered}
    losses = {
        metric.version: metric.value
        for metric in run.records(Metric)
        if metric.name == "validation_loss" and metric.version in eligible
    }
    best = min(losses, key=lambda version: losses[version])
    out = tmp_path / "best.safetensors"
    answer = forked(tmp_path, "export", out, "--best", "--run", run.config.path)
    assert (answer.exit_code, answer.errors) == (0, "")
    assert f"version {best}" in answer.output
    assert torch.equal(load_file(out)["text.bytes.weight"].flatten(), part_of(shown[best], 0))
    with safe_open(out, "pt") as file:
        assert file.metadata()["version"] == str(best)
    assert len(list((run.config.directory / "best").iterdir())) == 1, "what was measured and was not the best is gone"


def test_while_one_measures_the_others_train_and_when_it_dies_another_measures_the_next(tmp_path: Path) -> None:
    """The server dies in the meantime, and forgets neither the best nor what is being measured."""
    hold = tmp_path / "hold"
    hold.touch()
    with Run(tmp_path / "run", samples=8000, server=BEST, warm_up_rounds=0) as run:
        server = run.start_server()
        lives = {worker: run.start_worker(worker, train_evaluated, hold=str(hold)) for worker in run.names}
        given = run.wait(lambda: run.records(Evaluation), "an evaluation is handed out")[0]
        caught = tmp_path / f"hold.reached-{given.worker}"
        run.wait(caught.exists, "it is measured")
        other = next(worker for worker in run.names if worker != given.worker)
        deltas = len(run.deltas(other))
        run.wait(lambda: len(run.deltas(other)) > deltas + 3, "the other goes on")
        assert len(run.records(Evaluation)) == 1, "one at a time"
        assert run.status()["evaluation"]["worker"] == given.worker
        server.kill()
        lives.pop(given.worker).signal(signal.SIGKILL)
        run.start_server()
        second = run.wait(lambda: run.records(Evaluation)[1:], "another evaluation is handed out")[0]
        assert second.worker == other
        hold.unlink()
        run.start_worker(given.worker, train_evaluated)
        run.finish()
        assert run.records(Evaluated)[0].publish == second.publish
        check_best(run, tmp_path, published(run))
