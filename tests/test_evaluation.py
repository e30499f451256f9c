"""What a function of the user's may return for an evaluation, and what is said about the rest."""

import contextlib
import functools

import pytest
import torch
from torch import nn

from hetero_async.errors import UserError
from hetero_async.evaluation import Evaluation
from hetero_async.tensors.replica import Replica


def loss(model: nn.Module) -> float:
    return torch.tensor(2.5)


def figures(measure: object) -> tuple[tuple[str, float], ...]:
    return Evaluation(nn.Linear(2, 2), measure, every=0.5).figures(contextlib.nullcontext())


def test_a_number_has_its_functions_name() -> None:
    assert figures(loss) == (("loss", 2.5),)


def test_numbers_by_name_are_taken_and_what_is_not_finite_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert figures(lambda model: {"loss": 1, "accuracy": float("nan")}) == (("loss", 1.0),)
    assert "accuracy is nan, which is not recorded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("measure", "told"),
    [
        (lambda model: 1.0, "return {name: number}"),
        (functools.partial(loss), "return {name: number}"),
        (lambda model: {"loss": "low"}, "loss = 'low': must be a number"),
        (lambda model: {"loss": torch.zeros(2)}, "must be a number"),
    ],
)
def test_what_is_no_figure_is_said(measure: object, told: str) -> None:
    with pytest.raises(UserError, match=told.replace("{", r"\{")):
        figures(measure)


@pytest.mark.parametrize("every", [0.0, -0.1, 1.5, float("nan")])
def test_every_is_a_share_of_the_run(every: float) -> None:
    with pytest.raises(UserError, match="a share of the run"):
        Evaluation(nn.Linear(2, 2), loss, every)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_own_parameters_and_gradients_come_back_to_the_bit_even_after_an_error(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    replica = Replica(model)
    model(torch.ones(1, 3, dtype=dtype)).sum().backward()
    before = [(value.detach().clone(), value.grad) for value in model.parameters()]
    shown = torch.arange(8.0)
    with contextlib.suppress(ZeroDivisionError), replica.showing(shown):
        assert torch.equal(torch.cat([value.detach().float().flatten() for value in model.parameters()]), shown)
        model.zero_grad()
        _ = 1 / 0
    for value, (own, gradient) in zip(model.parameters(), before, strict=True):
        assert torch.equal(value, own)
        assert value.grad is gradient
