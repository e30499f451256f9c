"""Evaluation on published parameters: who does it and on what, what it leaves behind, and the best that is kept."""

import random
import time
from pathlib import Path

import numpy
import pytest
import torch
from e2e.harness import Run, forked
from e2e.tiny import BATCH, NextByte, Text, leave_results, loss_of, loss_on_all, pause, seeded
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import hetero_async as ha
from hetero_async.core.records import Delta, Evaluated, Evaluation, Metric, Published
from hetero_async.tensors.model import ServerModel

EVERY = 0.2


class Bumpy(nn.Module):
    """Has a buffer, dropout and a mode that evaluating changes."""

    def __init__(self) -> None:
        super().__init__()
        self.text = NextByte()
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return self.text(text) + 0 * self.dropout(self.seen).sum()


def train_evaluated(*, hold: str = "", step_seconds: float = 0.003) -> None:
    """Evaluates, and says whether its own loop could have noticed."""
    model = seeded(Bumpy)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    session = ha.join(model, optimizer)
    evaluated: list[str] = []
    before: list[object] = []

    def everything() -> list[object]:
        parts = [value.clone() for value in model.state_dict().values()]
        gradients = [None if value.grad is None else value.grad.clone() for value in model.parameters()]
        chance = [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
        return [parts, gradients, [module.training for module in model.modules()], chance]

    def losses(shown: nn.Module) -> dict[str, float]:
        assert not any(module.training for module in shown.modules())
        evaluated.append(shown.text.output.weight.double().sum().item())
        random.random(), numpy.random.rand(), torch.rand(3)
        pause(0.0, hold)
        return {"validation_loss": loss_on_all(shown), "weights": shown.text.output.weight.double().sum().item()}

    measure = session._evaluation_of if hasattr(session, "_evaluation_of") else None
    assert measure is None
    session.evaluate(losses, every=EVERY)
    showing = session._replica.showing
    is_changed: list[bool] = []

    def watched(flat: object) -> object:
        before[:] = everything()
        return showing(flat)

    session._replica.showing = watched
    adopt = session._rounds.adopt

    def adopted() -> None:
        if before:
            is_changed.append(not same(before, everything()))
            before.clear()
        adopt()

    session._rounds.adopt = adopted
    for text in session.batches(Text(), BATCH):
        optimizer.zero_grad()
        loss_of(model, text).backward()
        time.sleep(step_seconds)
        optimizer.step()
    leave_results(evaluated=evaluated, is_changed=is_changed)


def same(left: object, right: object) -> bool:
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


def test_one_worker_at_a_time_measures_what_was_published_and_its_loop_notices_nothing(tmp_path: Path) -> None:
    with Run(tmp_path / "run", samples=4000, server={"keep_best": "validation_loss"}) as run:
        run.start_server()
        for worker in run.names:
            run.start_worker(worker, script=train_evaluated)
        verdict = run.finish()
        handed_out, answered = run.records(Evaluation), run.records(Evaluated)
        assert [given.publish for given in handed_out] == [done.publish for done in answered]
        assert 3 <= len(answered) <= 1 / EVERY + 1
        assert answered[-1].publish == verdict.state.publish, "the last parameters are measured, too"
        assert len({given.worker for given in handed_out}) == 1, "figures of one run come from one device"
        results = {worker: run.results(worker) for worker in run.names}
        assert sum(len(result["evaluated"]) for result in results.values()) == len(answered)
        assert not any(sum((result["is_changed"] for result in results.values()), []))
        shown = published(run)
        for metric in run.records(Metric):
            if metric.name == "weights":
                expected = shown[metric.version][256 * 12 : 2 * 256 * 12].double().sum().item()
                assert metric.value == pytest.approx(expected, rel=1e-6), metric
        check_best(run, tmp_path, shown)


def check_best(run: Run, tmp_path: Path, shown: dict[int, torch.Tensor]) -> None:
    losses = {metric.version: metric.value for metric in run.records(Metric) if metric.name == "validation_loss"}
    best = min(losses, key=lambda version: losses[version])
    out = tmp_path / "best.safetensors"
    answer = forked(tmp_path, "export", out, "--best", "--run", run.config.path)
    assert (answer.exit_code, answer.errors) == (0, "")
    assert f"version {best}" in answer.output
    exported = load_file(out)
    assert torch.equal(exported["text.bytes.weight"].flatten(), shown[best][: 256 * 12])
    with safe_open(out, "pt") as file:
        assert file.metadata()["version"] == str(best)
    assert len(list((run.config.directory / "best").iterdir())) == 1, "what was measured and was not the best is gone"
