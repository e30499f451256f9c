"""What a script hands over that cannot be trained is told when it joins; what it changes later, at the next round."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hetero_async import roster
from hetero_async.errors import DatasetError, SchemaError, UserError
from hetero_async.inspection import check_length, check_optimizer, inner_optimizer
from hetero_async.session import Session
from hetero_async.tables import template
from hetero_async.tensors.replica import Replica


class HandMade:
    """An optimizer as somebody writes one for himself."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.param_groups = [{"params": list(model.parameters())}]

    def step(self) -> None: ...


class Forgetful(torch.optim.SGD):
    def __init__(self, model: torch.nn.Module) -> None:
        self.param_groups = [{"params": list(model.parameters())}]


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's is: an optimizer by its class, though none that was ever made one."""

    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer


def test_a_wrapped_optimizer_is_the_one_within() -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters())
    assert inner_optimizer(optimizer) is inner_optimizer(Wrapper(Wrapper(optimizer))) is optimizer


@pytest.mark.parametrize("kind", [HandMade, Forgetful])
def test_an_optimizer_without_hooks_is_refused_before_anything_is_begun(
    tmp_path: Path, kind: Callable[[torch.nn.Module], Any]
) -> None:
    config = roster.initialize(tmp_path, template(run={"name": "tiny", "samples": 10}, sites={"here": 1}))
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=rf"^{kind.__name__} is no torch\.optim\.Optimizer \(made by its __init__\)"):
        Session(config, "here-0", model, kind(model))


def test_an_optimizer_that_trains_what_the_model_lacks_is_refused_with_the_place(tmp_path: Path) -> None:
    config = roster.initialize(tmp_path, template(run={"name": "tiny", "samples": 10}, sites={"here": 1}))
    model, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 5)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": head.parameters()}])
    with pytest.raises(
        SchemaError, match=r"trains a parameter \(5, 2\) \(group 1, place 0\), which is none of the run's"
    ):
        Session(config, "here-0", model, optimizer)


def test_an_optimizer_may_hold_frozen_parameters_and_need_not_hold_all() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    ids = Replica(model).ids
    check_optimizer(torch.optim.SGD(model.parameters()), ids)
    check_optimizer(torch.optim.SGD([model[0].bias]), ids)


def replaced(model: torch.nn.Sequential) -> None:
    model[0] = torch.nn.Linear(2, 2)


def resized(model: torch.nn.Sequential) -> None:
    model[0].weight.data = torch.zeros(7, 2)


def grown(model: torch.nn.Sequential) -> None:
    model.append(torch.nn.Linear(2, 2))


def materialized(model: torch.nn.Sequential) -> None:
    model.append(torch.nn.LazyLinear(3))
    model(torch.zeros(1, 2))


def thawed(model: torch.nn.Sequential) -> None:
    model[1].requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (replaced, r"^0\.weight was replaced after joining: change the model before that$"),
        (resized, r"^0\.weight went from \[2, 2\] to \[7, 2\] after joining: change the model before that$"),
        (
            grown,
            r"^2\.weight requires a gradient and did not when the model joined: nobody else would learn of it; add",
        ),
        (materialized, r"^2\.weight requires a gradient and did not when the model joined"),
        (thawed, r"^1\.weight requires a gradient and did not when the model joined"),
    ],
)
def test_a_model_that_changes_after_joining_is_told_at_the_next_round(
    change: Callable[[torch.nn.Sequential], None], complaint: str
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    replica = Replica(model)
    replica.cut()
    change(model)
    with pytest.raises(SchemaError, match=complaint):
        replica.cut()


def test_what_is_frozen_after_joining_stands_still_and_that_is_all() -> None:
    model = torch.nn.Linear(2, 2)
    replica = Replica(model)
    model.requires_grad_(False)
    assert not replica.cut().any()


def test_a_dataset_that_changes_its_length_is_told_with_both() -> None:
    check_length([1, 2, 3], 3)
    with pytest.raises(DatasetError, match="the dataset had 3 samples when training began and has 2 now"):
        check_length([1, 2], 3)
