"""What a worker's probe leaves behind (nothing), and what it says where a model cannot be probed."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensors.models import Awkward, Run, values
from torch import Tensor, nn

from hetero_async.core.messages import INITIAL, SNAPSHOT
from hetero_async.core.probe import Digest, ProbeReport, ProbeVerdict
from hetero_async.core.probing import _first_difference
from hetero_async.desk import Desk
from hetero_async.probing import Probing
from hetero_async.tensors.follower import Follower
from hetero_async.tensors.model import ServerModel
from hetero_async.tensors.replica import Replica, Shadow

TOKENS = torch.arange(11)


class Restless(nn.Module):
    """Changes all that it can whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        random.random(), torch.rand(3)
        return self.norm(self.dropout(self.linear(x)))


def began_with(model: nn.Module) -> Shadow:
    """What a server hands out of a run that begins with that model."""
    run = Run(model)
    follower = Follower(run.replica)
    follower.take(SNAPSHOT, run.server.fetch(SNAPSHOT, 0) or b"")
    follower.take(INITIAL, run.server.fetch(INITIAL, 0) or b"")
    assert follower.initial is not None
    return follower.initial


def report_of(model: nn.Module, batch: Any, shown: Shadow) -> ProbeReport:
    report = Probing("a-0", model, Replica(model), batch).report(shown.flat, shown.buffers)
    assert report is not None
    return report


def digest_of(model: nn.Module, batch: Any, shown: Shadow) -> Digest:
    report = report_of(model, batch, shown)
    assert not report.reason
    return report.digest


def everything(model: nn.Module) -> tuple[list[Any], ...]:
    values = [value.clone() for value in model.state_dict().values()]
    gradients = [value.grad.clone() for value in model.parameters() if value.grad is not None]
    chance = [torch.get_rng_state(), torch.tensor(hash(random.getstate()))]
    return values, gradients, [torch.tensor(module.training) for module in model.modules()], chance


def test_what_a_run_began_with_can_be_fetched_for_good_at_four_bits() -> None:
    run = Run(Awkward())
    numel, specs = run.replica.schema.numel, run.replica.schema.buffers
    began = Shadow.from_snapshot(run.server.fetch(INITIAL, 0) or b"", numel, specs)
    apart = (began.flat - run.server.theta).norm() / run.server.theta.norm()
    assert 0 < apart < 0.2
    assert all(map(torch.equal, began.buffers, run.server.buffers))
    run.push(values(numel, seed=1))
    run.step()
    run.publish()
    again = ServerModel()
    again.load(run.server.snapshot())
    assert again.fetch(INITIAL, 0) == run.server.fetch(INITIAL, 0)
    replayed = ServerModel()
    for entry in run.entries:
        replayed.apply(entry)
    assert replayed.fetch(INITIAL, 0) == run.server.fetch(INITIAL, 0)
    assert torch.equal(Shadow.from_snapshot(again.fetch(INITIAL, 0) or b"", numel, specs).flat, began.flat)


@pytest.mark.parametrize("batch", [torch.ones(8, 4), None], ids=["a batch", "its layers"])
def test_nothing_is_left_of_a_probe(batch: Any) -> None:
    model = Restless()
    model(torch.rand(8, 4)).sum().backward()
    model.dropout.eval()
    shown = began_with(Restless())
    before = everything(model)
    report_of(model, batch, shown)
    after = everything(model)
    for was, is_now in zip(before, after, strict=True):
        assert all(map(torch.equal, was, is_now))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("batch", [TOKENS, None], ids=["a batch", "its layers"])
def test_where_a_worker_stands_does_not_matter_but_what_the_run_does_not_carry_does(batch: Any) -> None:
    """Tied, frozen, 0-dim and empty parameters, and buffers that have moved."""
    torch.manual_seed(0)
    first = Awkward()
    shown = began_with(first)
    torch.manual_seed(1)
    late = Awkward()
    late.frozen.load_state_dict(first.frozen.state_dict())
    late.norm.running_mean.add_(3)
    reference = digest_of(first, batch, shown)
    assert not _first_difference(reference, digest_of(late, batch, shown))
    late.frozen.weight.data.mul_(1.1)
    assert "frozen is the first layer that differs" in _first_difference(reference, digest_of(late, batch, shown))


class Raises(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.linear, self.error = nn.Linear(2, 2), error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


ERRORS = [ValueError("y" * 2000), KeyError("x"), AssertionError(), ImportError("flash"), RuntimeError("size")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_model_that_does_not_take_the_batch_says_why(error: Exception) -> None:
    model = Raises(error)
    report = report_of(model, torch.ones(2), began_with(model))
    assert report.reason.startswith(type(error).__name__)
    assert len(report.reason) <= 300
    assert not model.linear._forward_hooks
    assert report_of(model, None, began_with(model)).digest.layers == ("linear",)


class Heard(Desk):
    """A background that does something each time that the loop waits."""

    def __init__(self, does: Callable[["Heard"], None]) -> None:
        super().__init__()
        self.lacks_initial, self.does = True, does

    def wait(self, why: str) -> None:
        self.does(self)


def ran(model: nn.Module, does: Callable[[Heard, Follower], None]) -> list[ProbeReport]:
    said: list[ProbeReport] = []
    replica = Replica(model)
    follower = Follower(replica)
    desk = Heard(lambda desk: does(desk, follower))
    Probing("a-0", model, replica, None).run(desk, follower, said.append, desk.wait)
    assert follower.initial is None, "it is as large as the model"
    return said


def test_a_servers_word_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(2, 2))

    def answers(desk: Heard, follower: Follower) -> None:
        if desk.lacks_initial:
            follower.initial, desk.lacks_initial = began_with(model), False
        else:
            desk.verdict = ProbeVerdict(reason="0 is the first layer")

    assert len(ran(model, answers)) == 1
    assert "0 is the first layer" in capsys.readouterr().err


def test_who_gets_nothing_to_probe_on_or_has_nothing_to_probe_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def sends_nothing(desk: Heard, follower: Follower) -> None:
        desk.lacks_initial = False

    assert not ran(nn.Linear(2, 2), sends_nothing)
    assert "did not send" in capsys.readouterr().err

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    def sends(desk: Heard, follower: Follower) -> None:
        follower.initial, desk.lacks_initial = began_with(Own()), False

    assert not ran(Own(), sends)
    assert "give join a batch" in capsys.readouterr().err


def test_a_server_that_does_not_answer_holds_nobody_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hetero_async.probing.ANSWER_SECONDS", 0.01)
    model = nn.Linear(2, 2)

    def sends(desk: Heard, follower: Follower) -> None:
        if desk.lacks_initial:
            follower.initial, desk.lacks_initial = began_with(model), False

    assert len(ran(model, sends)) == 1
    assert "no word from the server" in capsys.readouterr().err
    monkeypatch.setattr("hetero_async.probing.FETCH_SECONDS", 0.0)
    assert not ran(model, lambda desk, follower: None)
    assert "did not send" in capsys.readouterr().err
